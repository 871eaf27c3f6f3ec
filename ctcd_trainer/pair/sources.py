"""Bringing the models together: where each comes from, and whether they fit."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import number_of_arguments

from ..arguments import DistillationArguments
from ..checks import check_learners
from ..graph import STUDENT, TEACHER
from ..tasks.base import Task
from .loading import load_model
from .shared_layers import share_modules

#: What `from_pretrained` takes.
NAME_OR_PATH = (str, os.PathLike)


@dataclass
class ModelSources:
    """The models besides the teacher, as the user gave them.

    Attributes:
        arguments: The distillation arguments.
        student: A model, a name or a path, or `None`.
        student_init: Makes the student, with no argument or with the trial of a hyperparameter search, or `None`.
        pretrained: The frozen pre-trained teacher: a model, a name or a path, or `None`.
        seed: Seed of the weights that loading or making a student draws.
        task: The task, or its name, if the user gave one.
        has_soft_loss: Whether the user's own function compares the outputs.
    """

    arguments: DistillationArguments
    student: PreTrainedModel | str | os.PathLike | None
    student_init: Callable[..., PreTrainedModel] | None
    pretrained: PreTrainedModel | str | os.PathLike | None
    seed: int
    task: Task | str | None = None
    has_soft_loss: bool = False
    #: Layers that teacher and student have in common, after `learners`.
    shared_layers: list[nn.Module] = field(default_factory=list, init=False)

    @property
    def given(self) -> bool:
        """Whether there is any model besides the teacher."""
        return any(source is not None for source in (self.student, self.student_init, self.pretrained))

    def learners(self, teacher: PreTrainedModel, trial: Any = None) -> tuple[Task, dict[str, nn.Module]]:
        """Load or make the other models, and check that all fit together.

        Afterwards `pretrained` is a model if it was a name or a path.

        Args:
            teacher: The teacher.
            trial: Trial of a hyperparameter search.

        Returns:
            The task of the models, and the learners by name.
        """
        set_seed(self.seed)  # a new head, or a student from a config
        frozen = STUDENT in self.arguments.graph.frozen
        if self.student_init is not None:
            student = self.student_init(trial) if number_of_arguments(self.student_init) else self.student_init()
        elif isinstance(self.student, NAME_OR_PATH):
            student = load_model(self.student, "student_model", like=teacher, frozen=frozen)
        else:
            student = self.student
        if isinstance(self.pretrained, NAME_OR_PATH):
            self.pretrained = load_model(self.pretrained, "pretrained_teacher", like=teacher, frozen=True)
        learners = {TEACHER: teacher, STUDENT: student}
        task = check_learners(self.arguments, learners, self.pretrained, self.task, self.has_soft_loss)
        share = self.arguments.share
        self.shared_layers = [] if share is None else share_modules(teacher, student, share)
        return task, learners
