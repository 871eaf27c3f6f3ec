"""The table of tasks, and the choice of the task of a model.

To add a head, write a subclass of `Task` in `labelled.py` or `language.py` and put it into `TASKS`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..model_structure import base_model
from . import labelled, language
from .base import Task, TaskWithoutClasses


class UnknownHead(TaskWithoutClasses):
    """A head that only the user's function knows (`soft_loss_func`)."""

    name = "unknown"
    model_names = frozenset()

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return integer labels unchanged, otherwise 0 for each row."""
        labels = next((inputs[name] for name in self.label_names if name in inputs), None)
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            return labels
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the labels unchanged."""
        return {name: inputs[name] for name in self.label_names if name in inputs}

    def agreement(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> None:
        """Return `None`: the meaning of the outputs is unknown."""


#: The known heads, in the order of the search (a BART for translation can fill masks as well).
TASKS: tuple[type[Task], ...] = (
    *(labelled.SequenceClassification, labelled.TokenClassification, labelled.QuestionAnswering),
    *(labelled.MultipleChoice, labelled.ImageClassification, labelled.AudioClassification),
    *(language.Seq2SeqLM, language.MaskedLM, language.CausalLM),
)


def find_task(model: nn.Module, argument: str = "model") -> Task:
    """Find the task of a model, PEFT-wrapped or not, by the name of its class or of a parent class.

    Raises:
        ValueError: The head is not known; `argument` is the name of the model in the message.
    """
    names = [cls.__name__ for cls in type(base_model(model)).__mro__]
    for task in TASKS:
        if task.model_names.intersection(names) and hasattr(model, "config") and task.accepts(model.config):
            return task(model.config)
    raise ValueError(
        f"`{argument}` is a {names[0]}, a head that is not known. Known are subclasses of the models that "
        f"{', '.join(task.auto_model.__name__ for task in TASKS)} load. Pass `soft_loss_func(teacher_outputs, "
        f"student_outputs, inputs)`, or name the task with `task`: {', '.join(repr(task.name) for task in TASKS)}."
    )


def named_task(task: Task | str, config: PreTrainedConfig | None) -> Task:
    """Return the task that the user gives as an object or by name; raise `ValueError` if the name is unknown."""
    if isinstance(task, Task):
        return task
    known = {each.name: each for each in TASKS}
    if task not in known:
        raise ValueError(f"`task={task!r}` is unknown. Valid values: {', '.join(known)}.")
    return known[task](config)
