"""Folders that are there whole or not at all, whenever the process is killed."""

import contextlib
import os
import shutil
from pathlib import Path

#: Folder beside the final ones in which they are written first. Trainer's uploads leave out names that begin so.
PARTIAL = "_partial"
_REPLACED = "replaced-"
_REMOVED = "removed-"


def place_to_write(final: Path) -> Path:
    """Where to write a folder that `put_in_place` will move to its final place."""
    return final.parent / PARTIAL / final.name


def put_in_place(final: Path) -> None:
    """Move a folder from its `place_to_write` to its place, once all of it has reached the disk.

    Args:
        final: Its place. A folder that is there already is replaced.
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


def remove(final: Path) -> None:
    """Remove a folder, so that a kill leaves no half of it in its place."""
    removed = place_to_write(final).with_name(f"{_REMOVED}{final.name}")
    removed.parent.mkdir(exist_ok=True)
    final.rename(removed)
    shutil.rmtree(removed.parent, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Remove what a killed process has left in a folder; what it was about to replace is put back."""
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
            _sync_entry(Path(root, name), os.O_RDWR)  # Windows syncs only what may be written
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    # Not every system can open or sync a folder (Windows, some network file systems); the files themselves are synced.
    with contextlib.suppress(OSError):
        _sync_entry(folder, os.O_RDONLY)


def _sync_entry(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
