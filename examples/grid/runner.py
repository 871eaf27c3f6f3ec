"""Runs the cells of a grid that have no result yet, each after the cells that it needs.

Several processes may run the same grid: each takes the next cell that is free. After a kill, start again.
"""

import gc
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from .results import append_result, load_results

RESULTS = "results.jsonl"
#: Pause, in seconds, before looking again whether another process has finished a cell.
WAIT = 2.0


class Cell(Protocol):
    """One training of a grid; hashable."""

    @property
    def sources(self) -> tuple["Cell", ...]:
        """The cells whose models this one needs."""


@dataclass(frozen=True)
class Grid:
    """The cells of a grid, and how one is computed.

    Attributes:
        output: Folder of the results.
        folders: Folder of each cell, in an order in which each cell comes after the cells that it needs.
        keys: Key of each cell in the results.
        compute: Computes a cell; returns its line of the results without the key.
        describe: Names a cell in the log.
        scratch: Name of the folder in a cell's folder that is removed once the cell has its result.
    """

    output: Path
    folders: Mapping[Cell, Path]
    keys: Mapping[Cell, str]
    compute: Callable[[Cell], dict[str, Any]]
    describe: Callable[[Cell], str]
    scratch: str = "run"

    @property
    def results(self) -> Path:
        """The file of results, one JSON line a cell."""
        return self.output / RESULTS

    def done(self) -> set[Cell]:
        """The cells that have a result."""
        found = {result["key"] for result in load_results([self.results])}
        return {cell for cell, key in self.keys.items() if key in found}

    def run(self) -> dict[Cell, str]:
        """Compute the cells that have no result.

        Returns:
            The errors of the cells that failed; cells that need them are left out.
        """
        failed: dict[Cell, str] = {}
        for cell in self.done():  # a process may have been killed before it removed the folder
            self._clean_up(cell)
        while True:
            done = self.done()
            left = [cell for cell in self.keys if cell not in done and not _lost(cell, failed)]
            if not left:
                break
            number = f"{len(self.keys) - len(left) + 1}/{len(self.keys)}"
            ready = (cell for cell in left if all(source in done for source in cell.sources))
            if not any(self._try(cell, failed, number) for cell in ready):
                time.sleep(WAIT)  # other processes compute the other cells
        for cell, error in failed.items():
            print(f"failed: {self.describe(cell)}: {error}", file=sys.stderr)
        return failed

    def _try(self, cell: Cell, failed: dict[Cell, str], number: str) -> bool:
        """Compute a cell unless another process does; returns whether the state of the grid has changed."""
        folder = self.folders[cell]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / "lock", timeout=0):  # released when the process ends, however it ends
                if cell in self.done():
                    return True
                name = f"[{number}] {self.describe(cell)}"
                print(f"{name} ({self.keys[cell]})", flush=True)
                start = time.time()
                try:
                    result = self.compute(cell)
                except Exception as error:
                    traceback.print_exc()
                    failed[cell] = f"{type(error).__name__}: {error}"  # the error itself would keep the models alive
                    print(f"{name}: FAILED", flush=True)
                    return True
                finally:
                    gc.collect()  # the models of a trainer are in cycles
                    torch.cuda.empty_cache()
                with FileLock(self.results.with_suffix(".lock")):
                    append_result(self.results, {"key": self.keys[cell], **result})
                self._clean_up(cell)
                print(f"{name}: {time.time() - start:.0f} s", flush=True)
                return True
        except Timeout:
            return False

    def _clean_up(self, cell: Cell) -> None:
        shutil.rmtree(self.folders[cell] / self.scratch, ignore_errors=True)


def _lost(cell: Cell, failed: Mapping[Cell, str]) -> bool:
    """Tell whether a cell, or a cell that it needs, has failed."""
    return cell in failed or any(_lost(source, failed) for source in cell.sources)
