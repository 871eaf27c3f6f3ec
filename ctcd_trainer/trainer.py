"""The trainer: Trainer's hooks, overridden for a pair of models that teach each other."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from transformers.trainer_utils import (
    EvalLoopOutput,
    PredictionOutput,
    TrainOutput,
    align_special_tokens,
)

from . import validation
from .graph import PRETRAINED, STUDENT, TEACHER, Graph
from .hub import PairHubTrainer
from .metrics import EvaluationMeter, LossMeter, MetricsOfEach, copy_of_metrics, predictions_of
from .modeling import CoDistillationModel, LearnerView
from .objective import loss_terms
from .pairing import NAME_OR_PATH, ModelSources
from .student import load_model
from .tasks import IGNORE_INDEX, Task, base_model, is_peft_model
from .training_args import DistillationArguments, learner_arguments


class CoDistillationPredictionOutput(NamedTuple):
    """Trainer's `PredictionOutput` with the student's predictions, as `predict` returns it when asked for them."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    student_predictions: Any


class CoDistillationTrainer(PairHubTrainer):
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
        student_model_init: Makes the student, like `model_init` the teacher (which it belongs with).
        pretrained_teacher: A model from which both learn (Community KD): a model, or a name or path. It is set to
            evaluation mode and `requires_grad=False`.

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
        pretrained_teacher: PreTrainedModel | str | os.PathLike | None = None,
    ) -> None:
        self.pair: CoDistillationModel | None = None
        self.task: Task | None = None
        self.distillation = args if isinstance(args, DistillationArguments) else DistillationArguments()
        self._loss_meter = LossMeter()
        self._evaluation_meter: EvaluationMeter | None = None
        self._grad_norms: dict[str, Tensor] = {}
        self._student_rates: list[float] = []
        self._student_predictions: Any = None

        seed = args.seed if args is not None else TrainingArguments.seed
        self._sources = ModelSources(self.distillation, student_model, student_model_init, pretrained_teacher, seed)
        plain = not isinstance(args, DistillationArguments) or args.distillation_mode == "standalone"
        paired = self._sources.given or not plain
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        if paired:
            self._sources.check_roles(has_model_init=model_init is not None)
            validation.check_arguments(args)
            if args is not None and args.batch_eval_metrics and compute_metrics is not None:
                self._student_metrics = copy_of_metrics(compute_metrics)
            for argument, dataset in datasets.items():
                validation.check_dataset(dataset, argument)
        if isinstance(model, NAME_OR_PATH):
            set_seed(seed)  # the head may be new
            model = load_model(model, "model", frozen=paired and TEACHER in self.graph.frozen)

        def make_learners(teacher: PreTrainedModel) -> dict[str, nn.Module]:
            self.task, learners = self._sources.learners(teacher)
            others = {"student_model": learners[STUDENT], "pretrained_teacher": self._sources.pretrained}
            for argument, other in others.items():
                validation.check_vocabularies(teacher, other, argument, processing_class)
            validation.check_optimizer(optimizers[0], {name: learners[name] for name in self.graph.trained}, args)
            for argument, dataset in datasets.items():
                validation.check_labels(self.task, dataset, argument)
            return learners

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
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if paired:
            # Trainer has learnt what it needs (label names, device placement, ...) from the teacher; from here on its
            # model is the pair.
            self._install_pair(learners or make_learners(self.model))

    # ---- The pair ----

    @property
    def graph(self) -> Graph:
        """Who learns from whom, with which weights."""
        return self.distillation.graph

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
        self.pair = CoDistillationModel(learners, frozen=self.graph.frozen, bystanders=others[1:])
        self.model = self.model_wrapped = self.callback_handler.model = self.pair
        # Every term of the loss is divided by the item count of the whole accumulated batch (`compute_loss`).
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False  # the task counts

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new teacher from `model_init`, paired with a new student from `student_model_init`."""
        teacher = super().call_model_init(trial)
        if self.pair is not None:  # otherwise Trainer is still being set up, or there is no student
            self._install_pair(self._sources.learners(teacher, trial)[1])
        return self.model if self.pair is not None else teacher

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that any model's `forward` names."""
        if self.pair is not None and self._signature_columns is None:
            self._signature_columns = sorted({*self.pair.known_inputs, "label", "label_ids", *self.label_names})
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
        if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
            align_special_tokens(self.student_model, self.processing_class)
        if self.neftune_noise_alpha is None:
            return super()._inner_training_loop(*args, **kwargs)
        student = base_model(self.student_model)
        handle = activate_neftune(student, self.neftune_noise_alpha)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            deactivate_neftune(student, handle)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Count what the task scores, over the whole accumulated batch and all processes."""
        if self.task is not None:
            batch_samples = [
                {"labels": self.task.counted(batch["labels"])} if "labels" in batch else {} for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

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
        if "labels" not in inputs:
            raise ValueError(
                f"The batch has no `labels`, only {sorted(inputs)}: name the label column 'label' or 'labels', or "
                "pass a `data_collator` that makes them."
            )
        labels = inputs["labels"]
        share = self._share_of_batch(labels, num_items_in_batch)
        outputs = model(**self._model_inputs(inputs))
        if isinstance(model, LearnerView):
            loss = self._hard_loss(outputs, labels, share, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

        sources = dict(outputs)
        if self.pretrained_teacher is not None:
            sources[PRETRAINED] = self._pretrained_outputs(inputs)
        terms = loss_terms(
            self.task,
            self.distillation,
            sources,
            labels,
            hard_loss=lambda output: self._hard_loss(output, labels, share, num_items_in_batch),
            share=share,
            warmup=self.distillation.soft_weight_factor(self.state.global_step, self.state.max_steps),
        )
        self._loss_meter.add({name: term.value for name, term in terms.items()}, self.state.global_step + 1)
        loss = sum(term.weight * term.value for term in terms.values())
        return (loss, outputs) if return_outputs else loss

    def _model_inputs(self, inputs: dict[str, Tensor | Any]) -> dict[str, Tensor | Any]:
        """The batch as the models get it: with labels only if they compute the hard loss themselves."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if self.label_smoother is None and self.compute_loss_func is None:
            inputs["labels"] = self.task.trainable_labels(labels)
        return inputs

    def _share_of_batch(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """Share of this micro-batch in the accumulated batch, times the processes that gradients average over."""
        if num_items_in_batch is None:
            return 1.0
        num_items = self.task.counted(labels).ne(IGNORE_INDEX).sum()
        return self._process_scale() * num_items / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def _process_scale(self) -> int:
        """DDP averages gradients over the processes, while `num_items_in_batch` counts the items of all of them."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _hard_loss(
        self, outputs: Any, labels: Tensor, share: Tensor | float, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Task loss of one learner: the user's function, the smoothed one, or the one of the model itself."""
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            return loss * self._process_scale() if num_items_in_batch is not None else loss
        if self.label_smoother is not None:
            return self.label_smoother(outputs, self.task.trainable_labels(labels)) * share
        return outputs["loss"] * share

    def _pretrained_outputs(self, inputs: dict[str, Tensor | Any]) -> Any:
        """Outputs of the frozen teacher, once per batch."""
        with torch.no_grad(), self.accelerator.autocast():
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
            return self.pretrained_teacher(**self.pair.inputs_of(self.pretrained_teacher, inputs))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer with the parameter groups that Trainer would make for each learner alone.

        A group carries the name of its learner under the key `"learner"`. Frozen learners have none.
        """
        if self.pair is not None and self.pair.frozen != set(self.graph.frozen):
            raise ValueError(
                f"`distillation_mode={self.distillation.distillation_mode!r}` and its weights freeze "
                f"{sorted(self.graph.frozen)}, and the trainer was made for arguments that freeze "
                f"{sorted(self.pair.frozen)}. Make a new trainer for other arguments."
            )
        if self.pair is None or self.optimizer is not None:
            return super().create_optimizer(model)
        merged = None
        for learner, learner_model in self.pair.trained.items():
            self.optimizer = None
            with self._arguments_of(learner):
                optimizer = super().create_optimizer(learner_model)
            own_rate = getattr(self.args, f"{learner}_learning_rate", None)
            for group in optimizer.param_groups:
                group["learner"] = learner
                if own_rate is not None:  # `optimizer_cls_and_kwargs` brings a rate for both
                    group["lr"] = own_rate
                if merged is not None:
                    merged.add_param_group(group)
            if merged is None:
                merged = optimizer
            else:
                merged.state.update(optimizer.state)  # some optimizers (Adagrad) fill it when they are made
        self.optimizer = merged
        return merged

    @contextmanager
    def _arguments_of(self, learner: str) -> Iterator[None]:
        """Let Trainer see the arguments of one learner, without a change to the user's object."""
        args = self.args
        self.args = learner_arguments(args, learner)
        try:
            yield
        finally:
            self.args = args

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        """Clip each learner by its own norm; one norm over both would couple them. Returns the norm over both."""
        if self.pair is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        self._grad_norms = {
            name: nn.utils.clip_grad_norm_(
                learner.parameters(), learner_arguments(self.args, name).max_grad_norm or float("inf")
            )
            for name, learner in self.pair.trained.items()
        }
        # Trainer logs the learning rate of the step that is about to be made.
        self._student_rates = [group["lr"] for group in self.optimizer.param_groups if group.get("learner") == STUDENT]
        return torch.stack(list(self._grad_norms.values())).norm()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The norm over both; clips here if only the student is to be clipped."""
        if self.pair is not None and grad_norm is None:
            return self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm)

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

    # ---- Evaluation and prediction ----

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate both models in one pass over the data; see `Trainer.evaluation_loop`.

        Returns:
            The teacher's predictions, and the metrics of both: the teacher's without prefix, `student_*`, and
            `agreement`.
        """
        if self.pair is None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self.is_in_train:
            self._loss_meter.check(self.accelerator.gather)  # before metrics fail on predictions of broken weights
        self._evaluation_meter = meter = EvaluationMeter()
        users = self.compute_metrics, self.preprocess_logits_for_metrics
        try:
            if self.compute_metrics is not None:
                functions = {TEACHER: self.compute_metrics, STUDENT: self.compute_metrics}
                if self.args.batch_eval_metrics:
                    functions[STUDENT] = self._student_metrics
                self.compute_metrics = MetricsOfEach(
                    functions, TEACHER, meter, self.args.batch_eval_metrics, metric_key_prefix
                )
            if self.preprocess_logits_for_metrics is not None:
                self.preprocess_logits_for_metrics = lambda logits, labels: {
                    name: users[1](own, labels) for name, own in logits.items()
                }
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = users
            self._evaluation_meter = None
        output.metrics.update(meter.metrics(metric_key_prefix))
        if description == "Prediction":  # of an evaluation, which nobody asks for them, they are let go
            self._student_predictions = predictions_of(STUDENT, output.predictions)
        return output._replace(predictions=predictions_of(TEACHER, output.predictions))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Trainer's prediction step for each learner in turn.

        Returns:
            The teacher's loss, the logits by name of the learner (`None` if only losses are wanted), and the labels.
        """
        if self.pair is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        losses, logits, labels = {}, {}, None
        for name, learner in self.pair.learners.items():
            keys = ignore_keys or getattr(learner.config, "keys_to_ignore_at_inference", ["past_key_values"])
            losses[name], logits[name], labels = super().prediction_step(
                LearnerView(model, name), inputs, prediction_loss_only=False, ignore_keys=keys
            )
        if self._evaluation_meter is not None:
            if losses[STUDENT] is not None:
                repeated = losses[STUDENT].repeat(self.args.eval_batch_size)  # weighted as Trainer weighs its own
                self._evaluation_meter.add_losses(self.gather_function(repeated))
            first, second = ({"logits": _first(logits[name])} for name in (TEACHER, STUDENT))
            agreement = self.task.agreement(first, second, labels)
            if agreement is not None:
                self._evaluation_meter.add_agreement(*(self.gather_function(count) for count in agreement))
        return losses[TEACHER], None if prediction_loss_only else logits, None if prediction_loss_only else labels

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        *,
        student_predictions: bool = False,
    ) -> PredictionOutput | CoDistillationPredictionOutput:
        """The teacher's predictions and both models' metrics; see `Trainer.predict`.

        Args:
            test_dataset: The data set.
            ignore_keys: Keys of the outputs that are no predictions.
            metric_key_prefix: Prefix of the metrics.
            student_predictions: Whether to return the student's predictions too, as a fourth field.
        """
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        students, self._student_predictions = self._student_predictions, None
        return CoDistillationPredictionOutput(*output, students) if student_predictions else output

    # ---- Saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the teacher in the folder as Trainer does, and the student complete in `student/`."""
        super()._save(output_dir, state_dict)
        if self.pair is None or not self.args.should_save:
            return
        folder = self.pair.folder_of(STUDENT, output_dir if output_dir is not None else self.args.output_dir)
        processing_class = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint of both models, unless a loss was not finite: the last good one stays the last one."""
        if self.pair is not None:
            self._loss_meter.check(self.accelerator.gather)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load both models from a checkpoint folder.

        Raises:
            ValueError: The folder has no student.
        """
        if self.pair is None or model is not None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        folders = {name: self.pair.folder_of(name, resume_from_checkpoint) for name in self.pair.learners}
        for name, folder in folders.items():
            if not os.path.isdir(folder):
                raise ValueError(
                    f"The checkpoint {resume_from_checkpoint!r} has no {name}: there is no folder {folder!r}. It was "
                    "written by a trainer of one model. Resume from a checkpoint of both, or load its model with "
                    "`from_pretrained`, pass it as `model` and start a new training."
                )
        for name, folder in folders.items():
            learner = self.pair.learners[name]
            if is_peft_model(learner):
                # Trainer would take the adapter in `student/` for a second one of the teacher.
                learner.load_adapter(folder, learner.active_adapter, is_trainable=name not in self.pair.frozen)
            else:
                super()._load_from_checkpoint(folder, learner)

    def _load_best_model(self) -> None:
        """Load both models of the best checkpoint."""
        there = os.path.isdir(self.state.best_model_checkpoint)  # if not, Trainer warns
        if self.pair is None or self.is_deepspeed_enabled or self.is_fsdp_enabled or not there:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _first(logits: Any) -> Tensor:
    return logits[0] if isinstance(logits, (tuple, list)) else logits
