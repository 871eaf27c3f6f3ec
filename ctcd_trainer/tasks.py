"""What each head's logits mean: which are compared, at which positions, and what is counted.

A new head is a new class in this file, added to `TASKS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from .labels import IGNORE_INDEX, label_array, own_labels
from .losses import Bernoulli, Categorical, Family, Point
from .wrapping import base_model


def _model_names(mapping: str) -> frozenset[str]:
    """Class names of the models that an `AutoModelFor...` class can load."""
    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    return frozenset(name for entry in names for name in ((entry,) if isinstance(entry, str) else entry))


class Task:
    """A head: how the outputs of two models with this head are compared, and what their labels must look like.

    By default: one of several classes at each position, for labels of the shape of the positions.

    Args:
        config: Config of the teacher.
    """

    #: How the task is called, e.g. as the argument `task` of the trainer.
    name: ClassVar[str]
    #: The `AutoModelFor...` class that loads a model of this head by name or path.
    auto_model: ClassVar[type]
    #: Names of the classes that have this head.
    model_names: ClassVar[frozenset[str]]
    #: The inputs that are labels.
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    #: Whether the classes are the tokens of a vocabulary.
    language_model: ClassVar[bool] = False
    #: Whether the models shift the labels, so that a position predicts the next label.
    shifts_labels: ClassVar[bool] = False
    #: The outputs that `compared` reads.
    compared_outputs: ClassVar[tuple[str, ...]] = ("logits",)
    #: Whether these have a value for each token, so that they are as long as the padding of the batch; or one for each
    #: row, which padding does not change; `None` if that is not known.
    per_token: ClassVar[bool | None] = None

    def __init__(self, config: PreTrainedConfig) -> None:
        self.num_labels: int = getattr(config, "num_labels", 0)

    # ---- Do the models and the labels fit? ----

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """Whether a model with a class of `model_names` has this head."""
        return True

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Both models must have the same number of labels, with the same meaning.

        Args:
            teacher: Config of the teacher.
            student: Config of the model that is paired with it.
            role: Name of the argument that gave the second model, for the message.

        Raises:
            ValueError: They differ; the message has both values.
        """
        labels = [own_labels(config) for config in (teacher, student)]
        same_names = None in labels or labels[0] == labels[1]
        self._check_equal("num_labels", teacher.num_labels == student.num_labels, teacher, student, role)
        self._check_equal("id2label", same_names, teacher, student, role)

    def _check_equal(
        self, name: str, same: bool, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str
    ) -> None:
        if not same:
            ours, theirs = getattr(teacher, name), getattr(student, name)
            raise ValueError(
                f"`model` has `{name}={ours!r}` and `{role}` has `{name}={theirs!r}`: their predictions cannot be "
                f"compared. Load both with the same `{name}`, e.g. "
                f"`{self.auto_model.__name__}.from_pretrained(..., {name}={ours!r})`."
            )

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Every label of a data set must be the index of a class.

        Args:
            rows: The label of each row: a number, or a list of numbers.

        Raises:
            ValueError: A label does not fit the head; the message has the row and the value.
        """
        for row, values in enumerate(rows):
            self._check_classes(label_array([values], row), row)

    def _check_classes(self, labels: np.ndarray, first_row: int = 0) -> None:
        """Raise `ValueError` if an entry of `(rows, ...)` is neither a class nor ignored."""
        wrong = (labels != IGNORE_INDEX) & ~((labels >= 0) & (labels < self.num_labels))
        if wrong.any():
            position = tuple(np.argwhere(wrong)[0])
            raise ValueError(
                f"Label {labels[position]} of row {first_row + position[0]} is out of range: the models have "
                f"`num_labels={self.num_labels}`, so labels go from 0 to {self.num_labels - 1} (or {IGNORE_INDEX} to "
                "ignore one). Correct the data or load both models with a larger `num_labels`."
            )

    # ---- What is scored? ----

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """The label of each position that the models predict, `IGNORE_INDEX` where none is scored.

        Raises:
            ValueError: The batch has no labels.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"The batch has no `labels`, only {sorted(inputs)}: name the label column 'label' or 'labels', or "
                "pass a `data_collator` that makes them."
            )
        return inputs["labels"]

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """The targets as `num_items_in_batch` counts them: one entry per item, `IGNORE_INDEX` if not scored."""
        return self.targets(inputs)

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The labels to give to the model, or class 0 everywhere if nothing is scored.

        The mean cross-entropy over nothing is NaN, and so are its gradients even when it is multiplied by 0. The loss
        of such a batch is counted with weight 0, so it may as well be finite.
        """
        labels = {name: inputs[name] for name in self.label_names if name in inputs}
        nothing = self.counted(inputs).eq(IGNORE_INDEX).all() if labels else None
        return {name: value.masked_fill(nothing, 0) for name, value in labels.items()}

    def needs_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether a model makes predictions only if it is given the labels."""
        return False

    def unlabelled(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a model without labels, from which it makes the same predictions."""
        return {name: value for name, value in inputs.items() if name not in self.label_names}

    # ---- The comparison ----

    def compared(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The logits of a model that are compared, `(*positions, outcomes)`."""
        return outputs["logits"]

    def scored(self, inputs: Mapping[str, Any]) -> Tensor:
        """Which of these positions are scored: bool `(rows, *positions)`."""
        return self.targets(inputs).ne(IGNORE_INDEX)

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """What the logits that are compared mean."""
        return Categorical()

    def soft_loss(self, learner: Any, source: Any, inputs: Mapping[str, Any], name: str, temperature: float) -> Tensor:
        """Mean over the scored positions of a soft loss.

        Args:
            learner: Output of the model that is trained.
            source: Output of the model it learns from; it is detached here.
            inputs: The batch.
            name: A key of `SOFT_LOSSES`.
            temperature: Temperature of the comparison.

        Returns:
            0-dimensional; 0 if nothing is scored.
        """
        logits = [self.compared(learner, inputs), self.compared(source, inputs).detach()]
        values = self.family(inputs).soft_loss(*logits, name, temperature)
        scored = self.scored(inputs)
        return torch.where(scored, values, 0.0).sum() / scored.sum().clamp(min=1)

    def agreement(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """How often two models predict the same.

        Args:
            first: Output of one model.
            second: Output of the other one.
            inputs: The batch; without labels all positions count that can be told to be none of padding.

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
        """The positions that count in an agreement without labels; `None` for all."""
        return None


class SequenceClassification(Task):
    """One label, several labels or a score for each sequence (`...ForSequenceClassification`).

    The problem type is the one of the config or, as in transformers, follows from the number and the dtype of the
    labels: one output is a regression, integers are single labels, floats are multiple labels.

    Args:
        config: Config of the teacher.
    """

    name = "sequence-classification"
    auto_model = AutoModelForSequenceClassification
    model_names = _model_names("SEQUENCE_CLASSIFICATION")
    per_token = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
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

    def _problem_type_of(self, inputs: Mapping[str, Any]) -> str:
        return self.problem_type("labels" not in inputs or not inputs["labels"].is_floating_point())

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """A distribution over the classes, one per label, or a number."""
        families: dict[str, type[Family]] = {
            "regression": Point,
            "single_label_classification": Categorical,
            "multi_label_classification": Bernoulli,
        }
        return families[self._problem_type_of(inputs)]()

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """As for every head; the problem types must be the same, too."""
        # Where a config does not say, one output is a regression and several are none (`problem_type`).
        types = [
            config.problem_type or ("regression" if config.num_labels == 1 else None) for config in (teacher, student)
        ]
        same_type = types[0] == types[1] or (None in types and "regression" not in types)
        self._check_equal("num_labels", teacher.num_labels == student.num_labels, teacher, student, role)
        self._check_equal("problem_type", same_type, teacher, student, role)
        super().check_pair(teacher, student, role)

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Every label must fit the head.

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

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Every label counts, except ignored ones of single-label classification.

        A score of -100.0 is a score: only integer labels can be ignored.
        """
        labels = self.targets(inputs)
        if self._problem_type_of(inputs) == "single_label_classification":
            return labels
        return torch.zeros_like(labels, dtype=torch.long)

    def scored(self, inputs: Mapping[str, Any]) -> Tensor:
        """Which rows are scored, bool `(rows,)`."""
        counted = self.counted(inputs).ne(IGNORE_INDEX)
        return counted.reshape(counted.shape[0], -1).any(-1)


class ImageClassification(SequenceClassification):
    """One label, or several, for each image (`...ForImageClassification`)."""

    name = "image-classification"
    auto_model = AutoModelForImageClassification
    model_names = _model_names("IMAGE_CLASSIFICATION")


class AudioClassification(Task):
    """One label for each recording (`Wav2Vec2ForSequenceClassification` and its like)."""

    name = "audio-classification"
    auto_model = AutoModelForAudioClassification
    model_names = _model_names("AUDIO_CLASSIFICATION")
    per_token = False


class TokenClassification(Task):
    """One label for each token (`...ForTokenClassification`); without labels, all tokens count but padding."""

    name = "token-classification"
    auto_model = AutoModelForTokenClassification
    model_names = _model_names("TOKEN_CLASSIFICATION")
    per_token = True

    def _unlabelled_scored(self, inputs: Mapping[str, Any]) -> Tensor | None:
        return inputs.get("attention_mask")

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """The labels; without them 0 for every token that is no padding, to train on soft losses alone."""
        if "labels" not in inputs and "attention_mask" in inputs:
            return inputs["attention_mask"].long().eq(0).long() * IGNORE_INDEX
        return super().targets(inputs)


class MultipleChoice(Task):
    """The right one of several sequences (`...ForMultipleChoice`): a distribution over the choices."""

    name = "multiple-choice"
    auto_model = AutoModelForMultipleChoice
    model_names = _model_names("MULTIPLE_CHOICE")
    per_token = False

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
    auto_model = AutoModelForQuestionAnswering
    model_names = _model_names("QUESTION_ANSWERING")
    label_names = ("start_positions", "end_positions")
    compared_outputs = ("start_logits", "end_logits")
    per_token = True

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Any two models fit: the positions are those of the input."""

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Positions are not checked: those beyond the text are ignored by the models."""

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Start and end `(rows, 2)`; `IGNORE_INDEX` beyond the input, where the models ignore them."""
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
        """Start and end logits `(rows, 2, length)`."""
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """A distribution over the tokens that are no padding."""
        mask = inputs.get("attention_mask")
        return Categorical(None if mask is None else mask.bool().unsqueeze(1))


class LanguageModel(Task):
    """A token of the vocabulary at each position; only scored positions are compared, on the ids that both have."""

    language_model = True
    per_token = True

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """What must agree is the tokenizer: see `validation.check_vocabularies`."""

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Not checked: labels are token ids, made by the data collator."""

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The labels; where nothing is scored, token 0 at every position."""
        nothing = self.counted(inputs).eq(IGNORE_INDEX).all()
        return {"labels": inputs["labels"].masked_fill(nothing, 0)}

    def compared(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The logits at the scored positions alone, `(scored, vocabulary)`."""
        logits = outputs["logits"]
        if logits.ndim == 2:  # a model that has selected them itself (ModernBERT with `sparse_prediction`)
            return logits
        targets = self.targets(inputs)
        return logits[:, -targets.shape[1] :][targets.ne(IGNORE_INDEX)]  # prompt tuning has put tokens in front

    def soft_loss(self, learner: Any, source: Any, inputs: Mapping[str, Any], name: str, temperature: float) -> Tensor:
        """Mean over the scored positions of a soft loss on the shared ids; see `Task.soft_loss`."""
        logits = [self.compared(learner, inputs), self.compared(source, inputs).detach()]
        shared = min(z.shape[-1] for z in logits)
        values = self.family(inputs).soft_loss(*(z[:, :shared] for z in logits), name, temperature)
        return values.sum() / max(len(values), 1)

    def agreement(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """How often two models predict the same token; see `Task.agreement`. `None` without labels."""
        if "labels" not in inputs:
            return None
        scored = self.scored(inputs)
        logits = [self.compared(outputs, inputs) for outputs in (first, second)]
        shared = min(z.shape[-1] for z in logits)
        same = self.family(inputs).same(*(z[:, :shared] for z in logits))
        same = torch.zeros_like(scored).masked_scatter_(scored, same)
        return same.sum(-1).float(), scored.sum(-1).float()


class Seq2SeqLM(LanguageModel):
    """An encoder-decoder that is trained by teacher forcing (`T5...`, `Bart...ForConditionalGeneration`)."""

    name = "seq2seq-lm"
    auto_model = AutoModelForSeq2SeqLM
    model_names = _model_names("SEQ_TO_SEQ_CAUSAL_LM")

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """Some of the classes have a decoder only."""
        return config.is_encoder_decoder

    def needs_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether the model makes its decoder inputs only together with its loss (M2M100, NLLB, Blenderbot)."""
        given = inputs.get("decoder_input_ids") is not None or "decoder_inputs_embeds" in inputs
        return "labels" in inputs and not given and not hasattr(model, "prepare_decoder_input_ids_from_labels")

    def unlabelled(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs without labels, but with the decoder inputs that the model makes of them.

        Raises:
            ValueError: The model makes them only together with its loss.
        """
        own = super().unlabelled(model, inputs)
        if "labels" in inputs and own.get("decoder_input_ids") is None and "decoder_inputs_embeds" not in own:
            if self.needs_labels(model, inputs):
                raise ValueError(
                    f"{type(model).__name__} has no `prepare_decoder_input_ids_from_labels`, so it needs "
                    "`decoder_input_ids` in the batch. Let the `data_collator` add them: the labels, shifted to the "
                    "right."
                )
            own["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        return own


class MaskedLM(LanguageModel):
    """The tokens that were masked (`...ForMaskedLM`)."""

    name = "masked-lm"
    auto_model = AutoModelForMaskedLM
    model_names = _model_names("MASKED_LM")


class CausalLM(LanguageModel):
    """The next token at each position (`...ForCausalLM`): labels are shifted, as the models do it."""

    name = "causal-lm"
    auto_model = AutoModelForCausalLM
    model_names = _model_names("CAUSAL_LM")
    shifts_labels = True

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """The label of the next position; none at the last one."""
        labels = super().targets(inputs)
        return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


class UnknownHead(Task):
    """A head that is compared by the function of the user alone (`soft_loss_func`)."""

    name = "unknown"
    model_names = frozenset()

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """Nothing is known that could be checked."""

    def check_labels(self, rows: Sequence[Any]) -> None:
        """Nothing is known that could be checked."""

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Integer labels as they are; otherwise 0 for each row."""
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            return labels
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The labels as they are."""
        return {name: inputs[name] for name in self.label_names if name in inputs}

    def agreement(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> None:
        """None: what a prediction is, is not known."""
        return None


#: The heads that are recognised, in the order in which they are tried (a BART for translation can fill masks as well).
TASKS: tuple[type[Task], ...] = (
    SequenceClassification,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    ImageClassification,
    AudioClassification,
    Seq2SeqLM,
    MaskedLM,
    CausalLM,
)


def find_task(model: nn.Module, argument: str = "model") -> Task:
    """Recognise the head of a model by its class (or a class it inherits from).

    Args:
        model: A model with a head, PEFT-wrapped or not.
        argument: Name of the argument that gave it, for the message.

    Raises:
        ValueError: The head is not supported.
    """
    names = [cls.__name__ for cls in type(base_model(model)).__mro__]
    for task in TASKS:
        if task.model_names.intersection(names) and hasattr(model, "config") and task.accepts(model.config):
            return task(model.config)
    supported = ", ".join(task.auto_model.__name__ for task in TASKS)
    raise ValueError(
        f"`{argument}` is a {names[0]}, a head that is not known. Known are the models that {supported} load, and "
        "subclasses of them. For another head pass `soft_loss_func(teacher_outputs, student_outputs, inputs)`, or "
        f"name the task that its outputs belong to with `task`: {', '.join(repr(task.name) for task in TASKS)}."
    )


def named_task(task: Task | str, config: PreTrainedConfig) -> Task:
    """The task that the user names, or gives.

    Raises:
        ValueError: There is no task of this name.
    """
    if isinstance(task, Task):
        return task
    for known in TASKS:
        if known.name == task:
            return known(config)
    raise ValueError(f"`task={task!r}` is unknown. Valid values: {', '.join(known.name for known in TASKS)}.")
