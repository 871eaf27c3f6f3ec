"""Sequence classification data in the manner of GLUE: rows, labels, tokens and metrics."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedTokenizerBase

from ctcd_trainer.tasks.labels import IGNORE_INDEX, own_labels

from .loading import first_rows, split_of
from .metrics import GLUE_SCORES, f1, glue_scores

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
#: The label of the rows of GLUE's unlabelled test sets.
UNLABELLED = -1


# ---- Selecting ----


def splits_of(task: str | None, split: str) -> dict[str, str]:
    """The parts of a split, by the name of their results: MNLI has two parts for validation and test.

    Returns:
        Names in the data set by name of the result, e.g. `{"mnli": "test_matched", "mnli-mm": "test_mismatched"}`.
    """
    if task == "mnli" and split != "train":
        return {"mnli": f"{split}_matched", "mnli-mm": f"{split}_mismatched"}
    return {task or "": split}


def select_rows(raw: DatasetDict, task: str | None, limits: Mapping[str, int | None]) -> dict[str, dict[str, Dataset]]:
    """The rows that a run needs.

    Args:
        raw: All splits.
        task: Name of the GLUE task, if it is one.
        limits: Number of the first rows to take, `None` for all, by split (`train`, `validation`, `test`).

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


def named_label(raw: DatasetDict, column: str | None) -> DatasetDict:
    """The splits with the label column of `--label_column_name` under the name `label`.

    Raises:
        ValueError: No split has this column.
    """
    if column in (None, LABEL):
        return raw
    if not any(column in rows.column_names for rows in raw.values()):
        known = next(iter(raw.values())).column_names
        raise ValueError(f"`--label_column_name {column}` is not a column of the data: give one of {known}.")
    for split, rows in raw.items():
        if column in rows.column_names:
            others = [name for name in rows.column_names if name == LABEL]
            raw[split] = rows.remove_columns(others).rename_column(column, LABEL)
    return raw


