"""Prepared data: token ids and labels in safetensors files, and the rows that a training takes from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from .cells import MLM, Cell
from .settings import Scale

MANIFEST = "manifest.json"
#: Parts of a task: for training, for choosing settings (taken from the training set), and for the results.
PARTS = ("train", "dev", "validation")


class Rows(Dataset):
    """The rows of one part of a prepared file, without the padding that they have on disk.

    Args:
        tensors: `input_ids` `(rows, tokens)`, optionally `token_type_ids` of this shape, `lengths` and `labels`
            `(rows,)` (or `(rows, tokens)`).
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.lengths = tensors["lengths"].tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self.lengths[index]
        row = {name: values[index] for name, values in self.tensors.items() if name != "lengths"}
        row = {name: value[:length].long() if value.ndim else value for name, value in row.items()}
        return row | {"attention_mask": torch.ones(length, dtype=torch.long)}


@dataclass(frozen=True)
class Masking:
    """Masks tokens as BERT does: 15 % are scored. Of these 80 % are masked, 10 % random and 10 % kept.

    The same seed and number give the same masks, whatever else draws random numbers: all methods see equal data.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, row: Mapping[str, Tensor], seed: int, number: int) -> dict[str, Tensor]:
        """A row with masks and with labels at the masked tokens, as the `number`-th row that this seed sees."""
        masker = DataCollatorForLanguageModeling(self.tokenizer)
        masker.generator = torch.Generator().manual_seed((seed << 40) + number)
        ids, labels = masker.torch_mask_tokens(row["input_ids"][None].clone())
        return {**row, "input_ids": ids[0], "labels": labels[0]}


class Schedule(Dataset):
    """Every row that a training will see, in order: pass after pass, each shuffled by the seed, in whole batches.

    It is read in sequence, so a resumed training continues with the next row.

    Args:
        rows: The rows.
        cell: The training.
        masking: Masks each row anew each time it is seen; `None` for labelled rows.
    """

    def __init__(self, rows: Rows, cell: Cell, masking: Masking | None = None) -> None:
        self.rows, self.masking, self.seed = rows, masking, cell.seed
        count = len(rows) if cell.rows is None else cell.rows
        if count > len(rows):
            raise ValueError(f"`rows: {count}` of {cell.task}, but only {len(rows)} are prepared. Prepare more.")
        make = torch.Generator().manual_seed(cell.seed)
        wanted = cell.num_steps(len(rows)) * cell.batch_size
        lengths = rows.lengths[:count]
        self.order: list[int] = []
        while len(self.order) < wanted:
            # Rows of similar length share a batch, which saves padding; batches are in random order.
            indices = get_length_grouped_indices(lengths, cell.batch_size, generator=make)
            batches = [indices[start : start + cell.batch_size] for start in range(0, count, cell.batch_size)]
            if len(batches) > 1 and len(batches[-1]) < cell.batch_size:
                batches.pop()  # different rows in each pass; a short batch would shift the batches after it
            for place in torch.randperm(len(batches), generator=make).tolist():
                self.order += batches[place]
        del self.order[wanted:]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[self.order[index]]
        return row if self.masking is None else self.masking(row, self.seed, index)


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded to its longest row; padding gets the id 0, no attention and no label."""
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        fill = -100 if name == "labels" else 0
        batch[name] = (
            pad_sequence(values, batch_first=True, padding_value=fill) if values[0].ndim else torch.stack(values)
        )
    return batch


@dataclass(frozen=True)
class Prepared:
    """A folder that `prepare.py` has written, with everything that trainings need.

    Attributes:
        folder: The folder.
        manifest: `fingerprints` of the files, and the settings that they were made with.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        """Open a folder.

        Raises:
            FileNotFoundError: The folder was not prepared, or not to the end.
        """
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {MANIFEST}: it was not prepared, or not to the end. Run "
                f"`python -m examples.paper.prepare --output {folder}` first."
            )
        return cls(folder, json.loads((folder / MANIFEST).read_text()))

    def check(self, scale: Scale) -> None:
        """Check that the folder was prepared for a scale; the sources of text and models may differ.

        Raises:
            ValueError: A setting differs.
        """
        now, then = asdict(scale), self.manifest["settings"]
        for name in ("block_length", "train_blocks", "score_blocks", "dev_share", "tasks"):
            self._same(name, now[name], then[name])
        for name in ("teacher", "student", "vocab_size"):
            self._same(f"models: {name}", now["models"][name], then["models"][name])

    def _same(self, name: str, now: Any, then: Any) -> None:
        if now != then:
            raise ValueError(
                f"{str(self.folder)!r} was prepared with `{name}: {then}`, and the YAML file has `{name}: {now}`. "
                "Prepare again, in another folder."
            )

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of the data of each task and of the `models`."""
        return self.manifest["fingerprints"]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def parts(self, task: str) -> dict[str, Rows]:
        """The rows of a task, by part.

        Raises:
            ValueError: The task was not prepared.
        """
        path = self.folder / f"{task}.safetensors"
        if not path.exists():
            raise ValueError(f"The task {task!r} was not prepared in {str(self.folder)!r}: there is no {path.name}.")
        tensors = load_file(path)
        return {
            part: Rows({name.split(".")[1]: value for name, value in tensors.items() if name.startswith(f"{part}.")})
            for part in PARTS
        }

    def label_settings(self, task: str) -> dict[str, Any]:
        """Settings of a model's config for the labels of a task; empty for masked language modelling."""
        if task == MLM:
            return {}
        with safe_open(self.folder / f"{task}.safetensors", "pt") as file:
            return json.loads(file.metadata()["labels"])
