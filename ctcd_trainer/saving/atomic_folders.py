"""Write, replace and remove folders so that a kill leaves a whole folder or none."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

#: Folders are first written into this one, beside their final places. Trainer does not upload names with "_" in front.
PARTIAL = "_partial"
_REPLACED = "replaced-"
_REMOVED = "removed-"


def place_to_write(final: Path) -> Path:
    """Return the path at which to write a folder before `put_in_place` moves it."""
    return final.parent / PARTIAL / final.name


def put_in_place(final: Path) -> None:
    """Wait until a folder is on the disk, and move it from its `place_to_write` to its final place.

    Args:
        final: The final place. An existing folder is replaced.
    """
    written = place_to_write(final)
    _sync(written)
    replaced = written.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    written.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


@contextlib.contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """Write a file beside `final` and move it there at the end, so that a kill leaves a whole file or none."""
    written = final.with_name(f"partial-{final.name}")
    yield written
    written.replace(final)


def remove(final: Path) -> None:
    """Remove a folder. A kill leaves it whole, or absent from its place."""
    removed = place_to_write(final).with_name(f"{_REMOVED}{final.name}")
    removed.parent.mkdir(exist_ok=True)
    final.rename(removed)
    shutil.rmtree(removed.parent, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Remove the remains of a killed process from a folder, and restore a folder that it had not yet replaced."""
    partial = folder / PARTIAL
    if not partial.is_dir():
        return
    for replaced in partial.glob(f"{_REPLACED}*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            replaced.rename(final)
    shutil.rmtree(partial)


def _sync(folder: Path) -> None:
    """Wait until all files of a folder are on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_entry(Path(root, name), os.O_RDWR)  # Windows syncs files only if they are open for writing
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    # Windows and some network file systems cannot open or sync a folder; its files are synced anyway.
    with contextlib.suppress(OSError):
        _sync_entry(folder, os.O_RDONLY)


def _sync_entry(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
