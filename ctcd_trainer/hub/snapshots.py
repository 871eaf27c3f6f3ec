"""Copies of checkpoints and models that are kept while they wait for the Hub."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def snapshot(folder: str | os.PathLike, below: Path, live: bool) -> Path:
    """A copy of a folder.

    Args:
        folder: A checkpoint, whose files never change; or with `live` an output folder.
        below: Where the copy goes.
        live: Whether the files may change later, so that they are copied, but for checkpoints and what begins with
            `_`. Otherwise the copy takes no space while the folder is there as well.

    Raises:
        OSError: There is no room, say; nothing is left of the copy.
    """
    target = below / f"{'models' if live else Path(folder).name}-{time.time_ns()}"
    copy, ignore = (shutil.copy2, _all_but_models(folder)) if live else (_link_or_copy, None)
    try:
        shutil.copytree(folder, target, copy_function=copy, ignore=ignore, ignore_dangling_symlinks=True)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def oldest_alone(snapshots: set[Path], most: int) -> list[Path]:
    """Which snapshots of checkpoints are too many of those that take space, because their checkpoints are gone.

    Args:
        snapshots: Snapshots.
        most: How many may be alone, one of which is yet to come: a checkpoint goes after its successor is pushed.
    """
    alone = [path for path in snapshots if path.name.startswith(PREFIX_CHECKPOINT_DIR) and _is_alone(path)]
    alone.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    return alone[: max(0, len(alone) - most + 1)]


def _is_alone(folder: Path) -> bool:
    """Whether files of a folder are nowhere else on the disk."""
    return any(path.is_file() and path.stat().st_nlink == 1 for path in folder.rglob("*"))


def _all_but_models(folder: str | os.PathLike) -> Callable[[str, list[str]], list[str]]:
    """What of an output folder does not belong to the models, for `shutil.copytree`."""
    top = os.fspath(folder)

    def ignore(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if directory == top and name.startswith(("_", f"{PREFIX_CHECKPOINT_DIR}-"))]

    return ignore


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
