"""The trainer: every hook of Trainer that is changed for models that teach each other.

Each hook hands over to a part: the pair (losses), `PairEvaluation`, `PairCheckpoints`, `PairUploads`, the functions of
`training/optimizer.py` and `training/search.py`. No part is given the trainer.
"""

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    enable_full_determinism,
    set_seed,
)
from transformers.hyperparameter_search import default_hp_search_backend
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    BestRun,
    HPSearchBackend,
    HubStrategy,
    PredictionOutput,
    TrainOutput,
    align_special_tokens,
)
from transformers.utils import logging

from .arguments import DistillationArguments, learner_arguments
from .cards.card import CardOptions, save_model_cards, write_model_cards
from .cards.facts import CardFacts
from .checks import (
    CheckedCollator,
    check_evaluated,
    check_features_strategy,
    check_kinds,
    check_projections,
    check_strategy,
)
from .edges import held_out_edges
from .graph import LEARNERS, PRETRAINED, STUDENT, TEACHER, Graph
from .hub.repositories import PairUploads
from .losses.objective import Progress, SoftLossFunction, rows_in
from .model_structure import accepts_loss_kwargs, base_model, hidden_quantisation, is_peft_model, is_quantised
from .pair.assembly import PairSources, StudentSource
from .pair.copies import Copies
from .pair.fused_heads import FusedHeads
from .pair.learner_view import LearnerView
from .pair.model import CoDistillationModel
from .recipes import RECIPES
from .saving.best_student import BestStudent
from .saving.checkpoints import PairCheckpoints
from .saving.weights import check_written_with_fsdp
from .tasks import Task, UnknownHead
from .tasks.labels import IGNORE_INDEX, TARGETS
from .tasks.two_tokenizers import PREFIX
from .training import search, warm_start
from .training.augmentation import Augmentation, Mixup, Views, augmented_batch, recounted
from .training.evaluation import CoDistillationEvalLoopOutput, CoDistillationPredictionOutput, PairEvaluation
from .training.held_out import HeldOutErrors, HeldOutWeights
from .training.meters import LossMeter, warn_of_closed_gates
from .training.optimizer import (
    check_frozen_unchanged,
    clip_each,
    create_optimizer,
    default_learning_rates,
    learning_rates,
    loading,
    with_own_schedules,
)
from .training.sharding import heads_in_root, shard_frozen

logger = logging.get_logger(__name__)


def for_pairs(hook: Callable) -> Callable:
    """Call Trainer's own method in place of a hook where there is no student."""

    @functools.wraps(hook)
    def choose(self: "CoDistillationMixin", *args: Any, **kwargs: Any) -> Any:
        if self.pair is None:
            return getattr(super(CoDistillationMixin, self), hook.__name__)(*args, **kwargs)
        return hook(self, *args, **kwargs)

    return choose


