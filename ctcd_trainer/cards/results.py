"""The scores that a model card shows: read from the logs of a run, and written as Markdown tables."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState

from ..arguments import greater_is_better

#: Keys of an evaluation that say how fast it was.
_SPEED = re.compile(r"(^|_)(runtime|samples|\w+_per_second|model_preparation_time)(_mm)?$")
#: Rows of the table of evaluations; of more evaluations, so many are shown, evenly spaced.
_MAX_ROWS = 20

#: Metrics of each learner by name, without `eval_`. With several data sets, a name begins with the data set
#: (`dev_loss`). An agreement belongs to all learners, so each has it.
Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of all learners after some optimizer steps."""

    step: int
    epoch: float | None
    metrics: Metrics


@dataclass(frozen=True)
class Results:
    """The evaluations of a run.

    Attributes:
        learners: Names of the learners, the primary first.
        during: The evaluations in the course of the training.
        final: The evaluation of the models as they are now, or else the last one; `None` without any.
        curves: Steps and values of each learner's task loss in training.
    """

    learners: Sequence[str]
    during: list[Evaluation]
    final: Evaluation | None
    curves: Mapping[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, state: TrainerState, learners: Sequence[str], best_is_loaded: bool = False) -> "Results":
        """Read them from Trainer's logs.

        With `best_is_loaded` (`load_best_model_at_end`), a finished training leaves the models of the best checkpoint.
        """
        logs = state.log_history
        ends = [index for index, entry in enumerate(logs) if "train_runtime" in entry]
        end = ends[-1] if ends else len(logs)
        during, after = (_evaluations(part, learners) for part in (logs[:end], logs[end:]))
        final = (after or during or [None])[-1]
        if ends and not after and best_is_loaded and state.best_global_step is not None:
            final = next((entry for entry in during if entry.step == state.best_global_step), final)
        losses = {name: f"{name}_hard_loss" for name in learners}
        curves = {name: [(log["step"], log[key]) for log in logs if key in log] for name, key in losses.items()}
        return cls(learners, during if state.global_step else [], final, curves)

    @property
    def final_metrics(self) -> Metrics:
        """The metrics of each learner at the end; none without an evaluation."""
        return self.final.metrics if self.final is not None else {name: {} for name in self.learners}

    def main_metric(self, preferred: str | None = None) -> str | None:
        """The metric that tells best how good the models are: `metric_for_best_model`, or one that is no loss."""
        names = [name for name in metric_names(self.final_metrics) if not is_agreement(name)]
        preferred = re.sub(rf"^(eval_)?(({'|'.join(self.learners)})_)?", "", preferred or "")
        no_losses = [name for name in names if "loss" not in name]
        order = [preferred, "accuracy", "matthews_correlation", *no_losses, *names]
        return next((name for name in order if name in names), None)

    # ---- Tables ----

    def final_table(self, learner: str) -> str:
        """The metrics of all learners at the end, on the card of one; empty without an evaluation."""
        metrics = self.final_metrics
        keys = [key for key in metric_names(metrics) if not is_agreement(key)]
        rows = [[words(key), *(format_number(found.get(key)) for found in metrics.values())] for key in keys]
        return markdown_table(["metric", *heads(metrics, learner)], rows)

    def gain_table(self, baseline: Metrics, learner: str) -> str:
        """The metrics of a learner beside those of its baseline; empty if they have no metric in common."""
        old, new = baseline.get(learner, {}), self.final_metrics[learner]
        pairs = {key: (old[key], new[key]) for key in old if key in new}
        rows = [[words(key), *map(format_number, pair), f"{pair[1] - pair[0]:+.4f}"] for key, pair in pairs.items()]
        lower = ", ".join(words(key) for key in pairs if greater_is_better(key) is False)
        table = markdown_table(["metric", "baseline", "this model", "difference"], rows)
        return f"{table}\n\nLower is better: {lower}." if lower else table

    def evaluations_table(self) -> str:
        """The metrics of all learners by step, at most 20 rows; empty without an evaluation."""
        keys = dict.fromkeys(key for entry in self.during for key in metric_names(entry.metrics))
        # An agreement is the same for all learners: one column.
        columns = [(name, key) for key in keys for name in self.learners[: 1 if is_agreement(key) else None]]
        columns = [(name, key) for name, key in columns if any(key in entry.metrics[name] for entry in self.during)]
        titles = [words(key) if is_agreement(key) else f"{name} {words(key)}" for name, key in columns]
        chosen = np.linspace(0, len(self.during) - 1, min(len(self.during), _MAX_ROWS)).round().astype(int)
        rows = []
        for entry in (self.during[index] for index in chosen):
            epoch = f"{entry.epoch:.2f}" if entry.epoch is not None else "-"
            values = (format_number(entry.metrics[name].get(key)) for name, key in columns)
            rows.append([str(entry.step), epoch, *values])
        return markdown_table(["step", "epoch", *titles], rows, texts=0)

    def agreement(self) -> str:
        """How often the learners predict the same at the end, as sentences."""
        metrics = self.final_metrics[self.learners[0]]
        return " ".join(
            f"The models make the same prediction at {100 * share:.1f} % of the scored positions"
            + (f" of {words(key.removesuffix('_agreement'))}" if key != "agreement" else "")
            + " (the rows or tokens that have a label)."
            for key, share in metrics.items()
            if is_agreement(key)
        )


