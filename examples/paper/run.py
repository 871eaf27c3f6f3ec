r"""Runs the grid of a scale: every cell that has no result yet, each from its last checkpoint.

Stop it at any time and start it again. Start it several times with the same folders to use several processes: each
takes the next cell that is free. The folder can be moved to another machine in between.

    python -m examples.paper.run --config examples/paper/nano.yaml --prepared outputs/paper/nano/prepared \
        --output outputs/paper/nano
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from examples.grid.runner import RESULTS, Grid

from .cells import METHODS, MLM, Cell, expand
from .data import Prepared
from .settings import Scale, load_scale
from .train import RUN, train_cell

KINDS = PRETRAINING, FINETUNING, COTRAINING = ("pre-training", "fine-tuning", "co-training")


def grid_of(cells: Sequence[Cell], scale: Scale, prepared: Prepared, output: Path) -> Grid:
    """The grid of the paper.

    Args:
        cells: The cells, each after the cells that it needs.
        scale: Name of the scale, and how often to evaluate and save.
        prepared: Data and initial models.
        output: Folder of the results and of the cells.
    """
    keys = {cell: cell.key(prepared.fingerprints) for cell in cells}
    folders = {cell: output / "cells" / key for cell, key in keys.items()}

    def compute(cell: Cell) -> dict[str, Any]:
        result = train_cell(cell, prepared, folders[cell], folders, scale)
        print({name: model["scores"]["validation"] for name, model in result["models"].items()}, flush=True)
        return {"cell": {"scale": scale.name, **cell.describe(prepared.fingerprints)}, **result}

    return Grid(output, folders, keys, compute, describe, RUN)


def describe(cell: Cell) -> str:
    """A short name of a cell."""
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
        kind = FINETUNING if cell.learner is not None else PRETRAINING if cell.task == MLM else COTRAINING
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
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="only these kinds of cells, and what they need")
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
        missing = {cell.task for cell in cells} - set(prepared.fingerprints)
        if missing:
            raise ValueError(f"The grid has the tasks {sorted(missing)}, which are not in {str(args.prepared)!r}.")
        grid = grid_of(cells, scale, prepared, args.output)
        done = grid.done()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if args.list:
        for cell, key in grid.keys.items():
            print(f"{key}  {'done' if cell in done else '    '}  {describe(cell)}")
    elif grid.run():
        sys.exit(1)


if __name__ == "__main__":
    main()
