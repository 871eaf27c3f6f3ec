"""`Task`: the meaning of a head's logits, the positions that are compared, and the items that are counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from ..soft_losses import Categorical, Family
from .labels import IGNORE_INDEX, label_array, own_labels


def model_names_of(mapping: str) -> frozenset[str]:
    """Return the class names of the models that an `AutoModelFor...` class can load."""
    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    return frozenset(name for entry in names for name in ((entry,) if isinstance(entry, str) else entry))


@dataclass(frozen=True)
class Compared:
    """Logits `(*positions, outcomes)` that stand for the outputs of a model."""

    logits: Tensor


class Task:
    """A head: the comparison of two models with this head, and the requirements on their labels.

    By default: one of several classes at each position, and labels of the shape of the positions. `config` is the one
    of the teacher.
    """

    #: Name of the task, which the trainer takes as the argument `task`.
    name: ClassVar[str]
    #: The Hub's name of the task, for model cards; `None` if the Hub has none.
    pipeline_tag: ClassVar[str | None] = None
    #: The `AutoModelFor...` class that loads a model of this head by name or path.
    auto_model: ClassVar[type]
    #: Names of the model classes that have this head.
    model_names: ClassVar[frozenset[str]]
    #: The inputs that are labels.
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    #: The inputs that have a value for each token of the attention mask.
    token_inputs: ClassVar[tuple[str, ...]] = (
        *("attention_mask", "input_ids", "inputs_embeds", "token_type_ids", "position_ids"),
        *("input_values", "input_features"),
    )
    #: The inputs that have a value for each label of an encoder-decoder; a position does not see later ones.
    decoder_token_inputs: ClassVar[tuple[str, ...]] = (
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    )
    #: True if the classes are the tokens of a vocabulary.
    language_model: ClassVar[bool] = False
    #: True if the models shift the labels, so that a position predicts the next label.
    shifts_labels: ClassVar[bool] = False
    #: The outputs that `compared` reads.
    compared_outputs: ClassVar[tuple[str, ...]] = ("logits",)
    #: True if these outputs have a value per token, and so a length that depends on the padding; `None` if unknown.
    per_token: ClassVar[bool | None] = None
    #: True if a row is one item, so that a row without a label can still be compared.
    per_row: ClassVar[bool] = False

    def __init__(self, config: PreTrainedConfig | None) -> None:
        self.num_labels: int = getattr(config, "num_labels", 0)

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """Tell whether a model with a class of `model_names` has this head."""
        return True

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Refuse models whose labels differ in number or meaning.

        Raises:
            ValueError: The labels differ; `role` is the name of the second model in the message.
        """
        for name, same in self._same_settings(teacher, student).items():
            if not same:
                ours, theirs = getattr(teacher, name), getattr(student, name)
                raise ValueError(
                    f"`model` has `{name}={ours!r}` and `{role}` has `{name}={theirs!r}`: their predictions cannot be "
                    f"compared. Load both with `{self.auto_model.__name__}.from_pretrained(..., {name}={ours!r})`."
                )

    def _same_settings(self, teacher: PreTrainedConfig, student: PreTrainedConfig) -> dict[str, bool]:
        """Tell which settings of the configs agree, the most telling one first."""
        labels = [own_labels(config) for config in (teacher, student)]
        same_labels = None in labels or labels[0] == labels[1]
        return {"num_labels": teacher.num_labels == student.num_labels, "id2label": same_labels}

    def unlabelled_rows(self, rows: Sequence[Any]) -> np.ndarray:
        """Mark the rows of a data set without a label (`IGNORE_INDEX`): bool `(rows,)`."""
        return np.asarray([np.all(np.asarray(label) == IGNORE_INDEX) for label in rows])

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Refuse labels of a data set, a number or a list of numbers for each row, that are no index of a class.

        Raises:
            ValueError: A label does not fit the head; the message has the row and the value.
        """
        for row, values in enumerate(rows):
            self._check_classes(label_array([values], row), row)

    def _check_classes(self, labels: np.ndarray, first_row: int = 0) -> None:
        """Raise `ValueError` if an entry of `(rows, ...)` is neither a class nor ignored."""
        known = self.num_labels or np.inf  # of a module without a config, the number is unknown
        wrong = (labels != IGNORE_INDEX) & ~((labels >= 0) & (labels < known))
        if wrong.any():
            position = tuple(np.argwhere(wrong)[0])
            raise ValueError(
                f"Label {labels[position]} of row {first_row + position[0]} is out of range: `num_labels="
                f"{self.num_labels}` of the models allows 0 to {self.num_labels - 1}, and {IGNORE_INDEX} to ignore "
                "one. Correct the data, or load both models with a larger `num_labels`."
            )

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the label of each predicted position, `IGNORE_INDEX` where it is not scored.

        Raises:
            ValueError: The batch has no labels.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"The batch has no `labels`, only {sorted(inputs)}. Name the label column 'label' or 'labels', or "
                "make them in the `data_collator`."
            )
        return inputs["labels"]

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the targets to count: one entry per item of `num_items_in_batch`, `IGNORE_INDEX` if not scored."""
        return self.targets(inputs)

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the labels for the models, or class 0 everywhere if nothing is scored.

        The mean cross-entropy over nothing is NaN, and 0 times NaN is NaN. The loss of such a batch has weight 0, so
        any finite value will do.
        """
        labels = {name: inputs[name] for name in self.label_names if name in inputs}
        nothing = self.counted(inputs).eq(IGNORE_INDEX).all() if labels else None
        return {name: value.masked_fill(nothing, 0) for name, value in labels.items()}

    def needs_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Tell whether a model predicts only if it gets the labels."""
        return False

    def unlabelled(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs without labels, from which a model makes the same predictions."""
        return {name: value for name, value in inputs.items() if name not in self.label_names}

    def named(self, outputs: Any) -> Mapping[str, Any]:
        """Return outputs by name; a tuple holds the loss, if there is one, and then the compared outputs."""
        if isinstance(outputs, Mapping):
            return outputs
        parts = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        names = ("loss", *self.compared_outputs) if _is_loss(parts[0]) else self.compared_outputs
        return dict(zip(names, parts, strict=False))

    def with_loss(self, outputs: Any, loss: Tensor) -> Any:
        """Return outputs with another loss, in the form in which the model returned them."""
        if isinstance(outputs, Mapping):
            outputs["loss"] = loss
            return outputs
        parts = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        return (loss, *parts[_is_loss(parts[0]) :])

    def compared(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits to compare, `(*positions, outcomes)`."""
        return outputs["logits"]

    def compared_logits(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits to compare of whole outputs in any form, or of what stands for them."""
        return outputs.logits if isinstance(outputs, Compared) else self.compared(self.named(outputs), inputs)

    def scored(self, inputs: Mapping[str, Any]) -> Tensor:
        """Mark the compared positions that are scored: bool `(rows, *positions)`."""
        return self.targets(inputs).ne(IGNORE_INDEX)

    def distilled(self, inputs: Mapping[str, Any]) -> Tensor:
        """Mark the positions that the soft losses compare: the scored positions, or all rows if `per_row`."""
        scored = self.scored(inputs)
        return torch.ones_like(scored) if self.per_row else scored

    def labelled(self, inputs: Mapping[str, Any]) -> Tensor:
        """Mark the positions that have a label: bool, of the shape of `distilled`."""
        scored = self.scored(inputs)
        return scored.flatten(1).any(-1) if self.per_row and scored.ndim > 1 else scored

    def labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the labels of the compared logits, as `Family.nll` takes them."""
        targets = self.targets(inputs)
        return targets if set(self.label_names) <= inputs.keys() else torch.full_like(targets, IGNORE_INDEX)

    @property
    def predicts_numbers(self) -> bool:
        """Tell whether the outputs are numbers."""
        return False

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """Return the meaning of the compared logits."""
        return Categorical()

    def hard_loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the mean of the model's loss over the labelled items; `None` if the model has computed none."""
        return outputs.get("loss")

    def soft_loss(
        self,
        learner: Any,
        source: Any,
        inputs: Mapping[str, Any],
        name: str,
        temperature: float,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean of a soft loss (`name` in `SOFT_LOSSES`) over the compared positions of a batch.

        The arguments `learner` and `source` are whole outputs; those of the source are detached here. The loss of each
        position is multiplied by its factor. The result is 0 if nothing is compared.

        Raises:
            ValueError: The logits of the two models differ in shape, or do not fit the labels.
        """
        ours, theirs = self._comparable(learner, source, inputs)
        values = self.family(inputs).soft_loss(ours, theirs.detach(), name, temperature)
        self._check_positions(ours, values, inputs)
        return self.mean_compared(values if factors is None else values * factors, inputs)

    def _comparable(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the logits of two models to compare; raise `ValueError` if their shapes differ."""
        logits = [self.compared_logits(outputs, inputs) for outputs in (first, second)]
        shapes = [tuple(each.shape) for each in logits]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The logits of two models have the shapes {shapes[0]} and {shapes[1]}, which cannot be compared. "
                "Give both models the same number of outputs."
            )
        return logits

    def _check_positions(self, logits: Tensor, values: Tensor, inputs: Mapping[str, Any]) -> None:
        """Raise `ValueError` if the labels score other positions than those that were compared."""
        shape = tuple(self.distilled(inputs).shape)
        if shape != values.shape:
            raise ValueError(
                f"The labels score positions of the shape {shape}, and logits of the shape {tuple(logits.shape)} need "
                f"{tuple(values.shape)}. Give {' and '.join(f'`{label}`' for label in self.label_names)} that shape."
            )

    def mean_compared(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean of the values of the compared positions, 0 if there are none."""
        compared = self.distilled(inputs)
        return torch.where(compared, values, 0.0).sum() / compared.sum().clamp(min=1)

    def agreement(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Count how often two models predict the same, from their outputs for a batch.

        Without labels, all positions except known padding count.

        Returns:
            Two float tensors `(rows,)`: equal predictions and scored positions of each row; `None` where predictions
            are never equal (regression).
        """
        same = self.family(inputs).same(self.compared(first, inputs), self.compared(second, inputs))
        if same is None:
            return None
        same = same.reshape(same.shape[0], -1).float()
        scored = self.scored(inputs) if set(self.label_names) <= inputs.keys() else self._unlabelled_scored(inputs)
        scored = torch.ones_like(same) if scored is None else scored.reshape(len(same), -1).float().expand_as(same)
        return (same * scored).sum(-1), scored.sum(-1)

    def _unlabelled_scored(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the positions that count in an agreement without labels, `None` for all."""


def _is_loss(part: Any) -> bool:
    """Tell whether the first part of a tuple of outputs is the loss."""
    return isinstance(part, Tensor) and part.ndim == 0


class TaskWithoutClasses(Task):
    """A head whose labels are no classes of the config, so that neither configs nor labels are checked."""

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """No check."""

    def check_labels(self, rows: Sequence[Any]) -> None:
        """No check."""
