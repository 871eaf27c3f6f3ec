"""Heads with labels: of sequences, images, recordings, tokens, choices and answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models import auto

from ..soft_losses import Bernoulli, Categorical, Family, Point
from .base import Task, TaskWithoutClasses, model_names_of
from .labels import IGNORE_INDEX, label_array


class SequenceClassification(Task):
    """One label, several labels or a score for each sequence (`...ForSequenceClassification`).

    A missing target is the class -100, or NaN among scores and among several labels. The hard loss is the mean over
    the targets that are there. The soft losses need no targets: they compare every row, and every output of a row.
    """

    name = "sequence-classification"
    pipeline_tag = "text-classification"
    auto_model = auto.AutoModelForSequenceClassification
    model_names = model_names_of("SEQUENCE_CLASSIFICATION")
    per_token = False
    per_row = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self._problem_type: str | None = getattr(config, "problem_type", None)

    def problem_type(self, integer_labels: bool) -> str:
        """Return the problem type as configs name it, inferred as in transformers if the config has none."""
        if self._problem_type is not None:
            return self._problem_type
        if self.num_labels == 1:
            return "regression"
        return "single_label_classification" if integer_labels else "multi_label_classification"

    def _problem_type_of(self, inputs: Mapping[str, Any]) -> str:
        return self.problem_type("labels" not in inputs or not inputs["labels"].is_floating_point())

    @property
    def predicts_numbers(self) -> bool:
        """Tell whether the outputs are numbers."""
        return self.problem_type(integer_labels=True) == "regression"

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """Return a distribution over the classes, one per label, or a number."""
        families: dict[str, type[Family]] = {
            "regression": Point,
            "single_label_classification": Categorical,
            "multi_label_classification": Bernoulli,
        }
        return families[self._problem_type_of(inputs)]()

    def _same_settings(self, teacher: PreTrainedConfig, student: PreTrainedConfig) -> dict[str, bool]:
        same = super()._same_settings(teacher, student)
        # Where a config does not say, one output is a regression and several are none (`problem_type`).
        types = [each.problem_type or ("regression" if each.num_labels == 1 else None) for each in (teacher, student)]
        same_type = types[0] == types[1] or (None in types and "regression" not in types)
        return {"num_labels": same["num_labels"], "problem_type": same_type, **same}

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Refuse labels of a data set that do not fit the head.

        One class or one score is `(rows,)` or `(rows, 1)`; several labels or scores are `(rows, num_labels)`.

        Raises:
            ValueError: Another shape, a class index out of range, a label of several that is not from 0 to 1, an
                infinite score.
        """
        labels = label_array(rows)
        integers = labels.dtype.kind in "biu"
        problem_type = self.problem_type(integers)
        encoding = f"Encode each row as {self.num_labels} zeros and ones."
        if problem_type == "regression":
            if labels.shape[1:] != (self.num_labels,) and (self.num_labels, labels.ndim) != (1, 1):
                raise ValueError(
                    f"Scores must have one value per output: the models have `num_labels={self.num_labels}` and the "
                    f"labels have the shape {labels.shape}. Load both models with another `num_labels`, or change the "
                    "data."
                )
            infinite = np.isinf(labels.astype(np.float64)).reshape(len(labels), -1).any(axis=1)
            rule = "scores must be finite numbers, or NaN where a score is missing. Drop the row."
            _refuse(infinite, labels, "The score of row", rule)
        elif integers != (problem_type == "single_label_classification"):
            raise ValueError(
                f"The labels are of type {labels.dtype}, and `problem_type={problem_type!r}` needs "
                f"{'floats' if integers else 'integers'}. Convert them, or load both models with another "
                "`problem_type`."
            )
        elif problem_type == "single_label_classification":
            if labels.size != len(labels):
                raise ValueError(
                    f"The labels are integers of the shape {labels.shape}, and the models predict one class of a row. "
                    "Give each row the index of one class. For several labels of a row, give zeros and ones as floats."
                )
            self._check_classes(labels)
        elif labels.ndim != 2 or labels.shape[1] != self.num_labels:
            raise ValueError(
                f"Multi-label rows must have one value per label: the models have `num_labels={self.num_labels}` "
                f"and the labels have shape {labels.shape}. {encoding}"
            )
        else:
            wrong = ((labels < 0) | (labels > 1)).any(axis=1)
            rule = f"every value must be from 0 to 1, or NaN where a label is missing. {encoding}"
            _refuse(wrong, labels, "Multi-label row", rule)

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count every label except NaN. A score of -100.0 is a label: only integers are ignored."""
        labels = self.targets(inputs)
        if self._problem_type_of(inputs) == "single_label_classification":
            return labels
        return labels.isnan().long() * IGNORE_INDEX

    def unlabelled_rows(self, rows: Sequence[Any]) -> np.ndarray:
        """Mark the rows without a label."""
        labels = label_array(rows)
        if self.problem_type(labels.dtype.kind in "biu") == "single_label_classification":
            return super().unlabelled_rows(rows)
        return np.isnan(labels.astype(np.float64)).reshape(len(labels), -1).all(axis=1)

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the labels, with 0 in place of NaN; see `hard_loss`."""
        if self._problem_type_of(inputs) == "single_label_classification":
            return super().trainable_labels(inputs)
        return {"labels": inputs["labels"].nan_to_num()} if "labels" in inputs else {}

    def hard_loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the loss of the model, or the mean over the targets that are there if some are NaN.

        Raises:
            ValueError: Scores or several labels have another shape than the logits.
        """
        loss, labels = outputs.get("loss"), inputs.get("labels")
        if loss is None or labels is None or self._problem_type_of(inputs) == "single_label_classification":
            return loss
        logits = self.compared(outputs, inputs)
        if labels.shape != logits.shape and (*labels.shape, 1) != logits.shape:
            raise ValueError(
                f"`labels` have the shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}: torch would "
                "compare them across rows or outputs (broadcasting). Give the labels the shape of the logits."
            )
        scored = self.scored(inputs)
        if scored.all() or not scored.any():  # without any label the weight is 0, and any finite value will do
            return loss
        logits, labels = logits.reshape(labels.shape)[scored], labels[scored]
        if self._problem_type_of(inputs) == "regression":
            return nn.functional.mse_loss(logits.float(), labels.float())
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def scored(self, inputs: Mapping[str, Any]) -> Tensor:
        """Mark the targets that are there: bool, of the shape of the labels."""
        return self.counted(inputs).ne(IGNORE_INDEX)

    def distilled(self, inputs: Mapping[str, Any]) -> Tensor:
        """Mark all rows: bool `(rows,)`."""
        scored = self.scored(inputs)
        return scored.new_ones(len(scored))


def _refuse(wrong: np.ndarray, labels: np.ndarray, what: str, rule: str) -> None:
    """Raise `ValueError` for the first row that is marked as wrong."""
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{what} {row} is {labels[row].tolist()}: {rule}")


class ImageClassification(SequenceClassification):
    """One label, or several, for each image (`...ForImageClassification`)."""

    name = "image-classification"
    pipeline_tag = "image-classification"
    auto_model = auto.AutoModelForImageClassification
    model_names = model_names_of("IMAGE_CLASSIFICATION")


class AudioClassification(SequenceClassification):
    """One label, or several, for each recording (`Wav2Vec2ForSequenceClassification` and its like)."""

    name = "audio-classification"
    pipeline_tag = "audio-classification"
    auto_model = auto.AutoModelForAudioClassification
    model_names = model_names_of("AUDIO_CLASSIFICATION")


class TokenClassification(Task):
    """One label for each token (`...ForTokenClassification`); without labels, all tokens except padding count."""

    name = "token-classification"
    pipeline_tag = "token-classification"
    auto_model = auto.AutoModelForTokenClassification
    model_names = model_names_of("TOKEN_CLASSIFICATION")
    per_token = True

    def _unlabelled_scored(self, inputs: Mapping[str, Any]) -> Tensor | None:
        return inputs.get("attention_mask")

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the labels; without labels, 0 for every token except padding, to train on soft losses only."""
        if "labels" not in inputs and "attention_mask" in inputs:
            return inputs["attention_mask"].long().eq(0).long() * IGNORE_INDEX
        return super().targets(inputs)


