"""Hyperparameter search: the default space of a pair, and the default objective."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend, default_compute_objective

from ..arguments import DistillationArguments
from ..graph import EDGES, STUDENT, TEACHER, Graph


@dataclass(frozen=True)
class Range:
    """The values of a number that a search tries.

    Attributes:
        low: The smallest value.
        high: The largest value.
        log: Whether the logarithm of the value is drawn evenly.
    """

    low: float
    high: float
    log: bool = False


#: The default space: the rates of both models, the weights of the soft losses, their temperature and their warm-up.
DEFAULT_SPACE: dict[str, Range] = {
    "learning_rate": Range(1e-5, 3e-4, log=True),
    "student_learning_rate": Range(1e-5, 1e-3, log=True),
    **{edge.weight_name: Range(0.03, 3.0, log=True) for edge in EDGES},
    "temperature": Range(1.0, 4.0),
    "soft_warmup_ratio": Range(0.0, 0.5),
}


def default_space(graph: Graph, args: TrainingArguments) -> dict[str, Range]:
    """Return the part of the default space that has an effect with these arguments."""
    without = {edge.weight_name for edge in EDGES} - {edge.weight_name for edge in graph.edges}
    given = {edge: args.settings_of(edge) if hasattr(args, "settings_of") else {} for edge in graph.edges}
    # A number would take the place of `auto`, or contradict the argument `edges`.
    without |= {edge.weight_name for edge, own in given.items() if edge.auto or "weight" in own}
    without |= {"temperature"} if all("temperature" in own for own in given.values()) else set()
    without |= {"soft_warmup_ratio"} if all("schedule" in own for own in given.values()) else set()
    without |= {"student_learning_rate"} if STUDENT in graph.frozen else set()
    without |= {"learning_rate"} if TEACHER in graph.frozen else set()
    return {name: values for name, values in DEFAULT_SPACE.items() if name not in without and hasattr(args, name)}


def for_backend(space: Mapping[str, Range], backend: HPSearchBackend, trial: Any) -> dict[str, Any]:
    """Draw a point of a space with Optuna, or describe the space for Ray."""
    if backend == HPSearchBackend.OPTUNA:
        return {
            name: trial.suggest_float(name, values.low, values.high, log=values.log) for name, values in space.items()
        }
    from ray import tune

    return {
        name: (tune.loguniform if values.log else tune.uniform)(values.low, values.high)
        for name, values in space.items()
    }


@contextmanager
def setting_trial(arguments: DistillationArguments) -> Iterator[None]:
    """Let Trainer set the arguments of a trial, and check them.

    Trainer casts a value to the type of the old value: a weight would become one that follows the mode.

    Raises:
        ValueError: The arguments of the trial are not valid.
    """
    before = {name: getattr(arguments, name) for name in (*(edge.weight_name for edge in EDGES), "edges")}
    for name in before:
        setattr(arguments, name, None)
    yield
    for name, value in before.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.check()


def objective(metrics: Mapping[str, float], metric: str | None, graph: Graph, ours: Mapping[str, str | None]) -> float:
    """Return the default objective: a metric of either model, or Trainer's sum of all metrics.

    Without metrics of the user, it is the sum of the losses of the models that are trained.

    Args:
        metrics: The metrics of an evaluation.
        metric: `metric_for_best_model`.
        graph: The graph of the trial.
        ours: The keys that are not metrics of the user, and the learner of each that is a loss.

    Raises:
        KeyError: The evaluation has no such metric; the message names those that it has.
    """
    if metric is None:
        value = default_compute_objective({key: value for key, value in metrics.items() if key not in ours})
        losses = [metrics[key] for key, name in ours.items() if key in metrics and name in graph.trained]
        if value is None and not losses:
            raise KeyError(
                f"The evaluation has no metric and no loss, only {sorted(metrics)}: set `compute_objective`."
            )
        return sum(losses) if value is None else value
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    if key not in metrics:
        raise KeyError(f"`metric_for_best_model={metric!r}`: the evaluation has no {key!r}, only {sorted(metrics)}.")
    return metrics[key]
