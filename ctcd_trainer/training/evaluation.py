"""Evaluation and prediction of both models in one pass over the data."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from ..graph import STUDENT, TEACHER
from ..pair.model import LearnerView
from ..saving.checkpoints import PairCheckpointTrainer
from ..tasks.base import Task
from .meters import EvaluationMeter, MetricsOfEach, copy_of_metrics, perplexities, predictions_of


class CoDistillationPredictionOutput(NamedTuple):
    """Trainer's `PredictionOutput` with the student's predictions, as `predict` returns it when asked for them."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    student_predictions: Any


class CoDistillationEvalLoopOutput(EvalLoopOutput):
    """Trainer's `EvalLoopOutput`, with the student's predictions as an attribute: it unpacks as Trainer's does."""

    student_predictions: Any = None


class PairEvaluationTrainer(PairCheckpointTrainer):
    """What Trainer does for evaluation and prediction, for two models."""

    task: Task | None
    _evaluation_meter: EvaluationMeter | None
    _student_metrics: Any
    _predicting: bool
    _student_predictions: Any

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
            The teacher's predictions, and the metrics of both: the teacher's without prefix, `student_*`, `agreement`
            and, for language models, perplexities. The student's predictions are the attribute `student_predictions`.
        """
        if self.pair is None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self.is_in_train:
            self._loss_meter.check(self.accelerator.gather)  # before metrics fail on predictions of broken weights
        self._evaluation_meter = meter = EvaluationMeter()
        self._give_hard_loss()
        users = self.compute_metrics, self.preprocess_logits_for_metrics
        try:
            if self.compute_metrics is not None:
                functions = {TEACHER: self.compute_metrics, STUDENT: self.compute_metrics}
                if self.args.batch_eval_metrics:
                    if self._student_metrics is None:
                        self._student_metrics = copy_of_metrics(self.compute_metrics)
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
        output.metrics.update(meter.metrics(metric_key_prefix, self.args.logging_nan_inf_filter))
        if self.task.language_model:
            output.metrics.update(perplexities(output.metrics, metric_key_prefix))
        students = predictions_of(STUDENT, output.predictions)
        if self._predicting:  # `Trainer.predict` makes an output of its own of this one
            self._student_predictions = students
        output = output._replace(predictions=predictions_of(TEACHER, output.predictions))
        output = CoDistillationEvalLoopOutput(*output)
        output.student_predictions = students
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Trainer's prediction step for each learner in turn.

        Returns:
            The teacher's loss, the logits by name of the learner (`None` if only losses are wanted), and the labels.
        """
        if self.pair is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        losses, logits, labels = {}, {}, None
        views = {name: LearnerView(model, name) for name in self.pair.learners}
        for name, view in views.items():
            learner = self.pair.learners[name]
            keys = ignore_keys
            if keys is None:
                keys = getattr(learner.config, "keys_to_ignore_at_inference", ["past_key_values"])
            losses[name], logits[name], labels = self._prediction_step_of(
                view, inputs, prediction_loss_only, keys, **gen_kwargs
            )
        if losses[TEACHER] is not None:
            # The loss of nothing on any process is NaN, which Trainer does not count (`logging_nan_inf_filter`).
            items = torch.as_tensor(self._get_num_items_in_batch([inputs], self.args.device)).reshape(-1)[0]
            losses = {name: loss.where(items.to(loss.device) > 0, torch.nan) for name, loss in losses.items()}
        if self._evaluation_meter is not None:
            if losses[STUDENT] is not None:
                repeated = losses[STUDENT].repeat(self.args.eval_batch_size)  # weighted as Trainer weighs its own
                self._evaluation_meter.add_losses(self.gather_function(repeated))
            outputs = [views[name].outputs for name in (TEACHER, STUDENT)]
            with torch.no_grad():
                agreement = self.task.agreement(*outputs, inputs) if None not in outputs else None
            if agreement is not None:
                self._evaluation_meter.add_agreement(*(self.gather_function(count) for count in agreement))
        return losses[TEACHER], None if prediction_loss_only else logits, None if prediction_loss_only else labels

    def _prediction_step_of(
        self, view: LearnerView, *args: Any, **gen_kwargs: Any
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Trainer's prediction step for one learner."""
        return super().prediction_step(view, *args, **gen_kwargs)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        *,
        student_predictions: bool = False,
        **gen_kwargs: Any,
    ) -> PredictionOutput | CoDistillationPredictionOutput:
        """The teacher's predictions and both models' metrics; see `Trainer.predict`.

        Args:
            test_dataset: The data set.
            ignore_keys: Keys of the outputs that are no predictions.
            metric_key_prefix: Prefix of the metrics.
            student_predictions: Whether to return the student's predictions too, as a fourth field.
            **gen_kwargs: For generation, as `Seq2SeqTrainer.predict` takes them.
        """
        self._predicting = student_predictions
        try:
            output = super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        finally:
            self._predicting = False
            students, self._student_predictions = self._student_predictions, None
        return CoDistillationPredictionOutput(*output, students) if student_predictions else output
