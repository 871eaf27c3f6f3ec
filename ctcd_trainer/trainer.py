"""The trainer: Trainer's hooks, overridden for a pair of models that teach each other."""

import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from logging import INFO, WARNING
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

from . import validation
from .augmentation import Augmentation, Mixup, Views, augmented_batch, check_augmentation
from .best_student import BestStudent
from .fused_linear import ScoredPositions
from .graph import PRETRAINED, STUDENT, TEACHER
from .labels import IGNORE_INDEX
from .lm_head import HeadTap, NoLinearHeadError, find_tap
from .loading import load_model
from .metrics import EvaluationMeter, LossMeter, copy_of_metrics
from .modeling import CoDistillationModel, LearnerView
from .objective import SoftLossFunction, fused_losses, separate_losses
from .pairing import NAME_OR_PATH, ModelSources
from .pretrained_cache import PretrainedCache
from .search import PairSearchTrainer
from .sharding import shard_frozen, tied_layers_in_root
from .shared_parts import SharedRun
from .task import Task
from .training_args import DistillationArguments
from .two_tokenizers import PREFIX, PairDataCollator, check_student_inputs, inputs_of_learner
from .wrapping import base_model

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
        ValueError: The models, the arguments and the data do not fit together; see `validation.py`.
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
            self._sources.check_roles(has_model_init=model_init is not None)
            validation.check_arguments(args)
            validation.check_pretrained_cache(self.distillation, soft_loss_func is not None)
            if args is not None and args.batch_eval_metrics and compute_metrics is not None:
                self._student_metrics = copy_of_metrics(compute_metrics)
            for argument, dataset in datasets.items():
                validation.check_dataset(dataset, argument)
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
            check_augmentation(augmentation, augmented, self.task, student_processing_class is not None)
            others = {"student_model": learners[STUDENT], "pretrained_teacher": self._sources.pretrained}
            for argument, other in others.items():
                if argument == "student_model" and student_processing_class is not None:
                    check_student_inputs(self.task, datasets, self.distillation.share)
                else:
                    validation.check_vocabularies(teacher, other, argument, tokenizer)
            validation.check_optimizer(optimizers[0], {name: learners[name] for name in self.graph.trained}, args)
            for argument, dataset in datasets.items():
                partners = argument != "train_dataset" or bool(self.graph.edges)
                validation.check_labels(self.task, dataset, argument, partners)
            if self.distillation.pretrained_cache_dir is not None:
                self._pretrained_cache = PretrainedCache(
                    self.distillation.pretrained_cache_dir, self.pretrained_teacher, self.task, args.mixed_precision
                )
            return learners

        # Seq2SeqTrainer does not know this argument.
        kwargs = {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs} if optimizer_cls_and_kwargs else {}
        learners = make_learners(model) if paired and model is not None else None
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
            validation.check_strategy(self.accelerator, self.pretrained_teacher is not None, self.distillation.share)
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
            if self.place_model_on_device and getattr(model, "quantization_method", None) is None:
                self._move_model_to_device(model, self.args.device)
        self.pair = CoDistillationModel(learners, self.task, frozen=self.graph.frozen, bystanders=others[1:])
        if self._sources.shared_layers:
            self.pair.shared = SharedRun(self._sources.shared_layers, self.pair.own_parameters(STUDENT))
        self.model = self.model_wrapped = self.callback_handler.model = self.pair
        # Every term of the loss is divided by the item count of the whole accumulated batch (`compute_loss`).
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False  # the task counts
        self._fused = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save both models; see `Trainer.save_model`.

        They are whole also where checkpoints hold shards (FSDP's `SHARDED_STATE_DICT`), which Trainer leaves to a tool
        that knows of one model only.
        """
        shards = self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if shards and self.pair is not None and self._staging is None:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

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
        with tied_layers_in_root(self.pair):
            return super()._prepare_for_training(*args, **kwargs)

    def _place_pretrained(self) -> None:
        """Place the frozen teacher where Trainer leaves that to the strategy, sharded if the strategy shards."""
        model = self.pretrained_teacher
        if getattr(model, "quantization_method", None) is not None:
            return  # it is where it was loaded to
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2 and self._pretrained_cache is None:
            shard_frozen(model, self.accelerator)
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # With a cache a process runs it only for rows that it has not seen: sharded, it would wait for the others.
            self._move_model_to_device(model, self.args.device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A training step, on the batch as `augmentation` changes it; see `Trainer.training_step`."""
        if self.pair is None or self.augmentation is None:
            return super().training_step(model, inputs, *args, **kwargs)
        inputs = augmented_batch(self._prepare_inputs(inputs), self.augmentation, self.augmented)
        models = [
            *self.pair.learners.values(),
            *([] if self.pretrained_teacher is None else [self.pretrained_teacher]),
        ]
        within = self.augmentation.within(models) if isinstance(self.augmentation, Mixup) else nullcontext()
        with within:
            return super().training_step(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Count what the task scores, over the whole accumulated batch and all processes.

        Returns:
            The number; where rows without a label are compared, `(2,)` with the number of rows that are.
        """
        if self.task is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = [{"labels": self.task.counted(batch)} for batch in batch_samples]
        number = super()._get_num_items_in_batch(counted, device)
        if number is None or not self.task.per_row:
            return number
        rows = [{"labels": self.task.distilled(batch).long()} for batch in batch_samples]
        return torch.stack([number, super()._get_num_items_in_batch(rows, device)])

    def compute_loss(
        self,
        model: nn.Module | LearnerView,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The weighted sum of the hard and the soft losses of all learners.

        Each term is the mean over the scored positions of this micro-batch, times the share of the micro-batch in the
        scored positions of the whole accumulated batch and of all processes.

        Args:
            model: The pair, wrapped or not; or a `LearnerView`, for which it is the task loss of that learner alone.
            inputs: The batch.
            return_outputs: Whether to return the outputs as well.
            num_items_in_batch: Number of scored positions in the accumulated batch of all processes.

        Returns:
            The loss, 0-dimensional; with `return_outputs` also the outputs by name of the learner, or of the view.
        """
        if self.pair is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(model, LearnerView):
            outputs = self._outputs(model, inputs)
            loss = self._hard_loss(outputs, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

        warmup = self.distillation.soft_weight_factor(self.state.global_step, self.state.max_steps)
        outputs = None
        if not return_outputs and self._skips_logits(inputs):
            loss, values = self._fused_losses(model, inputs, num_items_in_batch, warmup)
        else:
            outputs = self._outputs(model, inputs)
            sources = dict(outputs)
            if self.pretrained_teacher is not None:
                sources[PRETRAINED] = self._pretrained_outputs(inputs)
            loss, values = separate_losses(
                self.task,
                self.distillation,
                sources,
                inputs,
                hard_loss=lambda output: self._hard_loss(output, inputs, num_items_in_batch),
                share=self._share_of_batch(self.task.distilled(inputs), num_items_in_batch, -1),
                warmup=warmup,
                soft_loss_func=self.soft_loss_func,
            )
        self._loss_meter.add(values, self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss

    def _outputs(self, model: nn.Module | LearnerView, inputs: dict[str, Tensor | Any]) -> Any:
        """Outputs of the models, which get labels only if they compute the hard loss themselves."""
        if "labels" in inputs and (self.label_smoother is not None or self.compute_loss_func is not None):
            return model(**inputs, labelled=False)
        return model(**{**inputs, **self.task.trainable_labels(inputs)})

    def _share_of_batch(self, counted: Tensor, num_items_in_batch: Tensor | int | None, which: int) -> Tensor:
        """Share of this micro-batch in the accumulated batch, times the processes that gradients average over.

        Args:
            counted: What counts in this micro-batch, bool.
            num_items_in_batch: Numbers for the whole batch; see `_get_num_items_in_batch`.
            which: Which of the numbers, 0 for the labelled ones and -1 for the compared ones.
        """
        if num_items_in_batch is None:
            return counted.sum().clamp(max=1) / self._micro_batches()
        number = torch.as_tensor(num_items_in_batch).reshape(-1)[which]
        return self._process_scale() * counted.sum() / number.clamp(min=1)

    def _micro_batches(self) -> int:
        """Number of micro-batches that gradients are summed over, for a mean without the count of their items."""
        return getattr(self, "current_gradient_accumulation_steps", 1) if self.pair.training else 1

    def _process_scale(self) -> int:
        """DDP averages gradients over the processes, while `num_items_in_batch` counts the items of all of them."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _hard_loss(
        self,
        outputs: Any,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Task loss of one learner: the user's function, the smoothed one, or the one of the model itself."""
        if self.compute_loss_func is not None:
            number = num_items_in_batch
            number = number.reshape(-1)[0] if isinstance(number, Tensor) else number
            loss = self.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=number)
            return loss * self._process_scale() if number is not None else loss
        share = self._share_of_batch(self.task.counted(inputs).ne(IGNORE_INDEX), num_items_in_batch, 0)
        if "labels" in inputs and self.label_smoother is not None:
            labels = self.task.trainable_labels(inputs)["labels"]
            return self.label_smoother(outputs, labels, shift_labels=self.task.shifts_labels) * share
        loss = self.task.hard_loss(outputs, inputs)
        if loss is None:
            raise ValueError(
                f"The model has computed no loss for a batch of {sorted(inputs)}: name the label column 'label' or "
                "'labels', or pass a `data_collator` that makes them."
            )
        return loss * share

    def _pretrained_outputs(
        self, inputs: dict[str, Tensor | Any], tap: HeadTap | None = None, head_at: ScoredPositions | None = None
    ) -> Any:
        """What is compared of the outputs of the frozen teacher; it runs at most once per batch."""
        model, cache = self.pretrained_teacher, self._pretrained_cache
        inputs = inputs_of_learner(PRETRAINED, inputs, self.label_names)

        def run(inputs: dict[str, Tensor | Any], head_at: ScoredPositions | None) -> Any:
            labelled = self.task.needs_labels(base_model(model), inputs)
            with torch.no_grad(), self.accelerator.autocast():
                return self.pair.run(model, inputs, labelled, tap, head_at)

        if cache is None or (self.task.language_model and tap is None):  # whole logits would fill the disk
            return run(inputs, head_at)
        taken = self.pair.inputs_of(model, self.task.unlabelled(base_model(model), inputs))
        return cache.outputs(run, inputs, taken, tap, head_at, self.state.epoch or 0.0)

    # ---- Language models without logits ----

    def _fused_losses(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None, warmup: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of language models in one pass over the scored positions, see `fused_linear.py`."""
        scored = ScoredPositions(self.task.targets(inputs))
        heads = dict(model(**inputs, head_at=scored))
        if self._pretrained_tap is not None:
            heads[PRETRAINED] = self._pretrained_outputs(inputs, self._pretrained_tap, scored)
        with self.accelerator.autocast():
            loss, values = fused_losses(self.distillation, heads, warmup=warmup, labels=scored.labels)
        if num_items_in_batch is None:
            scale = 1.0 / (max(len(scored.labels), 1) * self._micro_batches())
        else:
            scale = self._process_scale() / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
        return loss * scale, {name: value * scale for name, value in values.items()}

    def _skips_logits(self, inputs: dict[str, Tensor | Any]) -> bool:
        """Whether the models run without logits; decided, and logged, at the first batch in which any is scored."""
        if not self.task.language_model:
            return False
        if self._fused is None and "labels" in inputs and bool(self.task.scored(inputs).any()):
            reason = self._why_logits(inputs)
            self._fused = reason is None
            path = "one fused pass over the scored positions" if reason is None else f"whole logits, because {reason}"
            unwanted = reason is not None and self.distillation.fused_lm_head
            if self.is_world_process_zero():
                logger.log(WARNING if unwanted else INFO, "Losses of the language-model heads: %s.", path)
                if reason is not None and self._pretrained_cache is not None:
                    logger.warning(
                        "Whole logits are not kept in `pretrained_cache_dir`: the frozen teacher runs always."
                    )
        return bool(self._fused)

    def _why_logits(self, inputs: dict[str, Tensor | Any]) -> str | None:
        """Why the losses need the whole logits of the models; `None` if they do not."""
        reasons = {
            "`fused_lm_head` is False": not self.distillation.fused_lm_head,
            "`soft_loss_func` takes them": self.soft_loss_func is not None,
            "`compute_loss_func` takes them": self.compute_loss_func is not None,
            "`label_smoothing_factor` is set": self.label_smoother is not None,
            "FSDP or DeepSpeed ZeRO-3 shard the heads": self._shards_parameters(),
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
        models = dict(self.pair.learners)
        if self.pretrained_teacher is not None:
            models[PRETRAINED] = self.pretrained_teacher
        taps = {}
        for name, model in models.items():
            try:
                with self.accelerator.autocast():
                    own_loss = self.graph.hard_weights.get(name, 0.0) > 0
                    taps[name] = find_tap(model, self.task, self.pair.inputs_of(model, inputs), own_loss)
            except NoLinearHeadError as error:
                return f"of the {name}: {error}"
        self._pretrained_tap = taps.pop(PRETRAINED, None)
        self.pair.taps = taps
        return None

    def _shards_parameters(self) -> bool:
        """Whether a process has the whole of a parameter only while the module that it belongs to runs."""
        return self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        )

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
