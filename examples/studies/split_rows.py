"""Split a GLUE task into few training rows, held-out rows to choose by, and a large test set.

Writes `train.jsonl`, `validation.jsonl` and `test.jsonl`. The test file holds the rows of three parts, which its
column `part` names: `validation` (the held-out rows once more), `test` (training rows of the task that are in no other
file) and `glue` (the task's own validation set).

Example:
    python -m examples.studies.split_rows nyu-mll/glue sst2 outputs/rows --train 2000 --test 4000 --without_phrases
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from examples.data.glue import TASK_TO_TEXT

from .scoring import PART

#: Rows of a phrase of this many words in common count as the same text.
WORDS = 4


def phrases(text: str) -> set[str]:
    """All phrases of `WORDS` words in a text; the text itself if it is shorter."""
    words = text.lower().split()
    if len(words) < WORDS:
        return {" ".join(words)}
    return {" ".join(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


def without_phrases_of(rows: Dataset, others: Iterable[Dataset], columns: Sequence[str]) -> Dataset:
    """The rows that have no phrase in common with any row of other data sets, which SST-2's rows often have."""
    known = {p for other in others for column in columns for text in other[column] for p in phrases(text)}
    return rows.filter(lambda row: not any(phrases(row[column]) & known for column in columns))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name or folder of a data set in the layout of nyu-mll/glue")
    parser.add_argument("task", choices=sorted(TASK_TO_TEXT), help="the task")
    parser.add_argument("output", type=Path, help="the folder of the tasks; the files go into a folder of the task")
    parser.add_argument("--train", type=int, default=2000, help="number of training rows (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=500, help="number of held-out rows (default: %(default)s)")
    parser.add_argument("--test", type=int, default=4000, help="largest number of test rows (default: %(default)s)")
    parser.add_argument("--without_phrases", action="store_true", help=f"no test row shares {WORDS} words in a row")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    args = parser.parse_args(argv)
    columns = [column for column in TASK_TO_TEXT[args.task] if column is not None]
    data = load_dataset(args.dataset, args.task)
    rows = data["train"].select_columns([*columns, "label"]).shuffle(seed=args.seed)
    used = args.train + args.validation
    if used >= len(rows):
        parser.error(f"--train {args.train} and --validation {args.validation} leave none of {len(rows)} rows.")
    train, held_out = rows.select(range(args.train)), rows.select(range(args.train, used))
    test = rows.select(range(used, len(rows)))
    if args.without_phrases:
        test = without_phrases_of(test, [train, held_out], columns)
    test = test.select(range(min(args.test, len(test))))
    named = {"validation": held_out, "test": test, "glue": data["validation"].select_columns([*columns, "label"])}
    parts = [part.add_column(PART, [name] * len(part)) for name, part in named.items()]
    folder = args.output / args.task
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": train, "validation": held_out, "test": concatenate_datasets(parts)}.items():
        part.to_json(folder / f"{name}.jsonl")
        print(f"{folder / name}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main()