def text_columns(dataset: Dataset, task: str | None, given: str | None = None) -> tuple[str, ...]:
    """The one or two columns of text: the given, else the task's, else `sentence1` and `sentence2`, else the first.

    Args:
        dataset: The rows.
        task: Name of the GLUE task, if it is one.
        given: `--text_column_names`: one name, or two with a comma between.

    Raises:
        ValueError: There is no such column.
    """
    if given is not None:
        names = tuple(given.split(","))
        missing = [name for name in names if name not in dataset.column_names]
        if missing or len(names) > 2:
            raise ValueError(
                f"`--text_column_names {given}`: give one or two columns of the data, whose columns are "
                f"{dataset.column_names}."
            )
        return names
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
    """The meaning of the labels of a data set, and their place in the models' outputs.

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
        """Read the labels off a data set.

        Floats are scores (regression), lists are several labels a row, anything else is one label a row.

        Args:
            dataset: The training set.
            task: Name of the GLUE task, if it is one.

        Raises:
            ValueError: There is no label column, a row has no label, there are fewer than two labels, or rows of zeros
                and ones differ in length.
        """
        if LABEL not in dataset.column_names:
            raise ValueError(
                f"The training data has no column {LABEL!r}, only {dataset.column_names}. Rename it, or give "
                "`--label_column_name`."
            )
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
        """Tell whether a config names the same labels, in any order and case; `None` if it names none."""
        known = _named_labels(config)
        if self.problem_type == "regression" or known is None:
            return None
        return sorted(known) == sorted(name.lower() for name in self.names)

    def ordered_as(self, config: PreTrainedConfig) -> "Labels":
        """These labels in the order of a model that was trained on them, if its config names the same ones."""
        if not self.fits(config):
            return self
        names = {name.lower(): name for name in self.names}
        return replace(self, names=tuple(names[name] for name in _named_labels(config)))

    def same_order(self, config: PreTrainedConfig) -> bool:
        """Tell whether the outputs of a model mean these labels in this order; true if its config names none."""
        known = _named_labels(config)
        return known is None or known == [name.lower() for name in self.names]

    @property
    def absent(self) -> Any:
        """The label of a row without one."""
        if self.problem_type == "single_label_classification":
            return IGNORE_INDEX
        return math.nan if self.problem_type == "regression" else [math.nan] * len(self.names)

    def encode(self, values: Sequence[Any]) -> list[Any]:
        """The labels as the models take them: indices, floats, or rows of zeros and ones.

        Raises:
            ValueError: A label does not occur in the training data.
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
        """Predictions of logits `(rows, outputs)`: scores or indices `(rows,)`, or zeros and ones `(rows, outputs)`.

        If the outputs are a tuple, its first entry is the logits.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        if self.problem_type == "regression":
            return logits[:, 0]
        if self.problem_type == "single_label_classification":
            return logits.argmax(axis=1)
        return (logits > 0).astype(np.int64)

    def in_data_order(self, indices: np.ndarray) -> np.ndarray:
        """Single labels as indices into the data set's order, so that an F1 keeps its positive class."""
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
    names = own_labels(config)
    return None if names is None else [name.lower() for name in names]


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
    """Turns a batch of rows into tokens and labels, for `Dataset.map(..., batched=True)`.

    Attributes:
        tokenizer: The tokenizer.
        columns: The one or two columns of text. An empty cell of a CSV file is empty text.
        labels: The labels.
        max_length: Number of tokens at which rows are cut.
        pad: Whether to fill every row up to `max_length`.
        labelled: Whether to use the labels of the rows, if there are any; otherwise the rows count as unlabelled.
        student_tokenizer: The student's tokenizer, if it differs; the names of its columns begin with `student_`.
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


# ---- Metrics ----


class GlueMetric(evaluate.Metric):
    """The metric of one GLUE task, with the keys of `evaluate.load("glue", task)`; see `metrics.glue_scores`.

    It fetches nothing, and in a single process it writes nothing: several instances and processes can compute at the
    same time.

    Args:
        config_name: Name of the task.
        keep_in_memory: Whether predictions are kept in memory instead of in a cache file. Default: unless
            `num_process` is above 1, where `evaluate` needs files.
        num_process: As in `evaluate.Metric`; stays 1 with Trainer, which gathers the predictions itself.
        **kwargs: The other arguments of `evaluate.Metric`.

    Raises:
        KeyError: The task is unknown; the message has the valid names.

    Example:
        >>> GlueMetric("rte").compute(predictions=[0, 1], references=[0, 0])
        {'accuracy': 0.5}
    """

    def __init__(
        self, config_name: str, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs: Any
    ) -> None:
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        super().__init__(config_name, keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in GLUE_SCORES:
            raise KeyError(f"Unknown GLUE task {self.config_name!r}. Valid names: {', '.join(sorted(GLUE_SCORES))}.")
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The metric of a task of the GLUE benchmark.",
            citation="",
            inputs_description="predictions and references: class indices, or scores for stsb.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return glue_scores(self.config_name, np.asarray(predictions), np.asarray(references))


def metrics_for(labels: Labels, task: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return GLUE's metrics for a task (with `combined_score`, their mean, if there are two).

    Without a task, they depend on the labels:

    - scores: the mean squared error (`mse`);
    - classes: the `accuracy`;
    - several labels a row: the share of rows without an error (`accuracy`), and the F1 over all labels (`f1_micro`).
    """
    glue = GlueMetric(task) if task is not None else None

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = labels.in_data_order(labels.predictions(prediction.predictions))
        references = labels.in_data_order(prediction.label_ids)
        if glue is not None:
            metrics = glue.compute(predictions=predicted, references=references)
            return metrics | ({"combined_score": float(np.mean(list(metrics.values())))} if len(metrics) > 1 else {})
        if labels.problem_type == "regression":
            return {"mse": float(np.square(predicted - references).mean())}
        if labels.problem_type == "single_label_classification":
            return {"accuracy": float((predicted == references).mean())}
        return {"accuracy": float((predicted == references).all(axis=1).mean()), "f1_micro": f1(predicted, references)}

    return compute_metrics
