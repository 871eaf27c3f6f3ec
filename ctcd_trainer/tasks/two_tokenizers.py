"""Inputs for one learner: those of a student with a second tokenizer, or its view of an augmented batch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..graph import LEARNERS, STUDENT
from .labels import LABEL_COLUMNS


def prefix_of(learner: str) -> str:
    """Return the prefix of a learner's inputs (`student_input_ids`); the primary learner's have none."""
    return "" if learner == LEARNERS[0] else f"{learner}_"


def view_of(learner: str) -> str:
    """Return the prefix of a learner's view of an augmented batch, which no input of a model can have."""
    return "" if learner == LEARNERS[0] else f"{learner}/"


#: The prefix of the student's own inputs.
PREFIX = prefix_of(STUDENT)


@dataclass
class PairDataCollator:
    """Puts examples with the inputs of two tokenizers into one batch, with a collator for each model.

    An example has the teacher's inputs and the labels under their own names, and the student's inputs with `student_`
    before theirs (`student_input_ids`, ...). The student's collator gets the labels, too.

    Example:
        ```python
        collator = PairDataCollator(DataCollatorWithPadding(tokenizer), DataCollatorWithPadding(student_tokenizer))
        ```
    """

    teacher: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    student: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    @classmethod
    def of(
        cls, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, **options: Any
    ) -> "PairDataCollator":
        """Pad to the longest text of a batch, with options of `DataCollatorWithPadding`."""
        return cls(DataCollatorWithPadding(teacher, **options), DataCollatorWithPadding(student, **options))

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate the inputs of both models."""
        teachers, students = [], []
        for feature in features:
            students.append({n.removeprefix(PREFIX): v for n, v in feature.items() if n.startswith(PREFIX)})
            teachers.append({name: value for name, value in feature.items() if not name.startswith(PREFIX)})
            # Some collators (of multiple choice) need labels; the batch has the teacher's.
            students[-1] |= {name: feature[name] for name in LABEL_COLUMNS if name in feature}
        batch = dict(self.teacher(teachers))
        second = self.student(students)
        return batch | {f"{PREFIX}{name}": value for name, value in second.items() if name not in LABEL_COLUMNS}


def inputs_of_learner(
    learner: str,
    inputs: Mapping[str, Any],
    label_names: Sequence[str],
    known: Collection[str],
    two_tokenizers: bool = False,
) -> dict[str, Any]:
    """Return a model's part of a batch: its own inputs with the labels, or the common inputs if it has none.

    Its own are those of its tokenizer, or its view of an augmented batch. Other inputs are common, whatever they are
    called.

    Args:
        learner: Name of the model.
        inputs: The batch.
        label_names: The inputs that are labels.
        known: The inputs that models take: `student_input_ids` is the student's, but `student_id` is a common column.
        two_tokenizers: Whether every learner but the primary one has another tokenizer.

    Raises:
        ValueError: The learner must have its own inputs, and the batch has none.
    """
    prefixes = [view_of(other) for other in LEARNERS[1:]]
    owners = {name: prefix for name in inputs for prefix in prefixes if name.startswith(prefix)}
    own = view_of(learner)
    if two_tokenizers:
        prefixes = [prefix_of(other) for other in LEARNERS[1:]]
        owners = {f"{prefix}{name}": prefix for prefix in prefixes for name in known}
        own = prefix_of(learner)
    part = {name.removeprefix(own): value for name, value in inputs.items() if owners.get(name) == own}
    if part:
        return part | {name: inputs[name] for name in label_names if name in inputs}
    if two_tokenizers and own in prefixes:
        raise ValueError(
            f"`{learner}_processing_class` is given, and a batch has no inputs of the {learner}, only "
            f"{sorted(inputs)}. Add the output of its tokenizer to the data, with {own!r} before each name, and keep "
            "it in the `data_collator` (`PairDataCollator`)."
        )
    return {name: value for name, value in inputs.items() if name not in owners}
