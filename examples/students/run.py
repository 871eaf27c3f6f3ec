"""Run the cells of a study that have no result yet: `run_glue_ctcd.py`, each in its own folder.

Each adds the scores of its models to `results.jsonl`. Stop it at any time and start it again, also several times with
the same folder to use several processes. A run that fails is named, and the others go on.

Example:
    python -m examples.students.run examples/students/choices.yaml --output outputs/choices
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import run_glue_ctcd
from examples.grid.runner import Grid

from .study import ARGUMENTS, Cell, Study, load_study, record_of


def grid_of(study: Study, cells: Sequence[Cell], output: Path) -> Grid:
    """The grid of a study.

    Raises:
        ValueError: A cell has a result that was computed with other arguments.
    """
    folders = {cell: cell.folder(output) for cell in cells}

    def compute(cell: Cell) -> dict[str, Any]:
        arguments = folders[cell] / ARGUMENTS
        arguments.write_text(json.dumps(cell.all_arguments(output), indent=2) + "\n")
        run_glue_ctcd.main([str(arguments)])  # not in a new process: its imports would be a tenth of the time
        return record_of(cell, json.loads((folders[cell] / "all_results.json").read_text()), study)

    keys = {cell: str(folder.relative_to(output)) for cell, folder in folders.items()}
    grid = Grid(output, folders, keys, compute, lambda cell: f"{cell.task}, {cell.variant}, seed {cell.seed}")
    for cell in grid.done():
        cell.check_arguments(output)
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are left; returns 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--variants", nargs="+", help="only these variants")
    args = parser.parse_args(argv)
    study = load_study(args.study)
    asked = {"variant": args.variants, "task": args.tasks, "seed": args.seeds}
    cells = [
        cell
        for cell in study.cells()
        if all(only is None or getattr(cell, name) in only for name, only in asked.items())
    ]
    grid = grid_of(study, cells, args.output)
    failed = grid.run()
    print(f"Scores of all finished cells: {grid.results}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
