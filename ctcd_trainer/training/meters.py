"""Numbers about several models at once: loss terms in training; losses, metrics and agreement in evaluation."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import logging

from ..graph import STUDENT, Graph

logger = logging.get_logger(__name__)


class LossMeter:
    """Adds up loss terms on the device, so that no step waits for them, and notes the first that is not finite."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._bad_steps: Tensor | None = None
        self._hard: Tensor | None = None
        #: The present step; how many of its micro-batches have each component, and how many earlier steps.
        self._step = 0
        self._present: Tensor | None = None
        self._steps: Tensor | None = None

    def add(self, components: Mapping[str, Tensor], step: int, scale: float = 1.0, labelled: Tensor | int = 1) -> None:
        """Add the components of one micro-batch of an optimizer step (from 1), multiplied by `scale`.

        They are 0-dimensional, divided by the item count of the whole accumulated batch, so that the sum over its
        micro-batches is the mean. Their names never change. If `labelled`, the number of labelled items, is 0 in all
        micro-batches of a step, the step has no hard loss.
        """
        values = torch.stack([value.detach().float() for value in components.values()]) * scale
        if self._sums is None:
            self._names = tuple(components)
            self._sums, self._present, self._steps = (torch.zeros_like(values) for _ in range(3))
            self._bad_steps = torch.full_like(values, torch.inf)
            self._hard = torch.tensor([name.endswith("_hard_loss") for name in self._names], device=values.device)
        if step != self._step:
            self._end_step()
            self._step = step
        self._present += torch.where(self._hard, torch.as_tensor(labelled, device=values.device) > 0, 1)
        self._sums += values
        self._bad_steps = torch.where(values.isfinite(), self._bad_steps, self._bad_steps.clamp(max=step))

    def _end_step(self) -> None:
        self._steps += self._present.clamp(max=1)
        self._present.zero_()

    def check(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Raise `FloatingPointError` with models, components and step if one was not finite on some process.

        `gather` stacks a tensor `(1, components)` of all processes to `(processes, components)`.
        """
        if self._bad_steps is None:
            return
        bad_steps = gather(self._bad_steps[None]).amin(0).tolist()
        first = min(bad_steps)
        if first == float("inf"):
            return
        found = zip(self._names, bad_steps, strict=True)
        names = [name for name, step in found if step == first and name.endswith("_loss")]  # no gates
        broken = [name.removesuffix("_hard_loss") for name in names if name.endswith("_hard_loss")]
        if not broken:  # only a soft loss: its source is frozen and has no hard loss
            broken = [name.removesuffix("_loss").removesuffix("_feature").split("_from_")[-1] for name in names]
        raise FloatingPointError(
            f"The loss of the {' and '.join(dict.fromkeys(broken))} became NaN or infinite at step {int(first)} "
            f"({', '.join(names)}). No checkpoint was written since. Lower the learning rate of that model, check its "
            "weights, inputs and labels, or train in bf16 or fp32 instead of fp16."
        )

    def drain(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the mean of each component since the last call, over the steps and the processes that have it."""
        if self._sums is None:
            return {}
        self._end_step()
        sums, steps = gather(torch.stack([self._sums, self._steps])[None]).mean(0)
        means, steps = torch.stack([sums / steps, steps]).tolist()
        self._sums.zero_()
        self._steps.zero_()
        return {name: mean for name, mean, number in zip(self._names, means, steps, strict=True) if number > 0}


def warn_of_closed_gates(graph: Graph, logs: Mapping[str, float]) -> None:
    """Warn once of each gate whose mean since the last log is below 1 %."""
    for edge in graph.edges:
        if logs.get(edge.gate_name, 1.0) < 0.01:
            logger.warning_once(
                f"The gate {edge.gate!r} of {edge.name} lets less than 1 % through, so that the {edge.learner} learns "
                f"next to nothing from the {edge.source}. Set another gate, or `{edge.weight_name}=0`."
            )


class EvaluationMeter:
    """Collects the student's losses and the agreement, which Trainer does not, over the batches of an evaluation."""

    def __init__(self) -> None:
        self._losses: list[np.ndarray] = []
        self._same = 0.0
        self._scored = 0.0

    def add_losses(self, losses: Tensor) -> None:
        """Add the student's losses `(rows,)`, gathered from all processes."""
        self._losses.append(losses.float().cpu().numpy())

    def add_agreement(self, same: Tensor, scored: Tensor) -> None:
        """Add the equal predictions and the scored positions of each row `(rows,)`, gathered from all processes."""
        self._same += same.sum().item()
        self._scored += scored.sum().item()

    def losses(self, last_batch: bool = False) -> np.ndarray | None:
        """Return the student's losses `(rows,)`, of all batches or of the last one; `None` without labels."""
        return np.concatenate(self._losses[-1:] if last_batch else self._losses) if self._losses else None

    def metrics(self, prefix: str, finite_only: bool = True) -> dict[str, float]:
        """Return `<prefix>_student_loss` and `<prefix>_agreement`, each if there is data for it.

        With `finite_only`, losses that are not finite are left out, unless all are not, as Trainer does it with
        `logging_nan_inf_filter`.
        """
        metrics = {}
        losses = self.losses()
        if losses is not None:
            finite = np.isfinite(losses)
            losses = losses[finite] if finite_only and finite.any() else losses
            metrics[f"{prefix}_student_loss"] = float(np.mean(losses))
        if self._scored:
            metrics[f"{prefix}_agreement"] = self._same / self._scored
        return metrics


@dataclass
class MetricsOfEach:
    """Calls the user's `compute_metrics` once per model, with an ordinary `EvalPrediction`.

    Args:
        functions: The user's function, or a copy of it, by name of the learner.
        primary: Name of the learner whose metrics get no prefix. The prefix of the others is their name.
        meter: Holds the losses of the others.
        batched: Whether Trainer calls this after each batch (`batch_eval_metrics`).
        metric_key_prefix: Prefix of the evaluation, which the user's keys may have.
    """

    functions: Mapping[str, Callable[..., dict[str, Any]]]
    primary: str
    meter: EvaluationMeter
    batched: bool
    metric_key_prefix: str

    def __call__(self, prediction: EvalPrediction, **kwargs: Any) -> dict[str, Any]:
        """Return the metrics of all models. `prediction.predictions` holds predictions by name of the learner."""
        metrics: dict[str, Any] = {}
        for name, function in self.functions.items():
            losses, prefix = prediction.losses, ""
            if name != self.primary:
                losses = None if losses is None else self.meter.losses(last_batch=self.batched)
                prefix = f"{name}_"
            predictions = predictions_of(name, prediction.predictions)
            part = EvalPrediction(predictions, prediction.label_ids, inputs=prediction.inputs, losses=losses)
            values = function(part, **kwargs) or {}
            named = {
                f"{prefix}{key.removeprefix(f'{self.metric_key_prefix}_')}": value for key, value in values.items()
            }
            for key in named.keys() & metrics.keys():
                logger.warning_once(
                    f"`compute_metrics` returns {key!r}, which is also the name of the {name}'s "
                    f"{key.removeprefix(prefix)!r}. The evaluation has the first; rename it to see both."
                )
            metrics = named | metrics
        return metrics


def copy_of_metrics(compute_metrics: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Copy a `compute_metrics` with state for another model; raises `ValueError` for a function or a class."""
    if inspect.isroutine(compute_metrics) or inspect.isclass(compute_metrics):
        raise ValueError(
            "`batch_eval_metrics=True` with two models needs a `compute_metrics` object with `__call__`, to copy its "
            f"state, and it is {compute_metrics!r}. Pass an instance of a class, or set `batch_eval_metrics=False`."
        )
    return copy.deepcopy(compute_metrics)


def predictions_of(learner: str, predictions: Any) -> Any:
    """Select a learner's predictions from those of an evaluation loop: a dict by name, or one dict per batch."""
    if isinstance(predictions, list):
        return [batch[learner] for batch in predictions]
    return predictions if predictions is None else predictions[learner]


def perplexities(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return `<prefix>_perplexity` and `<prefix>_student_perplexity`, the exponentials of the losses in nats."""
    values = {}
    for name in ("", f"{STUDENT}_"):
        loss = metrics.get(f"{prefix}_{name}loss")
        if loss is not None:
            with np.errstate(over="ignore"):
                values[f"{prefix}_{name}perplexity"] = float(np.exp(loss))
    return values
