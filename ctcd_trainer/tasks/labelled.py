"""Heads with labels: of sequences, images, recordings, tokens, choices and answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from ..soft_losses import Bernoulli, Categorical, Family, Point
from .base import Task, model_names_of
from .labels import IGNORE_INDEX, label_array


class SequenceClassification(Task):
    """One label, several labels or a score for each sequence (`...ForSequenceClassification`).

    A row without a label has the class -100, or NaN for scores and for each of several labels. The soft losses compare
    it, and the hard loss leaves it out.

    The problem type is the one of the config or, as in transformers, follows from the number and the dtype of the
    labels: one output is a regression, integers are single labels, floats are multiple labels.

    Args:
        config: Config of the teacher.
    """

    name = "sequence-classification"
    pipeline_tag = "text-classification"
    auto_model = AutoModelForSequenceClassification
    model_names = model_names_of("SEQUENCE_CLASSIFICATION")
    per_token = False
    per_row = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self._problem_type: str | None = config.problem_type

    def problem_type(self, integer_labels: bool) -> str:
        """Return the problem type, inferred as in transformers if the config has none.

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

    def _problem_type_of(self, inputs: Mapping[str, Any]) -> str:
        return self.problem_type("labels" not in inputs or not inputs["labels"].is_floating_point())

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """Return a distribution over the classes, one per label, or a number."""
        families: dict[str, type[Family]] = {
            "regression": Point,
            "single_label_classification": Categorical,
            "multi_label_classification": Bernoulli,
        }
        return families[self._problem_type_of(inputs)]()

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Also check that the problem types are the same; see `Task.check_pair`."""
        # Where a config does not say, one output is a regression and several are none (`problem_type`).
        types = [
            config.problem_type or ("regression" if config.num_labels == 1 else None) for config in (teacher, student)
        ]
        same_type = types[0] == types[1] or (None in types and "regression" not in types)
        self._check_equal("num_labels", teacher.num_labels == student.num_labels, teacher, student, role)
        self._check_equal("problem_type", same_type, teacher, student, role)
        super().check_pair(teacher, student, role)

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Refuse labels that do not fit the head.

        Args:
            rows: Labels of a data set, `(rows,)` or `(rows, num_labels)`.

        Raises:
            ValueError: A class index out of range, a multi-label row of another length or with values other than 0
                to 1, a score that is not finite.
        """
        labels = label_array(rows)
        integers = np.issubdtype(labels.dtype, np.integer)
        problem_type = self.problem_type(integers)
        if integers != (problem_type == "single_label_classification") and problem_type != "regression":
            raise ValueError(
                f"The labels are of type {labels.dtype}, and `problem_type={problem_type!r}` needs "
                f"{'floats' if integers else 'integers'}. Convert them, or load both models with another "
                "`problem_type`."
            )
        if problem_type == "single_label_classification":
            self._check_classes(labels)
        elif problem_type == "multi_label_classification":
            if labels.ndim != 2 or labels.shape[1] != self.num_labels:
                raise ValueError(
                    f"Multi-label rows must have one value per label: the models have `num_labels={self.num_labels}` "
                    f"and the labels have shape {labels.shape}. Encode each row as {self.num_labels} zeros and ones."
                )
            wrong = ~((labels >= 0) & (labels <= 1)).all(axis=1) & ~np.isnan(labels).all(axis=1)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(
                    f"Multi-label row {row} is {labels[row].tolist()}: every value must be from 0 to 1, or all NaN "
                    f"for a row without labels. Encode each row as {self.num_labels} zeros and ones."
                )
        elif np.isinf(labels.astype(np.float64)).any():
            row = int(np.argmax(np.isinf(labels.astype(np.float64)).reshape(len(labels), -1).any(axis=1)))
            raise ValueError(
                f"The score of row {row} is {labels[row]}: scores must be finite numbers, or NaN for a row without a "
                "score. Drop the row."
            )

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count every label except NaN. A score of -100.0 is a label: only integers are ignored."""
        labels = self.targets(inputs)
        if self._problem_type_of(inputs) == "single_label_classification":
            return labels
        return labels.isnan().long() * IGNORE_INDEX

    def unlabelled_rows(self, rows: Sequence[Any]) -> np.ndarray:
        """Mark the rows without a label; see `Task.unlabelled_rows`."""
        labels = label_array(rows)
        if np.issubdtype(labels.dtype, np.integer) and self.problem_type(True) == "single_label_classification":
            return super().unlabelled_rows(rows)
        return np.isnan(labels.astype(np.float64)).reshape(len(labels), -1).all(axis=1)

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the labels, with 0 in place of missing scores; see `hard_loss`."""
        if self._problem_type_of(inputs) == "single_label_classification":
            return super().trainable_labels(inputs)
        return {"labels": inputs["labels"].nan_to_num()} if "labels" in inputs else {}

    def hard_loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the loss of the model, or a mean over the labelled rows if scores are missing."""
        loss, labels = outputs.get("loss"), inputs.get("labels")
        if loss is None or labels is None or self._problem_type_of(inputs) == "single_label_classification":
            return loss
        scored = self.scored(inputs)
        if scored.all() or not scored.any():  # without any label the weight is 0, and any finite value will do
            return loss
        logits, labels = outputs["logits"][scored], labels[scored]
        if self._problem_type_of(inputs) == "regression":
            return nn.functional.mse_loss(logits.reshape(labels.shape).float(), labels.float())
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def scored(self, inputs: Mapping[str, Any]) -> Tensor:
        """Mark the rows that are scored: bool `(rows,)`."""
        counted = self.counted(inputs).ne(IGNORE_INDEX)
        return counted.reshape(counted.shape[0], -1).any(-1)


class ImageClassification(SequenceClassification):
    """One label, or several, for each image (`...ForImageClassification`)."""

    name = "image-classification"
    pipeline_tag = "image-classification"
    auto_model = AutoModelForImageClassification
    model_names = model_names_of("IMAGE_CLASSIFICATION")


class AudioClassification(Task):
    """One label for each recording (`Wav2Vec2ForSequenceClassification` and its like)."""

    name = "audio-classification"
    pipeline_tag = "audio-classification"
    auto_model = AutoModelForAudioClassification
    model_names = model_names_of("AUDIO_CLASSIFICATION")
    per_token = False
    per_row = True


class TokenClassification(Task):
    """One label for each token (`...ForTokenClassification`); without labels, all tokens except padding count."""

    name = "token-classification"
    pipeline_tag = "token-classification"
    auto_model = AutoModelForTokenClassification
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
    auto_model = AutoModelForMultipleChoice
    model_names = model_names_of("MULTIPLE_CHOICE")
    per_token = False
    per_row = True

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Any two models fit: the choices are in the data."""

    def _check_classes(self, labels: np.ndarray, first_row: int = 0) -> None:
        wrong = (labels < 0) & (labels != IGNORE_INDEX)
        if wrong.any():
            raise ValueError(
                f"Label {labels[wrong][0]} of row {first_row} is negative: a label is the index of the right choice."
            )