class CoDistillationMixin:
    """Makes any Trainer class train a teacher and a student together: `class Mine(CoDistillationMixin, TheirTrainer)`.

    The other class must be a `transformers.Trainer` whose `__init__` takes the model and the arguments by name. See
    `CoDistillationTrainer` for the arguments.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the signature of the class name the arguments of its Trainer class and of the mixin."""
        super().__init_subclass__(**kwargs)
        theirs = _trainer_arguments(cls)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if cls.__init__ is CoDistillationMixin.__init__:
            own = [parameter for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
            parameters = sorted([*theirs, *own], key=lambda parameter: parameter.kind)  # `**kwargs` last
        cls.__signature__ = inspect.Signature(parameters)

    def __init__(
        self,
        *args: Any,
        student_model: StudentSource | None = None,
        student_model_init: Callable[..., PreTrainedModel] | None = None,
        student_processing_class: PreTrainedTokenizerBase | None = None,
        pretrained_teacher: PreTrainedModel | str | os.PathLike | None = None,
        augmentation: Augmentation | None = None,
        augmented: Views = "both",
        task: Task | str | None = None,
        soft_loss_func: SoftLossFunction | None = None,
        **kwargs: Any,
    ) -> None:
        theirs = _trainer_arguments(type(self))
        names = [parameter.name for parameter in theirs if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes the {len(names)} arguments {names}, not {len(args)}.")
        given = dict(zip(names, args, strict=False)) | kwargs
        twice = [name for name in names[: len(args)] if name in kwargs]
        if twice:
            raise TypeError(
                f"`{twice[0]}` is given twice, by its place and by its name. Give all arguments after `args` by name, "
                "the student too (`student_model=...`)."
            )
        check_kinds(given | {"student_model": student_model, "pretrained_teacher": pretrained_teacher})
        arguments: TrainingArguments | None = given.get("args")
        self.pair: CoDistillationModel | None = None
        self.distillation = arguments if isinstance(arguments, DistillationArguments) else DistillationArguments()
        self.student_processing_class = student_processing_class
        self.augmentation, self.augmented = augmentation, augmented
        self.uploads: PairUploads | None = None
        self.checkpoints: PairCheckpoints | None = None
        #: The costs of the warm start, as metrics; `None` before it.
        self._warm_start_costs: dict[str, float] | None = None
        self._loss_meter = LossMeter()
        self._grad_norms: dict[str, Tensor] = {}
        self._learning_rates: dict[str, float] = {}
        #: The rates that follow from the models, by argument, where the user has set none.
        self._default_rates: dict[str, float] = {}
        #: The user's own value, of the class or set later, which holds for `compute_loss`.
        self._loss_is_scaled: bool | None = None
        self._sources = PairSources(
            self.distillation,
            student_model,
            student_model_init,
            pretrained_teacher,
            task,
            soft_loss_func,
            student_processing_class,
            seed=TrainingArguments.seed if arguments is None else arguments.seed,
        )
        plain = not isinstance(arguments, DistillationArguments) or arguments.distillation_mode == "standalone"
        #: True if there is, or will be, a pair.
        self._paired = self._sources.given or not plain
        if self._paired:
            self._sources.check_before_loading(given)
            check_evaluated(self.graph, arguments)
            self.evaluation = PairEvaluation(arguments, given.get("compute_metrics"))
        self._sources.check_warm_start(given)
        if isinstance(given.get("model"), (str, os.PathLike)):
            given["model"] = self._sources.load_teacher(given["model"], alone=not self._paired)
        teacher, learners = given.get("model"), None
        if self._paired:
            given["data_collator"] = self._sources.data_collator(given)
            learners = None if teacher is None else self._checked_learners(teacher, given)
        frozen = learners is not None and TEACHER in self.graph.frozen and is_quantised(teacher)
        frozen = frozen and not self._sources.warm_start
        with hidden_quantisation(teacher) if frozen else nullcontext():
            super().__init__(**given)
        #: Attributes that Trainer has read off the teacher and that the pair replaces.
        self._of_teacher = {
            name: getattr(self, name, None) for name in ("model_accepts_loss_kwargs", "_loss_shifts_labels")
        }
        if self._paired:
            check_strategy(
                self.accelerator, self.pretrained_teacher is not None, self.distillation.share, self.args, self.graph
            )
            check_features_strategy(self.accelerator, self.args)
            logging.get_logger("ctcd_trainer").setLevel(self.args.get_process_log_level())
            if self.distillation.recipe_log and self.is_world_process_zero():
                log = "\n  ".join(self.distillation.recipe_log)
                logger.warning("`recipe=%r` has set what you have not:\n  %s", self.distillation.recipe, log)
            learners = learners or self._checked_learners(self.model, given)
            # Trainer has learnt what it needs (label names, device placement, ...) from the teacher, and may have
            # wrapped it; from here on its model is the pair.
            self._install_pair(learners | {TEACHER: self.model})
            metric = getattr(self.args, "student_metric_for_best_model", None)
            if metric is not None:
                self.add_callback(BestStudent(metric, self.args.student_greater_is_better))

    # ---- The pair ----

    @property
    def teacher_model(self) -> PreTrainedModel:
        """The plain teacher, whatever wraps the pair."""
        return self.model if self.pair is None else self.pair.teacher

    @property
    def student_model(self) -> PreTrainedModel | None:
        """The plain student, whatever wraps the pair; `None` without a student."""
        return None if self.pair is None else self.pair.student

    @property
    def pretrained_teacher(self) -> PreTrainedModel | None:
        """The frozen teacher from which both learn (Community KD), outside of the pair; `None` without one."""
        return self._sources.pretrained

    @property
    def graph(self) -> Graph:
        """Who learns from whom, with which weights."""
        return self.distillation.graph

    @property
    def task(self) -> Task | None:
        """The task of the models; `None` without a student."""
        return None if self.pair is None else self.pair.task

    def _checked_learners(self, teacher: PreTrainedModel, given: dict[str, Any]) -> dict[str, nn.Module]:
        """Make the other models, and refuse what does not fit them."""
        learners = self._sources.learners(teacher)
        self._sources.check_setup(learners, given, self.augmentation, self.augmented)
        return learners

    def _install_pair(self, learners: dict[str, nn.Module]) -> None:
        """Make the pair the trainer's model, and do for the other models what Trainer did for the teacher."""
        self._trainable = [p for p in learners[TEACHER].parameters() if p.requires_grad]  # before the pair freezes it
        self.pair = self._sources.pair_of(learners)
        self.remove_callback(Copies)
        if self.pair.copies.models:
            self.add_callback(self.pair.copies)
        if isinstance(self.task, UnknownHead):
            self.task.label_names = tuple({*Task.label_names, *self.label_names})
        for name, model in self.pair.models.items():
            if name != self.pair.primary and self.place_model_on_device and not is_quantised(model):
                self._move_model_to_device(model, self.args.device)
        for links in self.pair.feature_links.values():
            self._move_model_to_device(links, self.args.device)
        self.checkpoints = PairCheckpoints(self.pair, self.args, self.processing_class_of, self._save_cards)
        self._hand_over()
        self.model = self.model_wrapped = self.callback_handler.model = self.pair
        # Trainer calls these for its model, the pair. The pair's versions call those of the class for each learner, so
        # that a subclass overrides them as if it trained one model.
        self.compute_loss, self.create_optimizer = self._pair_loss, self._pair_optimizer
        self.prediction_step = self._primary_prediction_step
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False  # the task counts

    def _hand_over(self) -> None:
        """Give the parts the arguments and loss functions of the trainer, which may have changed since."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:  # not every version of Trainer has it
            self._loss_is_scaled = self.loss_is_scaled_for_ga
        # The pair divides every term of the loss by the item count of the whole accumulated batch. Trainer divides by
        # the number of micro-batches if a subclass has dropped the count.
        self.loss_is_scaled_for_ga = None
        self.pair.objective.compute_loss_func = self.compute_loss_func
        self.pair.objective.label_smoother = self.label_smoother
        held_out = HeldOutWeights.among(self.callback_handler.callbacks)
        if held_out is not None:
            self.pair.objective.held_out = held_out
        for part in (self.checkpoints, self.evaluation, self.uploads):
            if part is not None:
                part.args = self.args

    @contextmanager
    def _teacher_alone(self, args: TrainingArguments) -> Iterator[None]:
        """Be a plain Trainer of the teacher with these arguments for a while; then make a new student and a new pair.

        Before and after, nothing is left of another training.
        """
        pairs, teacher, scaler = self.args, self.teacher_model, self.accelerator.scaler
        callbacks = [(callback, _state_of(callback)) for callback in self.callback_handler.callbacks]
        scaling = None if scaler is None else scaler.state_dict()
        del self.compute_loss, self.create_optimizer, self.prediction_step
        vars(self).update(self._of_teacher, loss_is_scaled_for_ga=self._loss_is_scaled)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        no_edges = DistillationArguments(distillation_mode="standalone")
        alone = CoDistillationModel({TEACHER: teacher}, self.task, no_edges)
        self.checkpoints = PairCheckpoints(alone, args, self.processing_class_of, lambda folder, only: None)
        self.pair, self.args = None, args
        self.model = self.model_wrapped = self.callback_handler.model = teacher
        self._begin_anew()
        try:
            yield
        finally:
            self.args = pairs
            self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)  # undoes autocast
            self.callback_handler.callbacks = [callback for callback, _ in callbacks]  # resuming has replaced some
            for callback, state in callbacks:
                for name, value in state.items():
                    setattr(callback, name, value)
            self.control = TrainerControl()
            if scaler is not None:
                scaler.load_state_dict(scaling)
            self._install_pair(self._sources.learners(teacher))
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget the model that was trained before, and set the seed as a new Trainer does."""
        for owner in (self, self.callback_handler):
            owner.optimizer = owner.lr_scheduler = None
        self._signature_columns, self._train_batch_size = None, self.args.train_batch_size
        self.current_flos = 0
        getattr(self, "_eval_dataloaders", {}).clear()
        self.accelerator.free_memory()
        enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)

    @property
    def _rated_args(self) -> TrainingArguments:
        """The arguments with the learning rates that follow from the models."""
        args = copy.copy(self.args) if self._default_rates else self.args
        vars(args).update(self._default_rates)
        return args

    @contextmanager
    def _as_trainer_of(self, learner: str) -> Iterator[None]:
        """Let the hooks of the class see a learner, and the arguments that hold for it, in place of the pair."""
        pairs = self.model, self.model_wrapped, self.args
        self.model = self.model_wrapped = self.pair.learners[learner]
        self.args = learner_arguments(self._rated_args, learner)
        try:
            yield
        finally:
            self.model, self.model_wrapped, self.args = pairs

    def _overrides(self, hook: str) -> bool:
        """Tell whether a class, above or below the mixin, has its own method in place of Trainer's."""
        return getattr(type(self), hook) is not getattr(Trainer, hook)

    def processing_class_of(self, learner: str) -> Any:
        """Return the tokenizer or processor of a learner; `None` if none is known."""
        own = self.student_processing_class if learner == STUDENT else None
        return own or self.processing_class or getattr(self.data_collator, "tokenizer", None)

    @for_pairs
    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a pair of a new teacher from `model_init` and a new student from `student_model_init`."""
        self._hp_search_setup(trial)  # Trainer would do it later, and the mode of the trial makes the pair
        self._install_pair(self._sources.learners(super().call_model_init(trial), trial))
        return self.model

    @for_pairs
    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that any model's `forward` names."""
        if self._signature_columns is None:
            known = self.pair.known_inputs
            own = {f"{PREFIX}{name}" for name in known} if self.pair.two_tokenizers else ()
            targets = (TARGETS,) if self.pair.objective.from_column else ()
            self._signature_columns = sorted({*known, *own, *targets, "label", "label_ids", *self.label_names})
        super()._set_signature_columns_if_needed()

    # ---- Training ----

    @for_pairs
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, after the warm start if there is one; see `Trainer.train`.

        Remains of a checkpoint that a killed training left are removed first. A second call trains on, without another
        warm start.

        Args:
            resume_from_checkpoint: As in Trainer. True stands for the last checkpoint of the pair, or else for the
                last state of the warm start.
            *args: As in Trainer.
            **kwargs: As in Trainer.

        Returns:
            Trainer's output. Its metrics have the costs of the warm start too (`warm_start_runtime` in seconds, of
            its last run; `warm_start_steps`, `warm_start_flos`).

        Raises:
            ValueError: A hook or an argument was changed since the trainer was made, or a checkpoint is not there.
        """
        if self.compute_loss != self._pair_loss:
            raise ValueError(
                "`trainer.compute_loss` was replaced by an assignment, which would compute the loss of the pair as "
                "that of one model. Override the method in a subclass, or pass `compute_loss_func`."
            )
        if self.distillation.warm_start and self._sources.warm_start is None:
            raise ValueError("A warm start was asked for after the trainer was made. Make a new trainer.")
        self.checkpoints.clean_up(Path(self.args.output_dir))
        if self._sources.warm_start and (resume_from_checkpoint or self._warm_start_costs is None):
            resume_from_checkpoint = self._warm_start(resume_from_checkpoint, *args, **kwargs)
        self.pair.copies.restart()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        output.metrics.update(self._warm_start_costs or {})
        return output

    def _warm_start(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> str | None:
        """Train the teacher alone, as far as that is not done; return the checkpoint of the pair to go on from."""
        warm = warm_start.WarmStart(self.args)
        self.checkpoints.clean_up(warm.folder)
        checkpoint, own = warm.point(resume_from_checkpoint)
        wait_for_everyone()  # before a process changes what the others are looking at
        if checkpoint is not None:
            own = str(Path(checkpoint).parent / warm_start.FOLDER / TEACHER)
            if not is_peft_model(self.student_model):
                self._warm_start_costs = warm_start.read_costs(own)
                return checkpoint
            # The checkpoint has the adapter of the student, and not the model that was cut from the trained teacher.
            if not os.path.isdir(own):
                raise ValueError(
                    f"Resuming from {checkpoint!r} needs the teacher of its warm start, from which the base of the "
                    f"student's adapter was cut, and there is no folder {own!r}. Move it there."
                )
        with self._teacher_alone(warm.arguments):
            if own is not None and warm_start.is_complete(own):
                logger.info("The teacher is taken from the warm start in %s.", own)
                self._load_from_checkpoint(own)
                self._warm_start_costs = warm_start.read_costs(own)
            else:
                logger.info(
                    "Warm start: the teacher is trained alone for %s, at a learning rate of %g, in %s. Then the "
                    "student is made from it.",
                    *(warm.length, self.args.learning_rate, warm.folder),
                )
                saves = self.args.save_strategy != "no"
                if own is None and self.args.should_save:
                    warm.set_aside(anew=saves)
                costs = warm_start.costs_of(super().train(own, *args, **kwargs), self.state)
                if saves:
                    with self.checkpoints.whole(warm.teacher) as written:
                        self.save_model(str(written), _internal_call=True)
                        if self.args.should_save:
                            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                            warm_start.save_costs(written, costs)
                self._warm_start_costs = costs
        logger.info("The warm start has taken %s. Now teacher and student are trained.", self._warm_start_costs)
        return checkpoint

    @for_pairs
    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Do for the other learners what `Trainer.train` has done for the teacher, and train.

        Raises:
            FloatingPointError: A loss of any model is not finite; names the model, the component and the step.
        """
        check_evaluated(self.graph, self.args)
        if held_out_edges(self.graph) and HeldOutWeights.among(self.callback_handler.callbacks) is None:
            self.add_callback(HeldOutWeights())
        self._loss_meter = LossMeter()  # `auto_find_batch_size` runs this several times
        self.pair.fused_heads = FusedHeads()  # heads, adapters and loss functions may have changed
        self._hand_over()
        if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
            for name in list(self.pair.learners)[1:]:
                align_special_tokens(self.pair.learners[name], self.processing_class_of(name))
        with ExitStack() as afterwards:
            if self.pair.teacher_cache is not None:
                afterwards.callback(self.pair.teacher_cache.finish)
            self._noise_embeddings(afterwards)
            return super()._inner_training_loop(*args, **kwargs)

    def _noise_embeddings(self, afterwards: ExitStack) -> None:
        """Add NEFTune's noise to the embeddings of the learners beside the teacher, which Trainer has noised."""
        noised: set[nn.Module] = set()
        for model in map(base_model, self.pair.learners.values()) if self.neftune_noise_alpha is not None else ():
            if noised and model.get_input_embeddings() not in noised:
                handle = activate_neftune(model, self.neftune_noise_alpha)
                afterwards.callback(deactivate_neftune, model, handle)
            noised.add(model.get_input_embeddings())

    @for_pairs
    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        """Wrap the pair and make its optimizer, as Trainer does; place the frozen teacher, too."""
        self._place_pretrained()
        with heads_in_root(self.pair, all_heads=self.task.language_model and self.distillation.fused_lm_head):
            return super()._prepare_for_training(*args, **kwargs)

    def _place_pretrained(self) -> None:
        """Place the frozen teacher where Trainer leaves that to the strategy, sharded if the strategy shards."""
        for model in self.pair.sources.values():
            if is_quantised(model):
                continue  # it is where it was loaded to
            if self.is_fsdp_enabled and self.accelerator.is_fsdp2 and self.pair.teacher_cache is None:
                shard_frozen(model, self.accelerator)
            elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
                # With a cache, a process runs it only for rows that are new to it: sharded, it would wait for others.
                self._move_model_to_device(model, self.args.device)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch, but not if the resumed training was at its end: Trainer would do one step more."""
        if self._paired and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @for_pairs
    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Make a data loader whose batches are checked before a device gets them; see `CheckedCollator`."""
        users, known = self.data_collator, hasattr(dataset, "column_names") or isinstance(dataset, (list, tuple))
        users_loss = self.compute_loss_func is not None or self._overrides("compute_loss")
        task = None if known or users_loss else self.task
        self.data_collator = CheckedCollator(users, description.lower(), task)
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = users

    @for_pairs
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Do a training step on the batch as `augmentation` changes it; see `Trainer.training_step`."""
        if self.augmentation is None:
            return super().training_step(model, inputs, num_items_in_batch)
        before = self._prepare_inputs(inputs)
        inputs = augmented_batch(before, self.augmentation, self.augmented, self.task)
        number = recounted(num_items_in_batch, self.augmentation, self.task, before, inputs)
        models = list(self.pair.models.values())
        within = self.augmentation.within(models) if isinstance(self.augmentation, Mixup) else nullcontext()
        with within:
            return super().training_step(model, inputs, number)

    @for_pairs
    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Count the scored items of the accumulated batch on all processes.

        Returns:
            The number; for tasks of whole rows, or with a feature loss, `(3,)` with the numbers of labels, of labelled
            items and of rows. Without labels, which a feature loss alone does not need, no item is scored.
        """
        count = super()._get_num_items_in_batch
        labelled = not self.graph.features_alone or all(map(self.pair.objective.is_labelled, batch_samples))
        rows = [{"labels": torch.zeros(rows_in(batch), dtype=torch.long)} for batch in batch_samples]
        nothing = [{"labels": row["labels"] + IGNORE_INDEX} for row in rows]
        counted = [{"labels": self.task.counted(batch)} for batch in batch_samples] if labelled else nothing
        number = items = count(counted, device)
        if number is None or not (self.task.per_row or self.pair.feature_links):
            return number
        if self.task.per_row and labelled:

            def count_rows(mark: Callable[[dict[str, Any]], Tensor]) -> Tensor:
                return count(
                    [{"labels": torch.where(mark(batch), 0, IGNORE_INDEX)} for batch in batch_samples], device
                )

            objective, items = self.pair.objective, count_rows(self.task.labelled)
            rows = [{"labels": self.task.distilled(batch).long()} for batch in batch_samples]
            if objective.from_column:
                holds = {
                    e.rows: functools.partial(objective.holds, e) for e in self.graph.edges if e.source == PRETRAINED
                }
                objective.rows_with_target = {name: count_rows(mark) for name, mark in holds.items()}
        return torch.stack([number, items, count(rows, device)])

    def _pair_loss(
        self,
        model: nn.Module | LearnerView,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss that the pair computes in its forward; see `CoDistillationModel.forward`.

        Takes the place of `compute_loss`. If a class overrides that, it is the task loss of each learner.

        Args:
            model: The pair, wrapped or not; or a `LearnerView`, for the hard loss of one learner. Any other model,
                such as an average of weights, has the loss that the class computes for it.
            inputs: The batch.
            return_outputs: Whether to return the outputs as well.
            num_items_in_batch: Scored items in the accumulated batch of all processes.
        """
        if not isinstance(model, LearnerView) and not any(isinstance(m, CoDistillationModel) for m in model.modules()):
            return type(self).compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        self._hand_over()
        objective = self.pair.objective
        objective.progress = Progress(self.state.global_step, self.state.max_steps, self.state.epoch or 0.0)
        scale: float = 1
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP averages gradients over the processes, while `num_items_in_batch` counts the items of all of them.
            scale = self.accelerator.num_processes
        if self._overrides("compute_loss"):
            objective.learner_loss = functools.partial(self._learner_loss, scale)
        logits = {"return_logits": True} if return_outputs and not isinstance(model, LearnerView) else {}
        try:
            with self.accelerator.autocast():  # also where a user calls this method
                outputs = model(**inputs, num_items_in_batch=num_items_in_batch, **logits)
        finally:
            objective.learner_loss = None
        loss = self.task.named(outputs).get("loss")
        if loss is None:
            raise ValueError(
                f"The models have computed no loss for a batch of {sorted(inputs)}: name the label column 'label' or "
                "'labels', or pass a `data_collator` that makes them."
            )
        if not isinstance(model, LearnerView):
            logged: float = scale
            if num_items_in_batch is None:  # the caller divides the means of the micro-batches
                labelled = self.task.counted(inputs).ne(IGNORE_INDEX).any()
                logged = 1 / self._micro_batches
            else:
                labelled = torch.as_tensor(num_items_in_batch).reshape(-1)[0]
            self._loss_meter.add(outputs["losses"], self.state.global_step + 1, logged, labelled)
        loss = loss * scale if scale != 1 else loss
        return (loss, outputs) if return_outputs else loss

    def _learner_loss(
        self, scale: float, learner: str, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """Call the `compute_loss` of the class for a learner, and divide the loss where `training_step` would do it.

        Args:
            scale: The factor of the pair's loss.
            learner: Name of the learner.
            inputs: Its part of the batch.
            num_items_in_batch: The number of scored items.

        Returns:
            The loss divided by `scale`, and the outputs; `None` if the method has returned none.
        """
        everyones = self.model_accepts_loss_kwargs
        with self._as_trainer_of(learner):
            self.model_accepts_loss_kwargs = counts = accepts_loss_kwargs(self.model)
            number = num_items_in_batch if counts or self.compute_loss_func is not None else None
            try:
                result = type(self).compute_loss(
                    self, self.model, inputs, return_outputs=True, num_items_in_batch=number
                )
            finally:
                self.model_accepts_loss_kwargs = everyones
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        scaled = self._loss_is_scaled
        if scaled is None:
            scaled = number is not None or self.compute_loss_func is not None
        if not scaled and num_items_in_batch is not None:
            loss = loss / self._micro_batches
        return (loss / scale if scale != 1 else loss), outputs

    @property
    def _micro_batches(self) -> int:
        """Number of micro-batches whose losses are added up, 1 outside of a training step."""
        return getattr(self, "current_gradient_accumulation_steps", 1) if self.pair.training else 1

    @for_pairs
    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        """End the training; see `Trainer`. `train_loss` is the mean of all processes."""
        self._loss_meter.check(self.accelerator.gather)
        self._tr_loss = self.accelerator.gather(self._tr_loss[None]).mean()  # Trainer adds that of one process
        self.checkpoints.remove_all_but_best(self._get_output_dir(trial), self.state.best_model_checkpoint)
        return super()._finalize_training(trial, *args)

    # ---- Optimizer ----

    def _pair_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make one optimizer for all trained learners, in place of `create_optimizer`; see `training/optimizer.py`.

        Args:
            model: Not used: the optimizer holds the parameters of the learners, whatever wraps them.
        """
        check_frozen_unchanged(self.pair, self.distillation)
        if self.optimizer is None:
            users = self._overrides("create_optimizer")
            recipe = RECIPES.get(self.distillation.recipe)
            one_rate = users or self.optimizer_cls_and_kwargs is not None or (recipe is not None and recipe.one_rate)
            self._default_rates = {} if one_rate else default_learning_rates(self.pair, self.args)
            self.optimizer = create_optimizer(self.pair, self._rated_args, self._optimizer_of, users)
        for learner, links in self.pair.feature_links.items():
            check_projections(learner, list(links.projections.parameters()), self.optimizer)
        return self.optimizer

    def _optimizer_of(self, learner: str, args: TrainingArguments) -> torch.optim.Optimizer:
        """Let the `create_optimizer` of the class make the optimizer of a learner, with these arguments."""
        with self._as_trainer_of(learner):
            self.args, self.optimizer = args, None
            return type(self).create_optimizer(self) or self.optimizer

    @for_pairs
    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of the learning rates of all learners; see `with_own_schedules`."""
        if self.lr_scheduler is None:
            make = functools.partial(self._schedule_of, num_training_steps)
            self.lr_scheduler = with_own_schedules(make(optimizer), self._rated_args, make)
        return self.lr_scheduler

    def _schedule_of(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Let Trainer make the schedule of an optimizer."""
        self.lr_scheduler = None
        return super().create_scheduler(num_training_steps, optimizer)

    @for_pairs
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of the optimizer, and refuse that of other learners; see `Trainer`."""
        if checkpoint is None or self.optimizer is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        fsdp1 = self.model if self.is_fsdp_enabled and not self.accelerator.is_fsdp2 else None
        with loading(self.optimizer, checkpoint, self.distillation.distillation_mode, fsdp1):
            super()._load_optimizer_and_scheduler(checkpoint)

    @for_pairs
    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        """Clip each learner by its own norm, and return the norm over all. DeepSpeed clips all by one norm."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        self._grad_norms = clip_each(self.pair, self.args, self.model)
        # Trainer logs the learning rate of the step that is about to be made.
        self._learning_rates = learning_rates(self.optimizer, self._rated_args)
        return torch.stack(list(self._grad_norms.values())).norm()

    @for_pairs
    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Return the norm over all learners; clips here if only another learner than the teacher is to be clipped."""
        if grad_norm is None and not self.is_deepspeed_enabled:
            return self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm)

    # ---- Logs ----

    @for_pairs
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss components, the gradient norms and the learning rates to the training logs; see `Trainer.log`.

        Raises:
            FloatingPointError: A component was not finite since the last log.
        """
        # Trainer passes the time in its training logs, which every process makes: gathering in the log of a user's
        # callback on one process would wait for the others.
        if "loss" in logs and start_time is not None:
            self._loss_meter.check(self.accelerator.gather)
            logs |= self._loss_meter.drain(self.accelerator.gather)
            warn_of_closed_gates(self.graph, logs)
            logs |= self.pair.objective.changing_weights()
            logs |= {f"{name}_grad_norm": float(norm) for name, norm in self._grad_norms.items()}
            logs |= self._learning_rates
        super().log(logs, start_time)

    # ---- Evaluation ----

    @for_pairs
    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate during the training; see `Trainer`. The weights that follow from held-out rows are renewed.

        Raises:
            ValueError: There are such weights, and the evaluation has no labels.
        """
        if not held_out_edges(self.graph):
            return super()._evaluate(*args, **kwargs)
        errors = self.evaluation.errors = HeldOutErrors()  # of all evaluation sets
        try:
            metrics = super()._evaluate(*args, **kwargs)
        finally:
            self.evaluation.errors = None
        self._hand_over()
        self.log(self.pair.objective.held_out.renew(errors, self.graph, self.state.global_step))
        return metrics

    @for_pairs
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> CoDistillationEvalLoopOutput:
        """Evaluate all learners in one pass over the data; see `Trainer.evaluation_loop`.

        Returns:
            The teacher's predictions, and the metrics of all: the teacher's without prefix, `student_*`, `agreement`
            and, for language models, perplexities. The student's predictions are the attribute `student_predictions`.
        """
        if self.is_in_train:
            self._loss_meter.check(self.accelerator.gather)  # before metrics fail on predictions of broken weights
        self._hand_over()
        users = self.compute_metrics, self.preprocess_logits_for_metrics
        try:
            self.compute_metrics, self.preprocess_logits_for_metrics = self.evaluation.start(
                self.pair, *users, metric_key_prefix
            )
            self.prediction_step = self._pair_prediction_step
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = users
            self.prediction_step = self._primary_prediction_step
        return self.evaluation.finish(self.pair, output, metric_key_prefix)

    def _pair_prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Call the `prediction_step` of the class for each learner in turn; the evaluation loop calls this instead.

        Returns:
            The teacher's loss, the logits by name of the learner (`None` if only losses are wanted), and the labels.
        """
        inputs = self._prepare_inputs(inputs)
        losses, logits, labels = {}, {}, None
        views = {name: LearnerView(model, name, learner) for name, learner in self.pair.learners.items()}
        for name, view in views.items():
            with self._as_trainer_of(name):
                losses[name], logits[name], labels = self._prediction_step_of(
                    view, dict(inputs), prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs
                )
        if losses[self.pair.primary] is not None:
            # The loss of nothing on any process is NaN, which Trainer does not count (`logging_nan_inf_filter`).
            items = torch.as_tensor(self._get_num_items_in_batch([inputs], self.args.device)).reshape(-1)[0]
            losses = {name: loss.where(items.to(loss.device) > 0, torch.nan) for name, loss in losses.items()}
        sources = {}
        wanted = {edge.source for edge in held_out_edges(self.graph)} | self.graph.members.keys()
        wanted = wanted if self.evaluation.errors is not None else ()
        if not self.pair.sources.keys().isdisjoint(wanted):
            with self.accelerator.autocast():
                sources = self.pair.run_sources(inputs)
        self.evaluation.add(self.pair, views, losses, inputs, self.gather_function, sources)
        return losses[self.pair.primary], *(None if prediction_loss_only else value for value in (logits, labels))

    def _primary_prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Call the `prediction_step` of the class for the primary learner, for callers that know of one model."""
        name = self.pair.primary
        view = LearnerView(model, name, self.pair.learners[name])
        with self._as_trainer_of(name):
            return self._prediction_step_of(view, inputs, *args, **kwargs)

    def _prediction_step_of(
        self, view: LearnerView, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Do the prediction step of the class for a learner, which is `self.model` in the meantime."""
        return type(self).prediction_step(self, view, *args, **kwargs)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        *,
        student_predictions: bool = False,
        **gen_kwargs: Any,
    ) -> PredictionOutput | CoDistillationPredictionOutput:
        """Return the teacher's predictions and the metrics of all learners; see `Trainer.predict`.

        Args:
            test_dataset: The data set.
            ignore_keys: Keys of the outputs that are no predictions.
            metric_key_prefix: Prefix of the metrics.
            student_predictions: Whether to return the student's predictions too, as a fourth field.
            **gen_kwargs: For generation, as `Seq2SeqTrainer.predict` takes them.
        """
        if self.pair is None or not student_predictions:
            output = super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
            return CoDistillationPredictionOutput(*output, None) if student_predictions else output
        with self.evaluation.keeping_predictions() as predictions:  # `Trainer.predict` makes a new output
            output = super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
            return CoDistillationPredictionOutput(*output, predictions[STUDENT])

    # ---- Checkpoints ----

    @for_pairs
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the primary learner in the folder as Trainer does, and each other learner in a folder of its name."""
        self._hand_over()
        with self.checkpoints.completed(output_dir if output_dir is not None else self.args.output_dir):
            super()._save(output_dir, state_dict)

    @for_pairs
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save all models, and push them if `push_to_hub` is set; see `Trainer`. A push that fails is logged.

        The models are whole also where checkpoints hold shards (FSDP's `SHARDED_STATE_DICT`).
        """
        shards = self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if shards and self.checkpoints.staging is None:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call=True)  # Trainer would push the teacher alone
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub("Model save", revision=self.args.hub_revision)
            except OSError as error:
                logger.warning("The models are saved, but not completely pushed: %s", error)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint of all learners, whole or not at all; in a warm start that of the teacher.

        Raises:
            FloatingPointError: A loss was not finite; the last good checkpoint stays the last one.
            OSError: The checkpoint could not be written. The earlier ones are unchanged.
        """
        if self.checkpoints is None:
            return super()._save_checkpoint(model, trial)
        self._loss_meter.check(self.accelerator.gather)
        run_dir = self._get_output_dir(trial)
        with self.checkpoints.checkpoint(run_dir, self.state):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        self.checkpoints.remove_old(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    @for_pairs
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Tell whether the checkpoint will be the best one; keeps the student if it is its own best."""
        best = BestStudent.among(self.callback_handler.callbacks)
        if best is not None and best.improved(metrics, self.state.global_step):
            weights = self.checkpoints.weights_of(best.learner, self.accelerator, self.model_wrapped)
            self.checkpoints.save_alone(best.learner, Path(self._get_output_dir(trial), best.folder), weights)
        return super()._determine_best_metric(metrics, trial)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of the checkpoints; while one is written, the folder in which it is put together."""
        staging = None if self.checkpoints is None else self.checkpoints.staging
        return staging or super()._get_output_dir(trial)

    @for_pairs
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load all learners from a checkpoint.

        Raises:
            ValueError: The folder lacks a learner, holds other models, or was written without FSDP and this training
                uses it. Nothing is loaded.
        """
        if model is None:
            return self.checkpoints.load(resume_from_checkpoint, super()._load_from_checkpoint)
        if self.is_fsdp_enabled:
            check_written_with_fsdp(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    @for_pairs
    def _load_best_model(self) -> None:
        """Load all learners of the best checkpoint."""
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not os.path.isdir(best):
            return super()._load_best_model()  # if the folder is gone, Trainer warns
        self._load_from_checkpoint(best)

    # ---- Hub and model cards ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None, **kwargs: Any) -> None:
        """Make all repositories; see `PairUploads.make_repositories`."""
        if not self._paired:
            kwargs |= {"private": private} if private is not None else {}  # not every version of Trainer has it
            return super().init_hf_repo(token, **kwargs)
        folders = {name: "." if name == LEARNERS[0] else name for name in LEARNERS}  # Trainer calls it before the pair
        self.uploads = PairUploads(self.args, folders, self.is_world_process_zero())
        self.push_in_progress = None
        self.hub_model_id = self.uploads.make_repositories(token, private)

    @for_pairs
    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save all models, write their full cards and upload them; see `Trainer.push_to_hub`, `PairUploads.push`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.uploads is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._write_full_cards(**kwargs, revision=revision)
        options = {"token": token, "revision": revision, "private": private}
        return self.uploads.push(self.args.output_dir, commit_message or "End of training", blocking, **options)

    @for_pairs
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint while training goes on, but not before it is in its place."""
        if self.checkpoints.staging is not None:
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.uploads.push_checkpoint(checkpoint_folder, self.state.global_step)

    def _finish_current_push(self) -> None:
        """Wait for the uploads at the end of a training."""
        if self.uploads is None:
            return super()._finish_current_push()
        self.uploads.finish()

    def create_model_card(self, *args: Any, baseline: Any = None, revision: str | None = None, **kwargs: Any) -> None:
        """Write a model card for each model beside it; see `Trainer` and, for the other arguments, `CardOptions`."""
        if self.pair is None:  # Trainer has no `baseline` and no `revision`
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            options = CardOptions(*args, baseline=baseline, revision=revision, **kwargs)
            write_model_cards(self._card_facts(), self.args.output_dir, options, complete=not self.is_in_train)

    def _save_cards(self, folder: str | os.PathLike, only: str | None) -> None:
        """Write short cards beside models that were just saved."""
        save_model_cards(self._card_facts(), folder, only)

    def _write_full_cards(self, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Write the full cards. If that fails, the cards of the last save are pushed.

        Raises:
            TypeError, ValueError: The arguments of the caller are not those of `create_model_card`.
        """
        all_tags = [tags] if isinstance(tags, str) else list(tags or [])
        all_tags += [tag for tag in getattr(self.teacher_model, "model_tags", None) or [] if tag not in all_tags]
        try:
            self.create_model_card(tags=all_tags or None, **{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        except Exception as error:
            if kwargs.keys() - {"revision"} and isinstance(error, (TypeError, ValueError)):
                raise
            logger.warning("The model cards could not be written, so those of the last save are pushed: %r", error)

    def _card_facts(self) -> CardFacts:
        """Gather the facts that the model cards state."""
        if self.uploads is not None:
            repositories = self.uploads.repositories
        else:  # nothing was pushed yet
            name = self.hub_model_id or self.args.hub_model_id
            own = {n: getattr(self.args, f"{n}_hub_model_id", None) for n in self.pair.learners}
            repositories = {n: own[n] or (name and f"{name}-{n}") for n in own} | {self.pair.primary: name}
        return CardFacts(
            learners=dict(self.pair.learners),
            task=self.task,
            distillation=self.distillation,
            args=self._rated_args,
            state=self.state,
            repositories=repositories,
            processing_classes={learner: self.processing_class_of(learner) for learner in self.pair.learners},
            train_dataset=self.train_dataset,
            own_soft_loss=self.pair.objective.soft_loss_func is not None,
            sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
            warm_start=self._warm_start_costs or {},
        )

    # ---- Hyperparameter search ----

    @for_pairs
    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: str | HPSearchBackend | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search with new models in each trial (`model_init`, `student_model_init`); see Trainer.

        Args:
            hp_space: The space, as the backend takes it; by default, with Optuna or Ray, `search.DEFAULT_SPACE`.
            compute_objective: The objective, from the metrics of all learners. By default `metric_for_best_model`,
                which may be a metric of any learner; without it, the sum of all metrics of `compute_metrics`; without
                these, the sum of the losses of the trained learners.
            n_trials: Number of trials.
            direction: "minimize" or "maximize"; by default, what is better for `metric_for_best_model` or the losses.
            backend: "optuna", "ray" or "wandb"; by default what is installed.
            **kwargs: Other arguments of Trainer's method and of the backend.

        Raises:
            ValueError: The objective is a sum of metrics, and no direction is given.
        """
        backend = HPSearchBackend(backend or default_hp_search_backend())
        metric = self.args.metric_for_best_model
        if hp_space is None and backend in (HPSearchBackend.OPTUNA, HPSearchBackend.RAY):
            hp_space = lambda trial: search.for_backend(search.default_space(self.graph, self.args), backend, trial)  # noqa: E731
        if compute_objective is None:
            compute_objective = lambda metrics: search.objective(metrics, metric, self.graph, self.evaluation.ours)  # noqa: E731
            if direction is None and metric is None and self.compute_metrics is not None:
                raise ValueError(
                    "`direction` is None, and the objective is the sum of the metrics of `compute_metrics`: set "
                    "`direction` to 'maximize' or 'minimize', or choose one metric by `metric_for_best_model`."
                )
            direction = direction or ("maximize" if metric and self.args.greater_is_better else "minimize")
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", backend, **kwargs
        )

    @for_pairs
    def _hp_search_setup(self, trial: Any) -> None:
        """Set the arguments of a trial.

        Raises:
            ValueError: They are not valid.
        """
        if trial is None or self.hp_search_backend is None:
            return super()._hp_search_setup(trial)
        with search.setting_trial(self.distillation):
            super()._hp_search_setup(trial)


def _state_of(callback: TrainerCallback) -> dict[str, Any]:
    """Return what a training changes in a callback: what it exports, or all attributes of one of transformers."""
    if type(callback).__module__.startswith("transformers."):
        return dict(vars(callback))
    return copy.deepcopy(callback.state()["attributes"]) if isinstance(callback, ExportableState) else {}


def _trainer_arguments(trainer: type) -> list[inspect.Parameter]:
    """Return the arguments of the Trainer class under the mixin, in their order."""
    for base in trainer.__mro__[trainer.__mro__.index(CoDistillationMixin) + 1 :]:
        parameters = inspect.signature(base.__init__).parameters
        if "model" in parameters:
            own = list(parameters.values())[1:]
            return [parameter for parameter in own if parameter.kind != parameter.VAR_POSITIONAL]
    raise TypeError(
        f"{trainer.__name__} has no Trainer class after `CoDistillationMixin` among its bases. Write `class "
        f"{trainer.__name__}(CoDistillationMixin, TheirTrainer)`, where `TheirTrainer.__init__` names `model`."
    )


class CoDistillationTrainer(CoDistillationMixin, Trainer):
    """`transformers.Trainer` for a teacher and a student that are trained together (CTCD, arXiv 2311.02849).

    Takes Trainer's own arguments in Trainer's own order; `model` is the teacher. Without a student it is a plain
    Trainer, provided that the mode is `standalone` or that the arguments are a plain `TrainingArguments`. Every
    argument, hook and callback of Trainer holds for both models. `trainer.model` is the pair, one module that can be
    used as the teacher; `trainer.teacher_model` and `trainer.student_model` are the two plain models.

    Args:
        model: The teacher: a model, or a name or path as `from_pretrained` takes them.
        args: `CoDistillationTrainingArguments`; a plain `TrainingArguments` stands for its defaults.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics,
            callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in Trainer.
            `compute_loss_func`, `compute_metrics` and `preprocess_logits_for_metrics` are called once per model.
            An optimizer that is passed in must hold the parameters of both models.
        student_model: The student: a model, a name or path, or a function that makes it from the teacher
            (`lambda teacher: create_student(teacher, num_hidden_layers=3)`).
        student_model_init: Makes the student, as `model_init` makes the teacher; give both or none.
        student_processing_class: The student's tokenizer, if it is not the teacher's `processing_class`. The names of
            the student's inputs in examples then begin with `student_`; see `PairDataCollator`. For tasks of whole
            rows.
        pretrained_teacher: A model from which both learn (Community KD): a model, or a name or path. It is set to
            evaluation mode and `requires_grad=False`. Without it, the edges from it take their targets from the column
            `pretrained_logits` of the training data (NaN where a row has none), for tasks of whole rows; see
            `cross_fit`.
        augmentation: Changes each batch of a training: `TokenMasking`, `WordDropout`, `Mixup`, or any function that
            takes a batch and returns the changed batch.
        augmented: The models that get the changed batch: `"both"`, `"teacher"` or `"student"`.
        task: The task, or its name; needed only if the class of the models does not tell it. See `tasks/`.
        soft_loss_func: Compares the outputs of two models in place of the task, for an unknown head or a loss of your
            own. `soft_loss_func(teacher_outputs, student_outputs, inputs)` is called for each edge with the outputs of
            the model that teaches (detached), those of the model that learns, and the batch. For
            `teacher_from_student` the "teacher" is the student. It returns the mean over the batch.

    Raises:
        ValueError: The models, the arguments and the data do not fit together; see `checks/`.
        FloatingPointError: During training, when a loss of either model is not finite.

    Example:
        ```python
        trainer = CoDistillationTrainer(
            model=teacher, args=args, train_dataset=train, eval_dataset=dev, student_model=student
        )
        trainer.train()
        trainer.save_model("out")  # the teacher in out/, the student in out/student/
        ```
    """
