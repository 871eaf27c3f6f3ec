"""The trainer: Trainer's hooks, overridden for a pair of models that teach each other."""

import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_utils import TrainOutput, align_special_tokens
from transformers.utils import logging

from .arguments import DistillationArguments
from .checks import check_before_loading, check_setup, check_strategy
from .graph import STUDENT, TEACHER
from .losses.head_tap import HeadTap
from .losses.objective import SoftLossFunction
from .losses.teacher_cache import PretrainedCache
from .model_structure import base_model, hidden_quantisation, is_quantised
from .pair.loading import load_model
from .pair.model import CoDistillationModel
from .pair.shared_layers import SharedRun
from .pair.sources import NAME_OR_PATH, ModelSources
from .saving.best_student import BestStudent
from .tasks.base import Task
from .tasks.two_tokenizers import PREFIX, PairDataCollator
from .training.augmentation import Augmentation, Mixup, Views, augmented_batch, recounted
from .training.meters import EvaluationMeter, LossMeter, copy_of_metrics
from .training.search import PairSearchTrainer
from .training.sharding import heads_in_root, shard_frozen

logger = logging.get_logger(__name__)


class CoDistillationTrainer(PairSearchTrainer):
    """`transformers.Trainer` for a teacher and a student that are trained together (CTCD, arXiv 2311.02849).

    Takes Trainer's own arguments in Trainer's own order; `model` is the teacher. Without a student it is a plain
    Trainer, provided that the mode is `standalone` or that the arguments are a plain `TrainingArguments`. Every
    argument, hook and callback of Trainer holds for both models. `trainer.model` is the pair, one module;
    `trainer.teacher_model` and `trainer.student_model` are the two plain models.

    Args:
        model: The teacher: a model, or a name or path as `from_pretrained` takes them.
        args: `CoDistillationTrainingArguments`; a plain `TrainingArguments` stands for its defaults.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics,
            callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in Trainer.
            `compute_loss_func`, `compute_metrics` and `preprocess_logits_for_metrics` are called once per model.
            An optimizer that is passed in must hold the parameters of both models.
        student_model: The student: a model, or a name or path.
        student_processing_class: The student's tokenizer, if it is not the teacher's `processing_class`. Examples then
            have its inputs with `student_` before their names; see `two_tokenizers.py`. For tasks of whole rows.
        student_model_init: Makes the student, like `model_init` the teacher (which it belongs with).
        pretrained_teacher: A model from which both learn (Community KD): a model, or a name or path. It is set to
            evaluation mode and `requires_grad=False`.
        augmentation: Changes each batch of a training: `TokenMasking`, `WordDropout`, `Mixup`, or any function that
            takes a batch and returns the changed one.
        augmented: Which models get the changed batch: `"both"`, or the `"teacher"` or the `"student"` alone while the
            other one has it as it was.
        task: The task, or its name, where it is not to be recognised by the class of the models; see `tasks.py`.
        soft_loss_func: Compares the outputs of two models in place of the task, for a head that is not known or a loss
            of your own: `soft_loss_func(teacher_outputs, student_outputs, inputs)` is called for each edge with the
            outputs of the model that teaches (detached), of the one that learns, and the batch. So for
            `teacher_from_student` the "teacher" is the student. It returns the mean over the batch.

    Raises:
        ValueError: The models, the arguments and the data do not fit together; see the modules `checking_*.py`.
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

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | os.PathLike | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        student_model: PreTrainedModel | str | os.PathLike | None = None,
        student_model_init: Callable[..., PreTrainedModel] | None = None,
        student_processing_class: PreTrainedTokenizerBase | None = None,
        pretrained_teacher: PreTrainedModel | str | os.PathLike | None = None,
        augmentation: Augmentation | None = None,
        augmented: Views = "both",
        task: Task | str | None = None,
        soft_loss_func: SoftLossFunction | None = None,
    ) -> None:
        self.pair: CoDistillationModel | None = None
        self.task: Task | None = None
        self.distillation = args if isinstance(args, DistillationArguments) else DistillationArguments()
        self._loss_meter = LossMeter()
        self._evaluation_meter: EvaluationMeter | None = None
        self._grad_norms: dict[str, Tensor] = {}
        self._student_rates: list[float] = []
        self._student_metrics: Any = None
        self._predicting = False
        self._student_predictions: Any = None
        self.soft_loss_func = soft_loss_func
        self._fused: bool | None = None
        self._pretrained_tap: HeadTap | None = None
        self._pretrained_cache: PretrainedCache | None = None

        seed = args.seed if args is not None else TrainingArguments.seed
        self._sources = ModelSources(
            self.distillation,
            student_model,
            student_model_init,
            pretrained_teacher,
            seed,
            task=task,
            has_soft_loss=soft_loss_func is not None,
        )
        plain = not isinstance(args, DistillationArguments) or args.distillation_mode == "standalone"
        self._paired = paired = self._sources.given or not plain
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        if paired:
            given = {
                "student_model": student_model,
                "student_model_init": student_model_init,
                "pretrained_teacher": pretrained_teacher,
                "model_init": model_init,
                "soft_loss_func": soft_loss_func,
            }
            check_before_loading(self.distillation, args, given, datasets)
            if args is not None and args.batch_eval_metrics and compute_metrics is not None:
                self._student_metrics = copy_of_metrics(compute_metrics)
        if isinstance(model, NAME_OR_PATH):
            set_seed(seed)  # the head may be new
            model = load_model(model, "model", frozen=paired and TEACHER in self.graph.frozen)

        tokenizer = processing_class or getattr(data_collator, "tokenizer", None)
        self.student_processing_class = student_processing_class
        self.augmentation, self.augmented = augmentation, augmented
        if student_processing_class is not None and data_collator is None and tokenizer is not None:
            data_collator = PairDataCollator.of(tokenizer, student_processing_class)

        def make_learners(teacher: PreTrainedModel) -> dict[str, nn.Module]:
            self.task, learners = self._sources.learners(teacher)
            check_setup(
                self.task,
                self.distillation,
                args,
                learners,
                self._sources.pretrained,
                datasets,
                processing_class=tokenizer,
                student_processing_class=student_processing_class,
                augmentation=augmentation,
                augmented=augmented,
                optimizer=optimizers[0],
                optimizer_cls=None if optimizer_cls_and_kwargs is None else optimizer_cls_and_kwargs[0],
            )
            if self.distillation.pretrained_cache_dir is not None:
                self._pretrained_cache = PretrainedCache(
                    self.distillation.pretrained_cache_dir, self.pretrained_teacher, self.task, args.mixed_precision
                )
            return learners

        # Seq2SeqTrainer does not know this argument.
        kwargs = {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs} if optimizer_cls_and_kwargs else {}
        learners = make_learners(model) if paired and model is not None else None
        only_read = learners is not None and TEACHER in self.graph.frozen and is_quantised(model)
        with hidden_quantisation(model) if only_read else nullcontext():
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                model_init=model_init,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                **kwargs,
            )
        if paired:
            check_strategy(self.accelerator, self.pretrained_teacher is not None, self.distillation.share, self.args)
            logging.get_logger("ctcd_trainer").setLevel(self.args.get_process_log_level())
            # Trainer has learnt what it needs (label names, device placement, ...) from the teacher; from here on its
            # model is the pair.
            self._install_pair(learners or make_learners(self.model))
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

    def _install_pair(self, learners: dict[str, nn.Module]) -> None:
        """Make the pair the trainer's model, and do for the other models what Trainer did for the teacher."""
        others = [learners[STUDENT]]
        if self.pretrained_teacher is not None:
            others.append(self.pretrained_teacher.eval().requires_grad_(False))
        for model in others:
            if self.place_model_on_device and not is_quantised(model):
                self._move_model_to_device(model, self.args.device)
        self.pair = CoDistillationModel(
            learners,
            self.task,
            frozen=self.graph.frozen,
            bystanders=others[1:],
            two_tokenizers=self.student_processing_class is not None,
        )
        if self._sources.shared_layers:
            self.pair.shared = SharedRun(self._sources.shared_layers, self.pair.own_parameters(STUDENT))
        self.model = self.model_wrapped = self.callback_handler.model = self.pair
        # Every term of the loss is divided by the item count of the whole accumulated batch (`compute_loss`).
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False  # the task counts
        self._fused = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new teacher from `model_init`, paired with a new student from `student_model_init`."""
        if self.pair is not None:
            self._hp_search_setup(trial)  # Trainer would do it later, and the mode of the trial makes the pair
        teacher = super().call_model_init(trial)
        if self.pair is not None:  # otherwise Trainer is still being set up, or there is no student
            self._install_pair(self._sources.learners(teacher, trial)[1])
        return self.model if self.pair is not None else teacher

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that any model's `forward` names."""
        if self.pair is not None and self._signature_columns is None:
            known = self.pair.known_inputs
            own = {f"{PREFIX}{name}" for name in known} if self.student_processing_class is not None else ()
            self._signature_columns = sorted({*known, *own, "label", "label_ids", *self.label_names})
        super()._set_signature_columns_if_needed()

    # ---- Training ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Do for the student what `Trainer.train` has done for the teacher, and train.

        Raises:
            FloatingPointError: A loss of either model is not finite; names the model, the component and the step.
        """
        if self.pair is None:
            return super()._inner_training_loop(*args, **kwargs)
        self._loss_meter = LossMeter()  # `auto_find_batch_size` runs this several times
        self._fused = None  # heads, adapters and loss functions may have changed since the last training
        if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
            align_special_tokens(self.student_model, self.student_processing_class or self.processing_class)
        with ExitStack() as afterwards:
            if self._pretrained_cache is not None:
                afterwards.callback(self._pretrained_cache.finish)
            if self.neftune_noise_alpha is not None:
                student = base_model(self.student_model)
                handle = activate_neftune(student, self.neftune_noise_alpha)
                afterwards.callback(deactivate_neftune, student, handle)
            return super()._inner_training_loop(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        """Wrap the pair and make its optimizer, as Trainer does; place the frozen teacher, too."""
        if self.pair is None:
            return super()._prepare_for_training(*args, **kwargs)
        if self.pretrained_teacher is not None:
            self._place_pretrained()
        with heads_in_root(self.pair):
            return super()._prepare_for_training(*args, **kwargs)

    def _place_pretrained(self) -> None:
        """Place the frozen teacher where Trainer leaves that to the strategy, sharded if the strategy shards."""
        model = self.pretrained_teacher
        if is_quantised(model):
            return  # it is where it was loaded to
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2 and self._pretrained_cache is None:
            shard_frozen(model, self.accelerator)
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # With a cache a process runs it only for rows that it has not seen: sharded, it would wait for the others.
            self._move_model_to_device(model, self.args.device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A training step, on the batch as `augmentation` changes it; see `Trainer.training_step`."""
        if self.pair is None or self.augmentation is None:
            return super().training_step(model, inputs, num_items_in_batch)
        before = self._prepare_inputs(inputs)
        inputs = augmented_batch(before, self.augmentation, self.augmented, self.task)
        number = recounted(num_items_in_batch, self.augmentation, self.task, before, inputs)
        models = [
            *self.pair.learners.values(),
            *([] if self.pretrained_teacher is None else [self.pretrained_teacher]),
        ]
        within = self.augmentation.within(models) if isinstance(self.augmentation, Mixup) else nullcontext()
        with within:
            return super().training_step(model, inputs, number)

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss components and both gradient norms to the training logs; see `Trainer.log`.

        Raises:
            FloatingPointError: A component was not finite since the last log.
        """
        if self.pair is not None:
            if "loss" in logs or "train_loss" in logs:
                self._loss_meter.check(self.accelerator.gather)
            if "loss" in logs:
                logs |= self._loss_meter.drain(self.accelerator.gather)
                logs |= {f"{name}_grad_norm": float(norm) for name, norm in self._grad_norms.items()}
                if self._student_rates and getattr(self.args, "student_learning_rate", None) is not None:
                    logs["student_learning_rate"] = self._student_rates[0]
        super().log(logs, start_time)

    def _finalize_training(self, *args: Any) -> TrainOutput:
        """End the training; see `Trainer`. `train_loss` is of all processes, also of the steps since the last log."""
        if self.pair is not None:
            self._tr_loss = self.accelerator.gather(self._tr_loss[None]).mean()  # Trainer adds that of one process
        return super()._finalize_training(*args)
