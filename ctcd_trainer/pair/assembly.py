"""Make a pair: load or make the models, check that they fit together, join them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import number_of_arguments

from ..arguments import DistillationArguments
from ..checks.arguments import check_arguments, check_optimizer, check_pretrained_cache, check_roles
from ..checks.data import check_dataset, check_labels, check_tokenizer, check_vocabularies
from ..checks.models import check_adapters, check_frozen, check_models, check_prompts, check_trainable
from ..graph import STUDENT, TEACHER
from ..losses.objective import SoftLossFunction
from ..losses.teacher_cache import PretrainedCache
from ..tasks import Task
from ..tasks.two_tokenizers import PairDataCollator, check_student_inputs
from .loading import load_model
from .model import CoDistillationModel
from .shared_layers import SharedRun, share_modules

#: What `from_pretrained` takes.
NAME_OR_PATH = (str, os.PathLike)


@dataclass
class PairSources:
    """The models besides the teacher as the user gave them, and the pair that is made of them.

    Attributes:
        arguments: The distillation arguments.
        student: A model, a name or a path, or `None`.
        student_init: Makes the student, with no argument or with the trial of a hyperparameter search, or `None`.
        pretrained: The frozen teacher: a model, a name or a path, or `None`. After `learners` it is a model.
        task: The task, its name, or `None` to recognise it. After `learners` it is a `Task`.
        soft_loss_func: The user's function that compares outputs, or `None`.
        student_processing_class: The student's tokenizer if it is not the teacher's.
        seed: Seed of the weights that loading or making a model draws.
    """

    arguments: DistillationArguments
    student: PreTrainedModel | str | os.PathLike | None = None
    student_init: Callable[..., PreTrainedModel] | None = None
    pretrained: PreTrainedModel | str | os.PathLike | None = None
    task: Task | str | None = None
    soft_loss_func: SoftLossFunction | None = None
    student_processing_class: PreTrainedTokenizerBase | None = None
    seed: int = 42
    cache: PretrainedCache | None = field(default=None, init=False)
    _shared_layers: list[nn.Module] = field(default_factory=list, init=False)

    @property
    def given(self) -> bool:
        """Whether there is any model besides the teacher."""
        return any(source is not None for source in (self.student, self.student_init, self.pretrained))

    # ---- Before the models are loaded ----

    def check_before_loading(self, given: Mapping[str, Any]) -> None:
        """Refuse what can be refused without the models.

        Args:
            given: The arguments of Trainer by name.

        Raises:
            ValueError: A model is missing or has no use, arguments contradict each other, or a data set is empty.
        """
        if self.student is not None and self.student_init is not None:
            raise ValueError("`student_model` and `student_model_init` are both given: pass one of them.")
        if given.get("model_init") is not None and self.student_init is None and self.student is not None:
            raise ValueError(
                "`model_init` makes a new teacher for each training, and the student must be new as well: pass "
                "`student_model_init` instead of `student_model`."
            )
        has_student = self.student is not None or self.student_init is not None
        check_roles(self.arguments.distillation_mode, self.arguments.graph, has_student, self.pretrained is not None)
        check_arguments(given.get("args"))
        check_pretrained_cache(self.arguments, self.soft_loss_func is not None)
        for argument in ("train_dataset", "eval_dataset"):
            check_dataset(given.get(argument), argument)

    def load_teacher(self, name: str | os.PathLike, alone: bool = False) -> PreTrainedModel:
        """Load the teacher by name or path.

        Args:
            name: The name or path.
            alone: Whether it is trained without a student.
        """
        set_seed(self.seed)  # the head may be new
        return load_model(name, "model", frozen=not alone and TEACHER in self.arguments.graph.frozen)

    def data_collator(self, given: Mapping[str, Any]) -> Any:
        """Return the data collator: the user's, or one for two tokenizers if the models have them."""
        collator, tokenizer = given.get("data_collator"), given.get("processing_class")
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
        arguments, graph = self.arguments, self.arguments.graph
        set_seed(self.seed)  # a new head, or a student from a config
        if self.student_init is not None:
            student = self.student_init(trial) if number_of_arguments(self.student_init) else self.student_init()
        elif isinstance(self.student, NAME_OR_PATH):
            student = load_model(self.student, "student_model", like=teacher, frozen=STUDENT in graph.frozen)
        else:
            student = self.student
        if isinstance(self.pretrained, NAME_OR_PATH):
            self.pretrained = load_model(self.pretrained, "pretrained_teacher", like=teacher, frozen=True)
        others = {"student_model": student}
        if self.pretrained is not None:
            others["pretrained_teacher"] = self.pretrained
        check_adapters("model", teacher)
        check_adapters("student_model", student)
        self.task = check_models(
            teacher, others, self.task, self.soft_loss_func is not None, may_share=arguments.share is not None
        )
        self._shared_layers = [] if arguments.share is None else share_modules(teacher, student, arguments.share)
        learners = {TEACHER: teacher, STUDENT: student}
        for name in graph.trained:
            check_trainable(name, learners[name], arguments.distillation_mode)
        for name in graph.frozen:
            check_frozen(name, learners[name], arguments.distillation_mode)
        return learners

    def check_data(self, learners: Mapping[str, nn.Module], given: Mapping[str, Any]) -> None:
        """Refuse tokenizers, data and an optimizer that do not fit the models; open the cache of the frozen teacher.

        Args:
            learners: The learners by name.
            given: The arguments of Trainer by name.

        Raises:
            ValueError: They do not fit.
        """
        args = given.get("args")
        datasets = {argument: given.get(argument) for argument in ("train_dataset", "eval_dataset")}
        tokenizer = given.get("processing_class") or getattr(given.get("data_collator"), "tokenizer", None)
        if self.student_processing_class is not None:
            check_student_inputs(self.task, datasets, self.arguments.share)
            own = getattr(self.student_processing_class, "tokenizer", self.student_processing_class)
            remedy = "Pass the tokenizer that the student was trained with."
            check_tokenizer(learners[STUDENT], "student_model", own, "`student_processing_class`", remedy)
        else:
            check_vocabularies(learners[TEACHER], learners[STUDENT], "student_model", tokenizer)
        check_vocabularies(learners[TEACHER], self.pretrained, "pretrained_teacher", tokenizer)
        graph = self.arguments.graph
        check_optimizer(
            (given.get("optimizers") or (None,))[0], {name: learners[name] for name in graph.trained}, args
        )
        for argument, dataset in datasets.items():
            check_labels(self.task, dataset, argument, sorted({edge.learner for edge in graph.edges}))
        if args is not None and args.load_best_model_at_end:
            check_prompts(learners, "`load_best_model_at_end=True`")
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


def make_pair(
    teacher: PreTrainedModel,
    student: PreTrainedModel | str | os.PathLike,
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
        student: The student: a model, or a name or path.
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
    learners = sources.learners(teacher)
    sources.check_data(learners, given)
    return sources.pair_of(learners).train()
