"""Sequence classification data in the manner of GLUE: its parts, what its labels mean, and its tokens."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctcd_trainer.tasks.labels import IGNORE_INDEX
from examples.common.run import first_rows, split_of

#: The GLUE tasks and their columns of text.
TASK_TO_TEXT: Mapping[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
LABEL = "label"
#: What GLUE's unlabelled test sets have as label.
UNLABELLED = -1


# ---- Selecting ----


def splits_of(task: str | None, split: str) -> dict[str, str]:
    """The parts of a split, by the name that results get: MNLI has two for validation and test.

    Returns:
        Names in the data set by name of the result, e.g. `{"mnli": "test_matched", "mnli-mm": "test_mismatched"}`.
    """
    if task == "mnli" and split != "train":
        return {"mnli": f"{split}_matched", "mnli-mm": f"{split}_mismatched"}
    return {task or "": split}


def select_rows(raw: DatasetDict, task: str | None, limits: Mapping[str, int | None]) -> dict[str, dict[str, Dataset]]:
    """The rows that are wanted.

    Args:
        raw: All splits.
        task: Name of the GLUE task, if it is one.
        limits: The splits that are wanted (`train`, `validation`, `test`), with the number of their first rows to
            take, `None` for all.

    Returns:
        By split and by name of the result (see `splits_of`). The test sets have no labels.

    Raises:
        ValueError: A split is missing.
    """
    selected: dict[str, dict[str, Dataset]] = {}
    for split, limit in limits.items():
        selected[split] = {}
        for result, name in splits_of(task, split).items():
            rows = first_rows(split_of(raw, split, name), limit)
            if split == "test" and LABEL in rows.column_names:
                rows = rows.remove_columns(LABEL)
            selected[split][result] = rows
    return selected


def text_columns(dataset: Dataset, task: str | None) -> tuple[str, ...]:
    """The one or two columns of text: the task's; or `sentence1` and `sentence2`; or the first two, or the only one.

    Raises:
        ValueError: There is none, or the task's are not there.
    """
    if task is not None:
        missing = [name for name in TASK_TO_TEXT[task] if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The data has no column {missing[0]!r}, which `--task_name {task}` reads. Its columns are "
                f"{dataset.column_names}. Rename it, or leave out `--task_name`."
            )
        return TASK_TO_TEXT[task]
    names = [
        name
        for name, feature in dataset.features.items()
        if name != LABEL and getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if not names:
        raise ValueError(f"The data has no column of text besides {LABEL!r}, only {dataset.column_names}.")
    return ("sentence1", "sentence2") if {"sentence1", "sentence2"} <= set(names) else tuple(names[:2])


# ---- Labels ----


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set mean, and their place in the models' outputs.

    Attributes:
        problem_type: As in the config of a model.
        names: Names of the labels in the order of the models' outputs.
        data_names: The same names in the order of the data set, in which metrics are computed.
        indexed: Whether the data holds indices into `data_names` (a `ClassLabel`) instead of the labels themselves.
        multi_hot: Whether multi-label rows are zeros and ones instead of lists of labels.
    """

    problem_type: str
    names: tuple[str, ...]
    data_names: tuple[str, ...]
    indexed: bool = False
    multi_hot: bool = False

    @classmethod
    def of(cls, dataset: Dataset, task: str | None = None) -> "Labels":
        """Find out what the labels of a data set are.

        Floats are scores (regression), lists are several labels per row, anything else is one label per row.

        Args:
            dataset: The training set.
            task: Name of the GLUE task, if it is one.

        Raises:
            ValueError: There is no label column, a row has no label, there are fewer than two labels, or rows of zeros
                and ones differ in length.
        """
        if LABEL not in dataset.column_names:
            raise ValueError(f"The training data has no column {LABEL!r}, only {dataset.column_names}. Rename it.")
        feature = dataset.features[LABEL]
        _check_no_gaps(dataset)
        if task == "stsb" or getattr(feature, "dtype", "").startswith("float"):
            return cls("regression", ("LABEL_0",), ("LABEL_0",))
        item = getattr(feature, "feature", None)  # of a list
        problem_type = "single_label_classification" if item is None else "multi_label_classification"
        if isinstance(item or feature, ClassLabel):
            names = tuple((item or feature).names)
            return cls(problem_type, names, names, indexed=True)
        if item is None:
            values = dataset.unique(LABEL)
        elif item.dtype == "string":
            values = list({name for row in dataset[LABEL] for name in row})
        else:
            names = _names_of_multi_hot(dataset[LABEL])
            return cls(problem_type, names, names, multi_hot=True)
        names = tuple(str(value) for value in sorted(values))
        if len(names) < 2 and item is None:
            raise ValueError(f"Classification needs two labels or more, and the training data has only {list(names)}.")
        return cls(problem_type, names, names)

    @property
    def for_config(self) -> dict[str, Any]:
        """The settings of a model's config that describe these labels."""
        return {
            "problem_type": self.problem_type,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }

    def fits(self, config: PreTrainedConfig) -> bool | None:
        """Whether a config names the same labels, in whatever order and case; `None` if it names none."""
        own = _named_labels(config)
        if self.problem_type == "regression" or own is None:
            return None
        return sorted(own) == sorted(name.lower() for name in self.names)

    def ordered_as(self, config: PreTrainedConfig) -> "Labels":
        """These labels in the order of a model that was trained on them, if its config names the same ones."""
        if not self.fits(config):
            return self
        names = {name.lower(): name for name in self.names}
        return replace(self, names=tuple(names[name] for name in _named_labels(config)))

    def same_order(self, config: PreTrainedConfig) -> bool:
        """Whether the outputs of a model mean these labels in this order, so far as its config tells."""
        own = _named_labels(config)
        return own is None or own == [name.lower() for name in self.names]

    @property
    def absent(self) -> Any:
        """What a row without a label has in its place."""
        if self.problem_type == "single_label_classification":
            return IGNORE_INDEX
        return math.nan if self.problem_type == "regression" else [math.nan] * len(self.names)

    def encode(self, values: Sequence[Any]) -> list[Any]:
        """The labels as the models take them: indices, floats, or rows of zeros and ones.

        Raises:
            ValueError: A label that the training data has not.
        """
        if self.problem_type == "regression":
            return [float(value) for value in values]
        if self.problem_type == "single_label_classification":
            return [self._index(value) for value in values]
        if self.multi_hot:
            return [[float(value) for value in row] for row in values]
        indices = [{self._index(value) for value in row} for row in values]
        return [[float(index in row) for index in range(len(self.names))] for row in indices]

    def _index(self, value: Any) -> int:
        if self.indexed and value == UNLABELLED:
            return UNLABELLED
        name = self.data_names[value] if self.indexed else str(value)
        if name not in self.names:
            raise ValueError(f"Label {name!r} does not occur in the training data, whose labels are {self.names}.")
        return self.names.index(name)

    def predictions(self, logits: np.ndarray | tuple) -> np.ndarray:
        """What logits `(rows, outputs)` predict: scores or indices `(rows,)`, or zeros and ones `(rows, outputs)`.

        Of a tuple of outputs the first one is the logits.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        if self.problem_type == "regression":
            return logits[:, 0]
        if self.problem_type == "single_label_classification":
            return logits.argmax(axis=1)
        return (logits > 0).astype(np.int64)

    def in_data_order(self, indices: np.ndarray) -> np.ndarray:
        """Single labels as indices into the data set's own order: the positive class of an F1 stays what it is."""
        if self.problem_type != "single_label_classification":
            return indices
        return np.array([self.data_names.index(name) for name in self.names])[indices]

    def format(self, prediction: Any) -> str:
        """A prediction for people to read: the name of the label, its names with commas, or the score."""
        if self.problem_type == "regression":
            return f"{prediction:.3f}"
        if self.problem_type == "single_label_classification":
            return self.names[prediction]
        return ",".join(name for name, present in zip(self.names, prediction, strict=True) if present)