class MultipleChoice(Task):
    """The right choice among several sequences (`...ForMultipleChoice`): a distribution over the choices."""

    name = "multiple-choice"
    pipeline_tag = "multiple-choice"
    auto_model = auto.AutoModelForMultipleChoice
    model_names = model_names_of("MULTIPLE_CHOICE")
    per_token = False
    per_row = True

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Any two models fit: the choices are in the data."""

    def _check_classes(self, labels: np.ndarray, first_row: int = 0) -> None:
        wrong = labels[(labels < 0) & (labels != IGNORE_INDEX)]
        if wrong.size:
            raise ValueError(f"Label {wrong[0]} of row {first_row} is negative: give the index of the right choice.")


class QuestionAnswering(TaskWithoutClasses):
    """Start and end of an answer in a text (`...ForQuestionAnswering`): two distributions over the unpadded tokens."""

    name = "question-answering"
    pipeline_tag = "question-answering"
    auto_model = auto.AutoModelForQuestionAnswering
    model_names = model_names_of("QUESTION_ANSWERING")
    label_names = ("start_positions", "end_positions")
    compared_outputs = ("start_logits", "end_logits")
    per_token = True

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return start and end `(rows, 2)`; `IGNORE_INDEX` beyond the input, which the models ignore."""
        missing = [name for name in self.label_names if name not in inputs]
        if missing:
            raise ValueError(
                f"The batch has no {missing}, only {sorted(inputs)}. Add them: the token indices of the answers."
            )
        positions = torch.stack([inputs[name].reshape(-1) for name in self.label_names], dim=-1)
        length = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
        # transformers clamps negative positions to 0.
        return positions.clamp(min=0).masked_fill(positions >= length, IGNORE_INDEX)

    def compared(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return start and end logits `(rows, 2, length)`."""
        return torch.stack([outputs[name] for name in self.compared_outputs], dim=1)

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """Return a distribution over the tokens that are not padding."""
        mask = inputs.get("attention_mask")
        return Categorical(None if mask is None else mask.bool().unsqueeze(1))
