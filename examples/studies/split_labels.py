"""Take the labels from most of the rows of a data set: three files for `run_glue_ctcd.py`.

`labelled.jsonl`, `unlabelled.jsonl` (the texts alone) and `validation.jsonl`, drawn at random with a seed.

Example:
    python -m examples.studies.split_labels nyu-mll/glue sst2 outputs/sst2 --rows 10000 --labelled 0.1
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import load_dataset


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name or folder of a data set with the columns sentence and label")
    parser.add_argument("name", help="its configuration")
    parser.add_argument("output", type=Path, help="the folder of the files")
    parser.add_argument("--rows", type=int, help="number of the training rows that are drawn (default: all)")
    parser.add_argument("--labelled", type=float, default=0.1, help="share of them that keep their labels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    args = parser.parse_args(argv)
    data = load_dataset(args.dataset, args.name)
    train = data["train"].select_columns(["sentence", "label"]).shuffle(seed=args.seed)
    rows = args.rows or len(train)
    kept = round(args.labelled * rows)
    if not 0 < kept < rows <= len(train):
        parser.error(
            f"--rows {rows} and --labelled {args.labelled} are {kept} rows with labels and {rows - kept} without, and "
            f"{args.name} has {len(train)}: there must be some of both, and no more than there are."
        )
    parts = {
        "labelled": train.select(range(kept)),
        "unlabelled": train.select(range(kept, rows)).remove_columns("label"),
        "validation": data["validation"].select_columns(["sentence", "label"]),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for part, selected in parts.items():
        path = args.output / f"{part}.jsonl"
        selected.to_json(path)
        print(f"{path}: {len(selected)} rows")


if __name__ == "__main__":
    main()
