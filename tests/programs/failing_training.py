"""A training in which one of two processes fails: `torchrun failing_training.py FOLDER label` (or `inf`)."""

import os
import sys
from pathlib import Path

from tiny import tiny_bert, tiny_rows, tiny_trainer
from torch.utils.data import IterableDataset

BAD_ROW = 22


class Rows(IterableDataset):
    """Rows that are not checked beforehand; the second process gets a bad one at its third step."""

    def __init__(self, problem: str, bad: float, folder: Path) -> None:
        self.rows = tiny_rows(64, problem=problem)
        self.folder = folder
        if os.environ["RANK"] == "1":
            self.rows[BAD_ROW]["labels"] = bad

    def __iter__(self):
        for index, row in enumerate(self.rows):
            if index == BAD_ROW:
                (self.folder / "started").touch()
            yield row


def main(folder: str, failure: str) -> None:
    problem, bad = {"label": ("single_label", 7), "inf": ("regression", float("inf"))}[failure]
    trainer = tiny_trainer(
        Path(folder),
        problem=problem,
        model=tiny_bert(2, seed=1, problem=problem),
        student_model=tiny_bert(2, seed=2, problem=problem),
        train_dataset=Rows(problem, bad, Path(folder)),
        max_steps=8,
        logging_steps=2,
        accelerator_config={"dispatch_batches": False},
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
