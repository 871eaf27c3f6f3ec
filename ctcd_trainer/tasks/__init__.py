"""The table of tasks, and the choice of the task of a model.

To add a head, write a subclass of `Task` in `labelled.py` or `language.py` and put it into `TASKS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..model_structure import base_model
from .base import Task
from .labelled import (
    AudioClassification,
    ImageClassification,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from .language import CausalLM, MaskedLM, Seq2SeqLM


class UnknownHead(Task):
    """A head that only the user's function knows (`soft_loss_func`)."""

    name = "unknown"
    model_names = frozenset()

    def check_pair(self, teacher: PreTrainedConfig, student: PreTrainedConfig, role: str) -> None:
        """No check: the meaning of the outputs is unknown."""

    def check_labels(self, rows: Sequence[Any]) -> None:
        """No check: the meaning of the outputs is unknown."""

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return integer labels unchanged, otherwise 0 for each row."""
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            return labels
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the labels unchanged."""
        return {name: inputs[name] for name in self.label_names if name in inputs}

    def agreement(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> None:
        """Return `None`: the meaning of the outputs is unknown."""
        return None


#: The known heads, in the order of the search (a BART for translation can fill masks as well).
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
    """Find the task of a model by the name of its class or of a parent class.

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
    """Return the task that the user gives as an object or by name.

    Raises:
        ValueError: There is no task of this name.
    """
    if isinstance(task, Task):
        return task
    for known in TASKS:
        if known.name == task:
            return known(config)
    raise ValueError(f"`task={task!r}` is unknown. Valid values: {', '.join(known.name for known in TASKS)}.")