def _named_labels(config: PreTrainedConfig) -> list[str] | None:
    """Labels of a config in the order of its outputs and in lower case; `None` if they are the default ones."""
    names = [config.id2label[index].lower() for index in sorted(config.id2label)]
    return None if names == [f"label_{index}" for index in range(len(names))] else names


def _check_no_gaps(dataset: Dataset) -> None:
    labels = dataset.select_columns(LABEL).with_format("arrow")[:][LABEL]
    gaps = np.concatenate([chunk.is_null().to_numpy(zero_copy_only=False) for chunk in labels.chunks])
    if gaps.any():
        raise ValueError(f"Row {int(gaps.argmax())} of the training data has no label. Fill it in or drop the row.")


def _names_of_multi_hot(rows: Iterable[Sequence[float]]) -> tuple[str, ...]:
    length = None
    for index, row in enumerate(rows):
        length = len(row) if length is None else length
        if len(row) != length or not set(row) <= {0, 1}:
            raise ValueError(
                f"Row {index} of the training data has the labels {row}: lists of numbers must be zeros and ones, "
                f"one for each label ({length} in row 0). Otherwise give lists of names."
            )
    return tuple(f"LABEL_{index}" for index in range(length or 0))


# ---- Tokens ----


@dataclass(frozen=True)
class Preprocessor:
    """Turns a batch of rows into tokens and labels, to be used with `Dataset.map(..., batched=True)`.

    Attributes:
        tokenizer: The tokenizer.
        columns: The one or two columns of text. An empty cell of a CSV file is empty text.
        labels: What the labels mean.
        max_length: Number of tokens at which rows are cut.
        pad: Whether to fill every row up to `max_length`.
        labelled: Whether the labels of the rows are used, if they have any; otherwise they get none to learn from.
        student_tokenizer: The student's, if it is another one; its tokens get names that begin with `student_`.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: tuple[str, ...]
    labels: Labels
    max_length: int
    pad: bool
    labelled: bool = True
    student_tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokens of the rows, and `labels` if they have any."""
        texts = [[text or "" for text in rows[column]] for column in self.columns]
        result: dict[str, list[Any]] = {}
        for prefix, tokenizer in (("", self.tokenizer), ("student_", self.student_tokenizer)):
            if tokenizer is not None:
                padding = "max_length" if self.pad else False
                tokens = tokenizer(*texts, padding=padding, max_length=self.max_length, truncation=True)
                result |= {f"{prefix}{name}": values for name, values in tokens.items()}
        if not self.labelled:
            result["labels"] = [self.labels.absent] * len(result["input_ids"])
        elif LABEL in rows:
            result["labels"] = self.labels.encode(rows[LABEL])
        return result