def metrics_of(evaluation: Mapping[str, Any], learners: Sequence[str]) -> Metrics:
    """Divide the metrics of an evaluation among the learners. Texts and measures of speed are left out.

    `eval_loss` belongs to the first learner, `eval_student_loss` and `eval_dev_student_loss` to the student.
    """
    metrics: Metrics = {name: {} for name in learners}
    others = re.compile(rf"eval_(?:(.+)_)?({'|'.join(learners[1:])})_(.+)")
    matches = {key: others.fullmatch(key) for key in evaluation}
    names = {key: "_".join(filter(None, (match[1], match[3]))) for key, match in matches.items() if match}
    for key, value in evaluation.items():
        name = names.get(key, key.removeprefix("eval_"))
        if name == key or _SPEED.search(key) or not isinstance(value, (int, float)):
            continue
        owners = [matches[key][2]] if key in names else learners[:1]
        if is_agreement(name) and name in names.values():
            name += "_metric"  # the user's own, which each learner has
        for learner in learners if is_agreement(name) else owners:
            metrics[learner][name] = value
    return metrics


def baseline_of(baseline: Any, learners: Sequence[str]) -> Metrics:
    """The metrics of models that were trained in another way, from the argument `baseline`.

    Args:
        baseline: Metrics by learner; or the metrics of one evaluation of all learners (`eval_accuracy`,
            `eval_student_accuracy`), a JSON file with those, or the folder of its `all_results.json`.
        learners: Names of the learners, the primary first.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(baseline, (str, os.PathLike)):
        path = Path(baseline, "all_results.json") if os.path.isdir(baseline) else Path(baseline)
        try:
            baseline = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            text = f"`baseline={str(baseline)!r}` cannot be read: {error}. Pass a folder with an all_results.json."
            raise ValueError(text) from error
    if not isinstance(baseline, Mapping):
        raise ValueError(
            f"`baseline={baseline!r}` is a {type(baseline).__name__}: pass the metrics by name of the model, e.g. "
            f"`{{{learners[-1]!r}: {{'eval_accuracy': 0.78}}}}`, or the all_results.json of a run."
        )
    if not any(isinstance(value, Mapping) for value in baseline.values()):
        baseline = metrics_of(_with_prefix(baseline), learners)
    if unknown := set(baseline) - set(learners):
        raise ValueError(f"`baseline` names {sorted(unknown)}, but the models are {list(learners)}: use these names.")
    cleaned = {name: metrics_of(_with_prefix(values), learners)[learners[0]] for name, values in baseline.items()}
    return {
        name: {key: value for key, value in values.items() if not is_agreement(key)}
        for name, values in cleaned.items()
    }


def metric_names(metrics: Metrics) -> list[str]:
    """The names of all metrics: losses first, agreements last."""
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    return sorted(names, key=lambda name: (not name.endswith("loss"), is_agreement(name)))


def is_agreement(name: str) -> bool:
    """Tell whether a metric counts how often the models predict the same."""
    return name.endswith("agreement")


def words(name: str) -> str:
    """The name of a metric for people."""
    return name.replace("_", " ")


def format_number(value: float | None) -> str:
    """A metric as text, `-` for none."""
    return "-" if value is None else f"{value:,.1f}" if 1000 <= abs(value) < math.inf else f"{value:.4f}"


def heads(learners: Mapping[str, Any], learner: str) -> list[str]:
    """The names of the learners, with the one whose card it is marked."""
    return [f"**{name}** (this model)" if name == learner else name for name in learners]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns hold text and the others numbers; empty without rows."""
    rule = ["---" if index < texts else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) if rows else ""


def _with_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"eval_{name.removeprefix('eval_')}": value for name, value in metrics.items()}


def _evaluations(logs: Sequence[Mapping[str, Any]], learners: Sequence[str]) -> list[Evaluation]:
    """The evaluations in the logs; those of several data sets at the same step are joined."""
    by_step: dict[int, Evaluation] = {}
    for entry in logs:
        metrics, step = metrics_of(entry, learners), entry.get("step", 0)
        if any(metrics.values()):
            joined = by_step.setdefault(step, Evaluation(step, entry.get("epoch"), metrics))
            for name, values in metrics.items():
                joined.metrics[name].update(values)
    return list(by_step.values())
