"""Run the cells of a study that have not ended yet, one after the other: `run_glue_ctcd.py`, each in its own folder.

At the end, the scores of all that is finished are in `results.jsonl`. It may be stopped and started again at any time.
A run that fails is named, and the others go on.

Example:
    python -m examples.students.run examples/students/choices.yaml --output outputs/choices
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from examples import run_glue_ctcd

from .study import ARGUMENTS, Cell, load_study, write_records


def run(cell: Cell, output: Path) -> bool:
    """Run a cell; whether it ended well. It is no process of its own: the imports would be a tenth of the time."""
    folder = cell.folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = folder / ARGUMENTS
    arguments.write_text(json.dumps(cell.all_arguments(output), indent=2) + "\n")
    try:
        run_glue_ctcd.main([str(arguments)])
    except Exception:
        traceback.print_exc()
        return False
    gc.collect()  # the models of a trainer are in cycles
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--variants", nargs="+", help="only these variants")
    args = parser.parse_args(argv)
    study = load_study(args.study)
    asked = (args.variants, args.tasks, args.seeds)
    failed = []
    for cell in study.cells():
        own = (cell.variant, cell.task, cell.seed)
        left_out = any(only is not None and value not in only for value, only in zip(own, asked, strict=True))
        if left_out or cell.finished(args.output) is not None:
            continue
        start = time.perf_counter()
        if not run(cell, args.output):
            failed.append(cell)
        state = "FAILED" if cell in failed else f"{time.perf_counter() - start:.0f} s"
        print(f"{cell.task}, {cell.variant}, seed {cell.seed}: {state}", flush=True)
    print(f"Scores of all that is finished: {write_records(study, args.output)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
