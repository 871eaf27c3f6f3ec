"""Folders that are there whole or not at all, whenever the process is killed."""

import os
import shutil
from pathlib import Path

#: Folder beside the final ones in which they are written first. Trainer's uploads leave out names that begin so.
PARTIAL = "_partial"
_REPLACED = "replaced-"


def put_in_place(written: Path, final: Path) -> None:
    """Move a folder that is complete to its place, once all of it has reached the disk.

    Args:
        written: The folder, inside of a folder `PARTIAL` on the file system of `final`.
        final: Its place. A folder that is there already is replaced.
    """
    _sync(written)
    replaced = written.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    written.rename(final)
    _sync_entry(final.parent)
    shutil.rmtree(written.parent)


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
            _sync_entry(Path(root, name))
        _sync_entry(Path(root))


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
