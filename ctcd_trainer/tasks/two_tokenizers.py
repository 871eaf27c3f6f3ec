"""A student with a tokenizer of its own, for tasks whose labels do not depend on tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..graph import STUDENT
from .base import Task
from .labels import LABEL_COLUMNS

#: How the names of the student's own inputs begin, in examples and in batches.
PREFIX = f"{STUDENT}_"


@dataclass
class PairDataCollator:
    """Puts examples with the inputs of two tokenizers into one batch.

    An example has the teacher's inputs and the labels under their own names, and the student's inputs with `student_`
    before theirs (`student_input_ids`, ...).

    Args:
        teacher: Collates the teacher's inputs and the labels.
        student: Collates the student's inputs; it is given the labels, too.

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
        """Pads to the longest text of the batch; options are those of `DataCollatorWithPadding`."""
        return cls(DataCollatorWithPadding(teacher, **options), DataCollatorWithPadding(student, **options))

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of both models' inputs."""
        both = [own_inputs(feature) for feature in features]
        # Some collators (of multiple choice) cannot do without labels; the batch has the teacher's.
        students = [{**own, **{n: teacher[n] for n in LABEL_COLUMNS if n in teacher}} for teacher, own in both]
        batch = dict(self.teacher([teacher for teacher, _ in both]))
        own = {name: value for name, value in self.student(students).items() if name not in LABEL_COLUMNS}
        return batch | {f"{PREFIX}{name}": value for name, value in own.items()}


def own_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of the teacher with the labels, and those of the student without `student_`."""
    teacher = {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}
    student = {name.removeprefix(PREFIX): value for name, value in inputs.items() if name.startswith(PREFIX)}
    return teacher, student


def inputs_of_learner(
    learner: str, inputs: Mapping[str, Any], label_names: Sequence[str], two_tokenizers: bool = False
) -> dict[str, Any]:
    """The part of a batch that is for a learner: for a student with inputs of its own, these and the labels.

    Args:
        learner: Its name.
        inputs: The batch.
        label_names: The inputs that are labels.
        two_tokenizers: Whether the student must have inputs of its own.

    Raises:
        ValueError: It has none, and would take the tokens of another tokenizer for its own.
    """
    teacher, student = own_inputs(inputs)
    if learner == STUDENT and two_tokenizers and not student:
        raise ValueError(
            f"`student_processing_class` is given, and a batch has no inputs of the student, only {sorted(inputs)}. "
            f"Add what its tokenizer gives to the data, with {PREFIX!r} before each name, and keep it in the "
            "`data_collator` (`PairDataCollator`)."
        )
    if learner != STUDENT or not student:
        return teacher
    return student | {name: inputs[name] for name in label_names if name in inputs}


def check_student_inputs(task: Task, datasets: Mapping[str, Any], share: str | None = None) -> None:
    """A student with a tokenizer of its own needs a task of whole rows, and its inputs in the data.

    Args:
        task: The task.
        datasets: The data sets by name of their argument.
        share: What the models have in common.

    Raises:
        ValueError: The task compares tokens, the models share parts, or a data set has no inputs of the student.
    """
    if share is not None:
        raise ValueError(
            f"`share={share!r}` and `student_processing_class` are both given: models of two tokenizers have "
            "different inputs, so that nothing they compute is the same. Leave out one of them."
        )
    if not task.per_row:
        raise ValueError(
            f"`student_processing_class` is given, and {task.name} compares what the models say of each token: with "
            "two tokenizers these are not the same tokens. Choose a student of the teacher's tokenizer."
        )
    for argument, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            check_student_inputs(task, {f"{argument}[{name!r}]": part for name, part in dataset.items()})
            continue
        columns = getattr(dataset, "column_names", None)
        if columns is None and isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], Mapping):
            columns = list(dataset[0])
        if columns and not any(name.startswith(PREFIX) for name in columns):
            raise ValueError(
                f"`student_processing_class` is given, and `{argument}` has no inputs of the student, only {columns}. "
                f"Add what its tokenizer gives, with {PREFIX!r} before each name."
            )
