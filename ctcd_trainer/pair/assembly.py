"""Make a pair: load or make the models, check that they fit together, join them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import number_of_arguments
from transformers.utils import logging

from ..arguments import DistillationArguments
from ..checks import check_before_loading, check_learners, check_setup, makes_student, why_no_warm_start
from ..graph import STUDENT, TEACHER
from ..losses.objective import SoftLossFunction
from ..losses.teacher_cache import PretrainedCache
from ..tasks import Task
from ..tasks.two_tokenizers import PairDataCollator
from .loading import load_model
from .model import CoDistillationModel
from .shared_layers import SharedRun, share_modules

logger = logging.get_logger(__name__)

#: Types that `from_pretrained` takes.
NAME_OR_PATH = (str, os.PathLike)
#: The values of `student_model`: a model, a name or path, or a function that makes the student from the teacher.
StudentSource = PreTrainedModel | str | os.PathLike | Callable[[PreTrainedModel], PreTrainedModel]


@dataclass
class PairSources:
    """The models besides the teacher as the user gave them, and the pair that is made of them.

    Attributes:
        arguments: The distillation arguments.
        student: A model, a name or a path, a function of the teacher, or `None`.
        student_init: Makes the student, with no argument or with the trial of a hyperparameter search, or `None`.
        pretrained: The frozen teacher: a model, a name or a path, or `None`. After `learners` it is a model.
        task: The task, its name, or `None` to recognise it. After `learners` it is a `Task`.
        soft_loss_func: The user's function that compares outputs, or `None`.
        student_processing_class: The student's tokenizer if it is not the teacher's.
        seed: Seed of the weights that loading or making a model draws.
        warm_start: Whether the teacher is trained alone first; `None` if nobody asks for that, False also if a recipe
            does and it cannot be.
    """

    arguments: DistillationArguments
    student: StudentSource | None = None
    student_init: Callable[..., PreTrainedModel] | None = None
    pretrained: PreTrainedModel | str | os.PathLike | None = None
    task: Task | str | None = None
    soft_loss_func: SoftLossFunction | None = None
    student_processing_class: PreTrainedTokenizerBase | None = None
    seed: int = 42
    warm_start: bool | None = field(default=None, init=False)
    cache: PretrainedCache | None = field(default=None, init=False)
    _shared_layers: list[nn.Module] = field(default_factory=list, init=False)

    @property
    def given(self) -> bool:
        """Tell whether a model besides the teacher is given."""
        return any(source is not None for source in (self.student, self.student_init, self.pretrained))

    # ---- Before the models are loaded ----

    def check_before_loading(self, given: Mapping[str, Any]) -> None:
        """Refuse what can be refused without the models.

        Args:
            given: The arguments of Trainer by name.

        Raises:
            ValueError: A model is missing or has no use, arguments contradict each other, or a data set is empty.
        """
        models = {
            "student_model": self.student,
            "student_model_init": self.student_init,
            "pretrained_teacher": self.pretrained,
            "model_init": given.get("model_init"),
            "soft_loss_func": self.soft_loss_func,
        }
        check_before_loading(self.arguments, given.get("args"), models, _datasets(given))

    def check_warm_start(self, given: Mapping[str, Any]) -> None:
        """Refuse a warm start that cannot be, or leave it out if a recipe asks for it.

        Args:
            given: The arguments of Trainer by name.

        Raises:
            ValueError: See `why_no_warm_start`.
        """
        if not self.arguments.warm_start:
            return
        own = {"student_model": self.student, "student_processing_class": self.student_processing_class}
        problem = why_no_warm_start({**given, **own})
        self.warm_start = problem is None
        name = "warm_start_steps" if self.arguments.warm_start_steps else "warm_start_epochs"
        if problem is not None and name not in self.arguments.by_recipe:
            raise ValueError(f"`{name}={getattr(self.arguments, name)}`, a warm start: {problem}.")
        if problem is not None:
            logger.warning("The warm start of `recipe=%r` is left out: %s.", self.arguments.recipe, problem)

    def load_teacher(self, name: str | os.PathLike, alone: bool = False) -> PreTrainedModel:
        """Load the teacher by name or path.

        Args:
            name: The name or path.
            alone: Whether it is trained without a student.
        """
        set_seed(self.seed)  # the head may be new
        trained = alone or self.warm_start or TEACHER in self.arguments.graph.trained
        return load_model(name, "model", frozen=not trained)

    def data_collator(self, given: Mapping[str, Any]) -> Any:
        """Return the data collator: the user's, or one for two tokenizers if the models have them.

        Raises:
            ValueError: It is one for two tokenizers, and the student's is not given.
        """
        collator, tokenizer = given.get("data_collator"), given.get("processing_class")
        if isinstance(collator, PairDataCollator) and self.student_processing_class is None:
            raise ValueError(
                "`data_collator` is a `PairDataCollator`, and `student_processing_class` is None, so that inputs with "
                "`student_` before their names are inputs of both models. Pass the student's tokenizer as "
                "`student_processing_class`."
            )
        if collator is None and tokenizer is not None and self.student_processing_class is not None:
            return PairDataCollator.of(tokenizer, self.student_processing_class)
        return collator

    # ---- The models ----

    def learners(self, teacher: PreTrainedModel, trial: Any = None) -> dict[str, nn.Module]:
        """Load or make the other models, and check that all fit together.

        Args:
            teacher: The teacher.
            trial: Trial of a hyperparameter search.

        Returns:
            The learners by name, the teacher first.

        Raises:
            ValueError: The models do not fit together or cannot be trained as the mode asks.
        """
        graph = self.arguments.graph
        set_seed(self.seed)  # a new head, or a student from a config
        if self.student_init is not None:
            student = self.student_init(trial) if number_of_arguments(self.student_init) else self.student_init()
        elif isinstance(self.student, NAME_OR_PATH):
            student = load_model(self.student, "student_model", like=teacher, frozen=STUDENT in graph.frozen)
        elif makes_student(self.student):
            student = self.student(teacher)
            if not isinstance(student, nn.Module):
                raise ValueError(f"The function `student_model` has returned {student!r}, which is no model.")
        else:
            student = self.student
        if isinstance(self.pretrained, NAME_OR_PATH):
            self.pretrained = load_model(self.pretrained, "pretrained_teacher", like=teacher, frozen=True)
        learners = {TEACHER: teacher, STUDENT: student}
        self.task = check_learners(
            self.arguments,
            learners,
            self.pretrained,
            self.task,
            self.soft_loss_func is not None,
            bool(self.warm_start),
        )
        share = self.arguments.share
        self._shared_layers = [] if share is None else share_modules(teacher, student, share)
        return learners

    def check_setup(
        self,
        learners: Mapping[str, nn.Module],
        given: Mapping[str, Any],
        augmentation: Callable | None = None,
        augmented: str = "both",
    ) -> None:
        """Refuse what does not fit the models, and open the cache of the frozen teacher.

        Args:
            learners: The learners by name.
            given: The arguments of Trainer by name.
            augmentation: The trainer's argument.
            augmented: The trainer's argument.

        Raises:
            ValueError: Data, tokenizers, the optimizer, the augmentation or the cache do not fit the models.
        """
        args = given.get("args")
        check_setup(
            self.task,
            self.arguments,
            args,
            learners,
            self.pretrained,
            _datasets(given),
            processing_class=given.get("processing_class") or getattr(given.get("data_collator"), "tokenizer", None),
            student_processing_class=self.student_processing_class,
            augmentation=augmentation,
            augmented=augmented,
            optimizer=(given.get("optimizers") or (None,))[0],
            optimizer_cls_and_kwargs=given.get("optimizer_cls_and_kwargs"),
            data_collator=given.get("data_collator"),
            has_soft_loss=self.soft_loss_func is not None,
        )
        if self.arguments.pretrained_cache_dir is not None:
            precision = "no" if args is None else args.mixed_precision
            self.cache = PretrainedCache(self.arguments.pretrained_cache_dir, self.pretrained, self.task, precision)

    def pair_of(self, learners: Mapping[str, nn.Module]) -> CoDistillationModel:
        """Join the models of `learners`; the frozen teacher is set to evaluation mode and `requires_grad=False`."""
        if self.pretrained is not None:
            self.pretrained.eval().requires_grad_(False)
        two_tokenizers = self.student_processing_class is not None
        pair = CoDistillationModel(
            learners, self.task, self.arguments, self.pretrained, self.soft_loss_func, two_tokenizers
        )
        pair.teacher_cache = self.cache
        if self._shared_layers:
            pair.shared_run = SharedRun(self._shared_layers, pair.own_parameters(STUDENT))
        return pair


def _datasets(given: Mapping[str, Any]) -> dict[str, Any]:
    return {argument: given.get(argument) for argument in ("train_dataset", "eval_dataset")}


def make_pair(
    teacher: PreTrainedModel,
    student: StudentSource,
    arguments: DistillationArguments | None = None,
    *,
    pretrained_teacher: PreTrainedModel | str | os.PathLike | None = None,
    task: Task | str | None = None,
    soft_loss_func: SoftLossFunction | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    student_processing_class: PreTrainedTokenizerBase | None = None,
) -> CoDistillationModel:
    """Make a pair for a training loop of your own.

    Its forward returns the weighted sum of all losses as `loss`. The trainer makes its pair in the same way.

    Args:
        teacher: The teacher.
        student: The student: a model, a name or path, or a function that makes it from the teacher.
        arguments: The weights, the soft loss and the temperature: a `DistillationArguments` or a
            `CoDistillationTrainingArguments`. By default CTCD with weights of 1. Learning rates and clipping are the
            loop's business.
        pretrained_teacher: A frozen model from which both learn (Community KD).
        task: The task, or its name, if the class of the models does not tell it.
        soft_loss_func: Compares the outputs of two models in place of the task; see `CoDistillationTrainer`.
        processing_class: The tokenizer, to check that it fits the models.
        student_processing_class: The student's tokenizer if it is not the teacher's.

    Returns:
        The pair, in training mode. `pair.teacher` and `pair.student` are the plain models.

    Raises:
        ValueError: The models and the arguments do not fit together.

    Example:
        ```python
        pair = make_pair(teacher, student)
        optimizer = torch.optim.AdamW(pair.parameters(), lr=5e-5)
        for batch in loader:
            pair(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        pair.save_pretrained("out")  # the teacher in out/, the student in out/student/
        ```
    """
    sources = PairSources(
        arguments or DistillationArguments(),
        student,
        pretrained=pretrained_teacher,
        task=task,
        soft_loss_func=soft_loss_func,
        student_processing_class=student_processing_class,
    )
    given = {"args": arguments if hasattr(arguments, "output_dir") else None, "processing_class": processing_class}
    sources.check_before_loading(given)
    if sources.arguments.warm_start and not sources.arguments.by_recipe & {"warm_start_epochs", "warm_start_steps"}:
        name = "warm_start_steps" if sources.arguments.warm_start_steps else "warm_start_epochs"
        raise ValueError(
            f"`{name}={getattr(sources.arguments, name)}` is for the trainer. In your own loop, train the teacher "
            "before you make the pair, and leave the argument out."
        )
    learners = sources.learners(teacher)
    sources.check_setup(learners, given)
    return sources.pair_of(learners).train()
