r"""Runs the grid of a scale: every cell that has no result yet, each from its last checkpoint.

Stop it at any time and start it again. Start it several times with the same folders to use several processes: each
takes the next cell that is free. The folder can be moved to another machine in between.

    python -m examples.paper.run --config examples/paper/nano.yaml --prepared outputs/paper/nano/prepared \
        --output outputs/paper/nano
"""

import argparse
import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers.utils import logging

from examples.grid.results import append_result, load_results

from .cells import METHODS, MLM, Cell, expand
from .data import Prepared
from .settings import Scale, load_scale
from .train import RUN, train_cell

RESULTS = "results.jsonl"
#: Pause, in seconds, before looking again whether another process has finished a cell.
WAIT = 2.0


def run_grid(cells: Sequence[Cell], scale: Scale, prepared: Prepared, output: Path) -> dict[Cell, str]:
    """Compute the cells that have no result.

    Args:
        cells: The cells, each after the ones that it needs.
        scale: Name of the scale, and how often to evaluate and save.
        prepared: Data and initial models.
        output: Folder of the results and of the cells.

    Returns:
        The errors of the cells that could not be computed; those that need them are left out.
    """
    results = output / RESULTS
    keys = {cell: cell.key(prepared.fingerprints) for cell in cells}
    folders = {cell: output / "cells" / key for cell, key in keys.items()}
    failed: dict[Cell, str] = {}
    for result in load_results([results]):  # of a process that was killed when all was done
        shutil.rmtree(output / "cells" / result["key"] / RUN, ignore_errors=True)
    while True:
        done = {result["key"] for result in load_results([results])}
        left = [cell for cell in cells if keys[cell] not in done and not _lost(cell, failed)]
        if not left:
            return failed
        if not any(
            _try_cell(cell, scale, prepared, folders, results, failed, f"{len(cells) - len(left) + 1}/{len(cells)}")
            for cell in left
            if all(keys[source] in done for source in cell.sources)
        ):
            time.sleep(WAIT)  # the others are being computed by other processes


def _lost(cell: Cell, failed: Mapping[Cell, str]) -> bool:
    """Whether a cell, or one that it needs, has failed."""
    return cell in failed or any(_lost(source, failed) for source in cell.sources)


def _try_cell(
    cell: Cell,
    scale: Scale,
    prepared: Prepared,
    folders: Mapping[Cell, Path],
    results: Path,
    failed: dict[Cell, str],
    number: str,
) -> bool:
    """Compute a cell unless another process does; whether anything was done."""
    folder = folders[cell]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):  # let go of when the process ends, however it ends
            if folder.name in {result["key"] for result in load_results([results])}:
                return True
            print(f"[{number}] {describe(cell)} ({folder.name})", flush=True)
            start = time.time()
            try:
                result = train_cell(cell, prepared, folder, folders, scale)
            except Exception as error:
                traceback.print_exc()
                failed[cell] = f"{type(error).__name__}: {error}"  # the error itself would keep the models in memory
                return True
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            described = {"scale": scale.name, **cell.describe(prepared.fingerprints)}
            with FileLock(results.with_suffix(".lock")):
                append_result(results, {"key": folder.name, "cell": described, **result})
            shutil.rmtree(folder / RUN, ignore_errors=True)
            scores = {name: model["scores"]["validation"] for name, model in result["models"].items()}
            print(f"[{number}] {time.time() - start:.0f} s: {scores}", flush=True)
            return True
    except Timeout:
        return False


def describe(cell: Cell) -> str:
    """A cell in a few words."""
    words = [cell.task, cell.method, f"seed {cell.seed}"]
    if cell.learner is None:
        names = ("rows", "steps", "epochs", "teacher_init", "student_init", "student_learning_rate")
        names += ("hard_weight", "soft_weight", "teacher_soft_weight", "temperature", "soft_warmup_ratio")
        defaults = {field.name: field.default for field in fields(cell)}
        values = {name: getattr(cell, name) for name in names}
        words += [f"{name} {value}" for name, value in values.items() if value not in (None, defaults[name])]
    if cell.start is not None:
        words.append(f"from {describe(cell.start)}")
    if cell.learner is not None:
        words.append(cell.learner)
    return " ".join(words)


def wanted(cells: Sequence[Cell], args: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for, with those that they need."""
    chosen: set[Cell] = set()

    def add(cell: Cell) -> None:
        chosen.add(cell)
        for source in cell.sources:
            add(source)

    for cell in cells:
        method = cell.method if cell.learner is None else cell.start.method
        kind = "fine-tuning" if cell.learner is not None else "pre-training" if cell.task == MLM else "co-training"
        if (
            (args.seeds is None or cell.seed in args.seeds)
            and (args.methods is None or method in args.methods)
            and (args.tasks is None or cell.task in args.tasks)
            and (args.kinds is None or kind in args.kinds)
        ):
            add(cell)
    return [cell for cell in cells if cell in chosen]


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the scale")
    parser.add_argument("--prepared", type=Path, required=True, help="folder that examples.paper.prepare has written")
    parser.add_argument("--output", type=Path, required=True, help=f"folder of {RESULTS} and of the cells")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these methods, and what they need")
    parser.add_argument("--tasks", nargs="+", help="only these tasks (mlm, cola, ...), and what they need")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=("pre-training", "fine-tuning", "co-training"),
        help="only these kinds of cells, and what they need",
    )
    parser.add_argument("--threads", type=int, help="number of torch threads (default: torch's own)")
    parser.add_argument("--list", action="store_true", help="print the cells and which have results, and end")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.cuda.device_count() > 1:
        sys.exit(
            f"error: a cell is trained on one device, and this process sees {torch.cuda.device_count()} GPUs in a "
            f"group of {os.environ.get('WORLD_SIZE', '1')} processes. Start this command once for each GPU, without "
            "torchrun, each time with its own CUDA_VISIBLE_DEVICES: the processes share the cells."
        )
    try:
        scale, prepared = load_scale(args.config), Prepared.load(args.prepared)
        prepared.check(scale)
        cells = wanted(expand(scale.grid, scale.defaults), args)
        done = {result["key"] for result in load_results([args.output / RESULTS])}
        missing = {cell.task for cell in cells} - set(prepared.fingerprints)
        if missing:
            raise ValueError(f"The grid has the tasks {sorted(missing)}, which are not in {str(args.prepared)!r}.")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if args.list:
        for cell in cells:
            key = cell.key(prepared.fingerprints)
            print(f"{key}  {'done' if key in done else '    '}  {describe(cell)}")
        return
    failed = run_grid(cells, scale, prepared, args.output)
    for cell, error in failed.items():
        print(f"failed: {describe(cell)}: {error}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
