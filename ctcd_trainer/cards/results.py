"""What a training has measured, as model cards show it: the metrics of each model, by step and at the end."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Parts of the names of metrics of which a smaller value is better.
_LOWER_IS_BETTER = re.compile(r"(^|_)(loss|perplexity|mse|mae|rmse|error|wer|cer|ter)($|_)")
#: Keys of an evaluation that say how fast it was, not how good the models are.
_SPEED = re.compile(r"(^|_)(runtime|samples|\w+_per_second|model_preparation_time)(_mm)?$")

#: Metrics by name, for each learner.
Metrics = dict[str, dict[str, float]]


@dataclass
class Evaluation:
    """The metrics of all learners at a step.

    Attributes:
        step: Number of optimizer steps before.
        epoch: Number of epochs before, if it is known.
        metrics: The metrics without `eval_`; those of several data sets have their names before theirs (`dev_loss`).
            What belongs to all learners, the agreement, is each one's.
    """

    step: int
    epoch: float | None
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The evaluations of a training.

    Attributes:
        learners: Names of the learners, the primary first.
        during: The evaluations while it trained.
        final: The evaluation of the models as they are now, or the last one before; `None` without any.
        curves: Steps and values of the task loss in training, for each learner.
    """

    learners: Sequence[str]
    during: list[Evaluation]
    final: Evaluation | None
    curves: Mapping[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, state: Any, learners: Sequence[str], best_is_loaded: bool = False) -> "Results":
        """Read them from the logs.

        Args:
            state: Trainer's state.
            learners: Names of the learners, the primary first.
            best_is_loaded: Whether the best checkpoint is loaded when the training has ended.
        """
        logs = state.log_history
        ended = [index for index, entry in enumerate(logs) if "train_runtime" in entry]
        end = ended[-1] if ended else len(logs)
        during, after = (_evaluations(part, learners) for part in (logs[:end], logs[end:]))
        final = during[-1] if during else None
        if ended and best_is_loaded and state.best_global_step is not None:
            final = next((each for each in during if each.step == state.best_global_step), final)
        curves = {name: _curve(logs, f"{name}_hard_loss") for name in learners}
        return cls(learners, during if state.global_step else [], after[-1] if after else final, curves)

    @property
    def final_metrics(self) -> Metrics:
        """The metrics at the end for each learner; empty without an evaluation."""
        return self.final.metrics if self.final is not None else {name: {} for name in self.learners}

    def main_metric(self, preferred: str | None = None) -> str | None:
        """The metric that says best how good the models are: the preferred one, or the first that is no loss.

        Args:
            preferred: `metric_for_best_model`, with or without `eval_` and the name of a learner.
        """
        names = [name for name in metric_names(self.final_metrics) if not is_agreement(name)]
        if preferred is not None:
            preferred = re.sub(rf"^(eval_)?(({'|'.join(self.learners)})_)?", "", preferred)
        order = [
            preferred,
            "accuracy",
            "matthews_correlation",
            *(name for name in names if "loss" not in name),
            *names,
        ]
        return next((name for name in order if name in names), None)


def metric_names(metrics: Metrics) -> list[str]:
    """The names of all metrics: losses first, agreements last."""
    names = list(dict.fromkeys(name for own in metrics.values() for name in own))
    return sorted(names, key=lambda name: (not name.endswith("loss"), is_agreement(name)))


def is_agreement(name: str) -> bool:
    """Whether a metric says how often the models predict the same."""
    return name.endswith("agreement")


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of a metric is a better one, as far as its name tells."""
    return _LOWER_IS_BETTER.search(name) is not None


def metrics_of(evaluation: Mapping[str, Any], learners: Sequence[str]) -> Metrics:
    """Divide what an evaluation gave among the learners.

    Args:
        evaluation: With keys as `eval_loss` (the primary's), `eval_student_loss` and `eval_agreement`; keys of several
            data sets have their name after `eval_`. What is no number or says how fast it was is left out.
        learners: Names of the learners, the primary first.
    """
    metrics: Metrics = {name: {} for name in learners}
    others = re.compile(rf"(?:(.+)_)?({'|'.join(learners[1:])})_(.+)")
    for key, value in evaluation.items():
        if not key.startswith("eval_") or _SPEED.search(key) or not isinstance(value, (int, float)):
            continue
        name = key.removeprefix("eval_")
        match = others.fullmatch(name)
        if match is not None:
            metrics[match[2]]["_".join(filter(None, (match[1], match[3])))] = value
        else:
            for learner in learners if is_agreement(name) else learners[:1]:
                metrics[learner][name] = value
    return metrics


def baseline_of(baseline: Any, learners: Sequence[str]) -> Metrics:
    """The metrics of models that were trained otherwise, as the argument `baseline` gives them.

    Args:
        baseline: Metrics by name of the learner, with or without `eval_`; or what one evaluation of both gave
            (`eval_accuracy`, `eval_student_accuracy`); or a JSON file of that, or the folder with its
            `all_results.json`.
        learners: Names of the learners, the primary first.

    Raises:
        ValueError: It is none of these.
    """
    given = baseline
    if isinstance(baseline, (str, os.PathLike)):
        path = Path(baseline, "all_results.json") if os.path.isdir(baseline) else Path(baseline)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"`baseline={str(baseline)!r}` cannot be read: {error}. Pass the output folder of an evaluated run, "
                "or its all_results.json."
            ) from error
    if not isinstance(given, Mapping):
        raise ValueError(
            f"`baseline={baseline!r}` is a {type(given).__name__}: pass the metrics by name of the model, e.g. "
            f"`{{{learners[-1]!r}: {{'eval_accuracy': 0.78}}}}`, or the all_results.json of a run."
        )
    if any(isinstance(value, Mapping) for value in given.values()):
        unknown = set(given) - set(learners)
        if unknown:
            raise ValueError(
                f"`baseline` has metrics of {sorted(unknown)}, but the models are {list(learners)}: use these names."
            )
        flat = {name: _with_prefix(own) for name, own in given.items()}
        found = {name: metrics_of(own, learners)[learners[0]] for name, own in flat.items()}
    else:
        found = metrics_of(_with_prefix(given), learners)
    return {name: {key: v for key, v in own.items() if not is_agreement(key)} for name, own in found.items() if own}


def _with_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"eval_{key.removeprefix('eval_')}": value for key, value in metrics.items()}


def _evaluations(logs: Sequence[Mapping[str, Any]], learners: Sequence[str]) -> list[Evaluation]:
    """The evaluations in the logs; those of several data sets at a step are one."""
    found: dict[int, Evaluation] = {}
    for entry in logs:
        metrics = metrics_of(entry, learners)
        if any(metrics.values()):
            step = entry.get("step", 0)
            evaluation = found.setdefault(step, Evaluation(step, entry.get("epoch"), {name: {} for name in learners}))
            for name, own in metrics.items():
                evaluation.metrics[name] |= own
    return list(found.values())


def _curve(logs: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in logs if key in entry and "step" in entry]
