"""Run the cells of a study that have no result yet: `run_glue_ctcd.py`, each in its own folder.

Each adds the scores of its models to `results.jsonl`. Stop it at any time and start it again, also several times with
the same folder to use several processes. A run that fails is named, and the others go on.

Example:
    python -m examples.studies.run examples/studies/choices.yaml --output outputs/choices
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import run_glue_ctcd
from examples.grid.runner import Grid

from . import scoring
from .study import ARGUMENTS, SCORES, VALIDATION, Cell, Study, load_study, record_of


def grid_of(study: Study, cells: Sequence[Cell], output: Path) -> Grid:
    """The grid of a study.

    Raises:
        ValueError: A cell has a result that was computed with other arguments.
    """
    folders = {cell: cell.folder(output) for cell in cells}
    #: The cells whose models others start from; those of the others are removed if the study has test files.
    needed = {other for cell in cells for other in cell.others.values()}

    def compute(cell: Cell) -> dict[str, Any]:
        folder, arguments = folders[cell], cell.all_arguments(output)
        (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2) + "\n")
        run_glue_ctcd.main([str(folder / ARGUMENTS)])  # a new process would spend a tenth of the time on imports
        scores = None
        if "test_file" in arguments:
            scores = scoring.scores_of(cell.task, folder, arguments["test_file"], VALIDATION)
            (folder / SCORES).write_text(json.dumps(scores))
        if scores is not None and cell not in needed:
            for weights in folder.rglob("*.safetensors"):
                weights.unlink()
        return record_of(cell, json.loads((folder / "all_results.json").read_text()), study, scores)

    keys = {cell: str(folder.relative_to(output)) for cell, folder in folders.items()}
    grid = Grid(output, folders, keys, compute, lambda cell: cell.name)
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
    wanted = {
        cell
        for cell in study.cells()
        if cell.tried is None and all(only is None or getattr(cell, name) in only for name, only in asked.items())
    }
    while more := {source for cell in wanted for source in cell.sources} - wanted:
        wanted |= more
    cells = [cell for cell in study.cells() if cell in wanted]
    grid = grid_of(study, cells, args.output)
    failed = grid.run()
    print(f"Scores of all finished cells: {grid.results}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
