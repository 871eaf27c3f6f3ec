"""Evaluation of all learners in one pass over the data: metrics, losses, agreement and predictions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..graph import LEARNERS, STUDENT
from ..pair.learner_view import LearnerView
from ..pair.model import CoDistillationModel
from ..tasks.two_tokenizers import prefix_of
from .held_out import HeldOutErrors, rows_to_count
from .meters import EvaluationMeter, MetricsOfEach, copy_of_metrics, perplexities, predictions_of


class CoDistillationPredictionOutput(NamedTuple):
    """Trainer's `PredictionOutput` with the student's predictions, as `predict` returns it when asked for them."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    student_predictions: Any


class CoDistillationEvalLoopOutput(EvalLoopOutput):
    """Trainer's `EvalLoopOutput` with the student's predictions as an attribute; it unpacks as Trainer's does."""

    student_predictions: Any = None


class PairEvaluation:
    """Gathers what Trainer's evaluation loop does not know: the numbers of the learners beside the primary.

    Args:
        args: The training arguments; `None` until Trainer has made its defaults.
        compute_metrics: The user's function.

    Raises:
        ValueError: `batch_eval_metrics` is set, and `compute_metrics` keeps a state that cannot be copied.
    """

    def __init__(self, args: TrainingArguments | None, compute_metrics: Callable | None = None) -> None:
        self.args = args
        self._meter = EvaluationMeter()
        self._kept: dict[str, Any] | None = None
        #: The errors of all models, if the weights of edges follow from the present evaluation.
        self.errors: HeldOutErrors | None = None
        #: The keys of an evaluation that are not the user's metrics, and the learner of each that is a loss.
        self.ours: dict[str, str | None] = {}
        #: With `batch_eval_metrics`, the function and its copies: it keeps a state between its calls.
        self._stateful: dict[str, Callable] = {}
        if args is not None and args.batch_eval_metrics and compute_metrics is not None:
            self._functions(compute_metrics, LEARNERS)

    def start(
        self, pair: CoDistillationModel, compute_metrics: Callable | None, preprocess: Callable | None, prefix: str
    ) -> tuple[Callable | None, Callable | None]:
        """Begin an evaluation.

        Args:
            pair: The pair.
            compute_metrics: The user's function, or `None`.
            preprocess: The user's `preprocess_logits_for_metrics`, or `None`.
            prefix: Prefix of the metrics.

        Returns:
            Both functions as the evaluation loop has to call them, which holds the logits of all learners by name.
        """
        self._meter = EvaluationMeter()
        names = list(pair.learners)
        each_metrics = each_preprocess = None
        if compute_metrics is not None:
            functions = self._functions(compute_metrics, names)
            each_metrics = MetricsOfEach(functions, names[0], self._meter, self.args.batch_eval_metrics, prefix)
        if preprocess is not None:

            def each_preprocess(logits: Mapping[str, Any], labels: Any) -> dict[str, Any]:
                return {name: preprocess(own, labels) for name, own in logits.items()}

        return each_metrics, each_preprocess

    def _functions(self, compute_metrics: Callable, learners: Sequence[str]) -> dict[str, Callable]:
        """The user's function for each learner; copies of it if it keeps a state."""
        if not self.args.batch_eval_metrics:
            return dict.fromkeys(learners, compute_metrics)
        first, *others = learners
        if self._stateful.get(first) is not compute_metrics:
            self._stateful = {first: compute_metrics, **{name: copy_of_metrics(compute_metrics) for name in others}}
        return self._stateful

    def add(
        self,
        pair: CoDistillationModel,
        views: Mapping[str, LearnerView],
        losses: Mapping[str, Tensor | None],
        inputs: Mapping[str, Any],
        gather: Callable[[Tensor], Tensor],
        sources: Mapping[str, Any],
    ) -> None:
        """Add the losses and the agreement of one batch.

        Args:
            pair: The pair.
            views: The learners by name, after they have run on the batch.
            losses: Their losses, 0-dimensional, or `None` without labels.
            inputs: The batch.
            gather: Joins a tensor of all processes.
            sources: Outputs of the frozen models outside of the pair, by name, if their errors are wanted.
        """
        outputs = {name: view.last_outputs for name, view in views.items()} | sources
        if self.errors is not None and pair.objective.is_labelled(inputs) and None not in outputs.values():
            rows = next(value for value in inputs.values() if isinstance(value, Tensor))
            alone = self.args.world_size == 1
            counted = None if alone else rows_to_count(len(rows), self.args.process_index, gather, rows.device)
            with torch.no_grad():
                self.errors.add(pair.task, outputs, inputs, counted)
        for name in list(views)[1:]:
            if losses[name] is not None:
                repeated = losses[name].repeat(self.args.eval_batch_size)  # weighted as Trainer weighs its own
                self._meter.add_losses(gather(repeated))
            outputs = [views[pair.primary].last_outputs, views[name].last_outputs]
            with torch.no_grad():
                ran = all(output is not None for output in outputs)
                agreement = pair.task.agreement(*map(pair.task.named, outputs), inputs) if ran else None
            if agreement is not None:
                self._meter.add_agreement(*(gather(count) for count in agreement))

    def finish(self, pair: CoDistillationModel, output: EvalLoopOutput, prefix: str) -> CoDistillationEvalLoopOutput:
        """Add the metrics of the learners beside the primary, and part the predictions.

        A metric of the user's function keeps its name; the one of ours with that name is left out.

        Args:
            pair: The pair.
            output: Trainer's output, with the predictions of all learners by name.
            prefix: Prefix of the metrics.
        """
        ours = self._meter.metrics(prefix, self.args.logging_nan_inf_filter)
        if pair.task.language_model:
            ours |= perplexities({f"{prefix}_loss": output.metrics.get(f"{prefix}_loss")} | ours, prefix)
        added = {key: value for key, value in ours.items() if key not in output.metrics}
        output.metrics.update(added)
        losses = {f"{prefix}_{prefix_of(name)}loss": name for name in pair.learners}
        self.ours |= dict.fromkeys(added) | losses
        predictions = {name: predictions_of(name, output.predictions) for name in pair.learners}
        if self._kept is not None:
            self._kept.update(predictions)
        parted = CoDistillationEvalLoopOutput(*output._replace(predictions=predictions[pair.primary]))
        parted.student_predictions = predictions.get(STUDENT)
        return parted

    @contextmanager
    def keeping_predictions(self) -> Iterator[dict[str, Any]]:
        """Keep the predictions of each learner, by name, of the evaluation that is made in this context."""
        self._kept = {}
        try:
            yield self._kept
        finally:
            self._kept = None
