"""What each head's logits mean: which are compared, at which positions, and what is counted.

A new head is a new class in this file, added to `TASKS`.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from .losses import Bernoulli, Categorical, Family, Point

#: Label of a position that is not scored, the convention of `torch.nn.CrossEntropyLoss` and of transformers.
IGNORE_INDEX = -100


class Task(Protocol):
    """A head: how the outputs of two models with this head are compared, and what their labels must look like."""

    #: The `AutoModelFor...` class that loads a model of this head by name or path.
    auto_model: type

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Raise `ValueError` if the logits of the two models cannot be compared. `role` names the second model."""

    def check_labels(self, labels: np.ndarray) -> None:
        """Raise `ValueError` if a label of the data set does not fit the head."""

    def counted(self, labels: Tensor) -> Tensor:
        """The labels as `num_items_in_batch` counts them: one entry per item, `IGNORE_INDEX` if not scored."""

    def trainable_labels(self, labels: Tensor) -> Tensor:
        """The labels to give to the model, made safe for a batch in which nothing is scored."""

    def soft_loss(self, learner: Any, source: Any, labels: Tensor, name: str, temperature: float) -> Tensor:
        """Mean of a soft loss over the scored positions of a batch; 0-dimensional, 0 if nothing is scored."""

    def agreement(self, first: Any, second: Any, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Per row of the batch, the number of scored positions with the same prediction, and of scored positions."""


class SequenceClassification:
    """One label, several labels or a score for each sequence (`...ForSequenceClassification`).

    The problem type is the one of the config or, as in transformers, follows from the number and the dtype of the
    labels: one output is a regression, integers are single labels, floats are multiple labels.

    Args:
        config: Config of the teacher.
    """

    auto_model = AutoModelForSequenceClassification
    model_names = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())

    def __init__(self, config: PreTrainedConfig) -> None:
        self.num_labels: int = config.num_labels
        self._problem_type: str | None = config.problem_type

    def problem_type(self, integer_labels: bool) -> str:
        """The problem type, as transformers infers it where the config does not say.

        Args:
            integer_labels: Whether the labels are integers.

        Returns:
            `"regression"`, `"single_label_classification"` or `"multi_label_classification"`.
        """
        if self._problem_type is not None:
            return self._problem_type
        if self.num_labels == 1:
            return "regression"
        return "single_label_classification" if integer_labels else "multi_label_classification"

    def _problem_type_of(self, labels: Tensor | None) -> str:
        return self.problem_type(labels is None or not labels.is_floating_point())

    def _family(self, labels: Tensor | None) -> Family:
        families: dict[str, type[Family]] = {
            "regression": Point,
            "single_label_classification": Categorical,
            "multi_label_classification": Bernoulli,
        }
        return families[self._problem_type_of(labels)]()

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Both models must have the same number of labels, with the same meaning, and the same problem type.

        Args:
            teacher: Config of the teacher.
            student: Config of the model that is paired with it.
            role: Name of the argument that gave the second model, for the message.

        Raises:
            ValueError: They differ; the message has both values.
        """
        # Where a config does not say, one output is a regression and several are none (`problem_type`).
        types = [
            config.problem_type or ("regression" if config.num_labels == 1 else None) for config in (teacher, student)
        ]
        same_type = types[0] == types[1] or (None in types and "regression" not in types)
        labels = [own_labels(config) for config in (teacher, student)]
        for name, same in {
            "num_labels": teacher.num_labels == student.num_labels,
            "problem_type": same_type,
            "id2label": None in labels or labels[0] == labels[1],
        }.items():
            ours, theirs = getattr(teacher, name), getattr(student, name)
            if not same:
                raise ValueError(
                    f"`model` has `{name}={ours!r}` and `{role}` has `{name}={theirs!r}`: their predictions cannot be "
                    f"compared. Load both with the same `{name}`, e.g. "
                    f"`AutoModelForSequenceClassification.from_pretrained(..., {name}={ours!r})`."
                )

    def check_labels(self, labels: np.ndarray) -> None:
        """Every label must fit the head.

        Args:
            labels: Labels of a data set, `(rows,)` or `(rows, num_labels)`.

        Raises:
            ValueError: A class index out of range, a multi-label row of another length or with values other than 0
                to 1, a score that is not finite.
        """
        integers = np.issubdtype(labels.dtype, np.integer)
        problem_type = self.problem_type(integers)
        if integers != (problem_type == "single_label_classification") and problem_type != "regression":
            raise ValueError(
                f"The labels are of type {labels.dtype}, and `problem_type={problem_type!r}` needs "
                f"{'floats' if integers else 'integers'}. Convert them, or load both models with another "
                "`problem_type`."
            )
        if problem_type == "single_label_classification":
            wrong = (labels != IGNORE_INDEX) & ~((labels >= 0) & (labels < self.num_labels))
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(
                    f"Label {labels[row]} of row {row} is out of range: the models have `num_labels="
                    f"{self.num_labels}`, so labels go from 0 to {self.num_labels - 1} (or {IGNORE_INDEX} to ignore a "
                    "row). Correct the data or load both models with a larger `num_labels`."
                )
        elif problem_type == "multi_label_classification":
            if labels.ndim != 2 or labels.shape[1] != self.num_labels:
                raise ValueError(
                    f"Multi-label rows must have one value per label: the models have `num_labels={self.num_labels}` "
                    f"and the labels have shape {labels.shape}. Encode each row as {self.num_labels} zeros and ones."
                )
            wrong = ~((labels >= 0) & (labels <= 1)).all(axis=1)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(
                    f"Multi-label row {row} is {labels[row].tolist()}: every value must be from 0 to 1. Encode each "
                    f"row as {self.num_labels} zeros and ones."
                )
        elif not np.isfinite(labels.astype(np.float64)).all():
            row = int(np.argmax(~np.isfinite(labels.astype(np.float64)).reshape(len(labels), -1).all(axis=1)))
            raise ValueError(f"The score of row {row} is {labels[row]}: scores must be finite numbers. Drop the row.")

    def counted(self, labels: Tensor) -> Tensor:
        """Every label counts, except ignored ones of single-label classification.

        A score of -100.0 is a score: only integer labels can be ignored.
        """
        if self._problem_type_of(labels) == "single_label_classification":
            return labels
        return torch.zeros_like(labels, dtype=torch.long)

    def trainable_labels(self, labels: Tensor) -> Tensor:
        """The labels, or class 0 for every row if all rows are ignored.

        The mean cross-entropy over no rows is NaN, and so are its gradients even when it is multiplied by 0. The loss
        of such a batch is counted with weight 0, so it may as well be finite.
        """
        if self._problem_type_of(labels) != "single_label_classification":
            return labels
        return labels.masked_fill(labels.eq(IGNORE_INDEX).all(), 0)

    def _scored(self, labels: Tensor) -> Tensor:
        """Which rows are scored, bool `(rows,)`."""
        counted = self.counted(labels).ne(IGNORE_INDEX)
        return counted.reshape(counted.shape[0], -1).any(-1)

    def soft_loss(self, learner: Any, source: Any, labels: Tensor, name: str, temperature: float) -> Tensor:
        """Mean over the scored rows of the comparison of the logits.

        Single label: divergence of the two distributions over the classes. Multi-label: sum of the per-label
        divergences. Regression: squared error between the predictions.

        Args:
            learner: Output of the model that is trained, with `logits` `(rows, num_labels)`.
            source: Output of the model it learns from; it is detached here.
            labels: `(rows,)` or `(rows, num_labels)`.
            name: A key of `SOFT_LOSSES`.
            temperature: Temperature of the comparison.
        """
        values = self._family(labels).soft_loss(learner["logits"], source["logits"].detach(), name, temperature)
        scored = self._scored(labels)
        return torch.where(scored, values, 0.0).sum() / scored.sum().clamp(min=1)

    def agreement(self, first: Any, second: Any, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """How often two models predict the same class (per label for multi-label).

        Returns:
            Two float tensors `(rows,)`: equal predictions and scored positions of each row; `None` for regression.
        """
        same = self._family(labels).same(first["logits"], second["logits"])
        if same is None:
            return None
        same = same.reshape(same.shape[0], -1).float()
        scored = torch.ones_like(same)
        if labels is not None:
            scored *= self._scored(labels).unsqueeze(-1)
        return (same * scored).sum(-1), scored.sum(-1)


#: The heads that are recognised, in the order in which they are tried.
TASKS: tuple[type, ...] = (SequenceClassification,)


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT (told by what it has, so that PEFT need not be imported)."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, or the one inside a PEFT wrapper."""
    return model.get_base_model() if is_peft_model(model) else model


def own_labels(config: PreTrainedConfig) -> list[str] | None:
    """Names of the labels in the order of the outputs; `None` if they are the default ones, which mean nothing."""
    names = [config.id2label[index] for index in sorted(config.id2label)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def find_task(model: PreTrainedModel, argument: str = "model") -> Task:
    """Recognise the head of a model by its class (or a class it inherits from).

    Args:
        model: A model with a head, PEFT-wrapped or not.
        argument: Name of the argument that gave it, for the message.

    Raises:
        ValueError: The head is not supported.
    """
    names = [cls.__name__ for cls in type(base_model(model)).__mro__]
    for task in TASKS:
        if task.model_names.intersection(names) and hasattr(model, "config"):
            return task(model.config)
    supported = ", ".join(task.auto_model.__name__ for task in TASKS)
    raise ValueError(
        f"`{argument}` is a {names[0]}, a head that cannot be co-distilled. Supported: the models that "
        f"{supported} loads, and subclasses of them."
    )