class QuestionAnswering(Task):
    """Start and end of an answer in a text (`...ForQuestionAnswering`): two distributions over the unpadded tokens."""

    name = "question-answering"
    pipeline_tag = "question-answering"
    auto_model = AutoModelForQuestionAnswering
    model_names = model_names_of("QUESTION_ANSWERING")
    label_names = ("start_positions", "end_positions")
    compared_outputs = ("start_logits", "end_logits")
    per_token = True

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Any two models fit: the positions are those of the input."""

    def check_labels(self, rows: Sequence[Any]) -> None:
        """No check: the models ignore positions beyond the text."""

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return start and end `(rows, 2)`; `IGNORE_INDEX` beyond the input, which the models ignore."""
        missing = [name for name in self.label_names if name not in inputs]
        if missing:
            raise ValueError(
                f"The batch has no {missing}, only {sorted(inputs)}: give the token indices of the answers as "
                "`start_positions` and `end_positions`."
            )
        positions = torch.stack([inputs[name].reshape(-1) for name in self.label_names], dim=-1)
        length = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
        # transformers clamps negative positions to 0.
        return positions.clamp(min=0).masked_fill(positions >= length, IGNORE_INDEX)

    def compared(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return start and end logits `(rows, 2, length)`."""
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """Return a distribution over the tokens that are not padding."""
        mask = inputs.get("attention_mask")
        return Categorical(None if mask is None else mask.bool().unsqueeze(1))
