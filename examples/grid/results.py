"""Results of a grid as JSON lines: one line a finished cell, only ever appended."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def load_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The finished cells of one or several files, each once.

    A last line without its end, which a kill in the middle of writing leaves, does not count.

    Args:
        paths: The files; one that is not there has no results.

    Raises:
        ValueError: A line is no result; names the file and the line.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        text = path.read_text() if path.exists() else ""
        for number, line in enumerate(text.split("\n")[:-1], 1):
            try:
                result = json.loads(line)
                results.setdefault(result["key"], result)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {str(path)!r} is no result of a cell ({error!r}). Remove it."
                ) from error
    return list(results.values())


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Add a result in one write, which reaches the disk before this returns.

    Args:
        path: The file; a last line that a kill has cut off is removed first.
        result: With a `key` that no other line has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
