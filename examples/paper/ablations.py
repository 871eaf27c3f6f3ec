"""Ablations: co-trained models against the same models trained alone, along one axis at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from examples.common.statistics import paired_differences

from .grouping import (
    LOSS,
    ONE_DIRECTION,
    SOFT_FIELDS,
    Result,
    Row,
    Setting,
    at,
    belongs,
    curves_of,
    method_of,
    scores_of,
    setting_of,
)

CTCD = "ctcd"
#: Name of the axis whose values are methods.
DIRECTIONS = "who learns"


@dataclass(frozen=True)
class Axis:
    """Fields of a cell that are varied together.

    Attributes:
        name: Name of the axis.
        fields: The fields.
        label: Names the value of a setting.
        order: Sorts settings along the axis.
    """

    name: str
    fields: tuple[str, ...]
    label: Callable[[Setting], str]
    order: Callable[[Setting], Any]


@dataclass(frozen=True)
class Variant:
    """One value of an axis.

    Attributes:
        axis: Name of the axis.
        label: The value.
        method: The co-training method.
        setting: The setting of its cells.
        is_baseline: Whether the setting is the baseline.
    """

    axis: str
    label: str
    method: str
    setting: Setting
    is_baseline: bool


def _weights(setting: Setting) -> str:
    label = f"{setting['hard_weight']:g} : {setting['soft_weight']:g}"
    own = setting.get("teacher_soft_weight")
    return (
        label if own in (None, setting["soft_weight"]) else f"{label} (teacher {setting['hard_weight']:g} : {own:g})"
    )


def _weight_ratios(setting: Setting) -> tuple[float, float]:
    hard = setting["hard_weight"] or 1e-9
    return setting["soft_weight"] / hard, (setting.get("teacher_soft_weight") or 0.0) / hard


def _length(setting: Setting) -> str:
    return f"{setting['epochs']:g} epochs" if setting.get("steps") is None else f"{setting['steps']:,} steps"


def _rows(setting: Setting) -> str:
    if setting.get("rows") is None:
        return "all"
    if setting.get("steps") is None:
        return f"{setting['rows']:,}"
    passes = round(setting["steps"] * setting["batch_size"] / setting["rows"], 1)
    return f"{setting['rows']:,} ({passes:g} passes)"


def _inits(setting: Setting) -> str:
    return f"{setting['teacher_init']} / {setting['student_init']}"


def _rates(setting: Setting) -> str:
    label, own = f"{setting['learning_rate']:g}", setting.get("student_learning_rate")
    return label if own is None else f"{label}, student {own:g}"


def _infinite(value: float | None) -> float:
    return float("inf") if value is None else value


AXES = (
    Axis("hard : soft weight", ("hard_weight", "soft_weight", "teacher_soft_weight"), _weights, _weight_ratios),
    Axis("temperature", ("temperature",), lambda s: f"{s['temperature']:g}", lambda s: s["temperature"]),
    Axis(
        "length of training", ("steps", "epochs"), _length, lambda s: (_infinite(s["steps"]), _infinite(s["epochs"]))
    ),
    Axis("rows (passes)", ("rows",), _rows, lambda s: _infinite(s["rows"])),
    Axis(
        "soft warm-up (share of the steps)",
        ("soft_warmup_ratio",),
        lambda s: f"{s['soft_warmup_ratio']:g}",
        lambda s: s["soft_warmup_ratio"],
    ),
    Axis("initialisation (teacher / student)", ("teacher_init", "student_init"), _inits, _inits),
    Axis(
        "learning rate",
        ("learning_rate", "student_learning_rate"),
        _rates,
        lambda s: (s["learning_rate"], s.get("student_learning_rate") or s["learning_rate"]),
    ),
)


def variants(results: list[Result], baseline: Setting) -> list[Variant]:
    """The values of every axis along which co-training was varied, including the baseline.

    Args:
        results: All cells of one kind: pre-training, or the pairs on one GLUE task.
        baseline: The setting from which each variant differs in one axis.
    """
    trained = [result for result in results if method_of(result) == CTCD]
    found = []
    for axis in AXES:
        others = {name: value for name, value in baseline.items() if name not in axis.fields}
        settings: list[Setting] = []
        for result in trained:
            own = setting_of(result)
            setting = {name: own.get(name) if name in axis.fields else value for name, value in baseline.items()}
            if belongs(result, others) and setting not in settings:
                settings.append(setting)
        if any(setting != baseline for setting in settings):
            found += [
                Variant(axis.name, axis.label(setting), CTCD, setting, setting == baseline)
                for setting in sorted(settings, key=axis.order)
            ]
    directions = [method for method in (CTCD, *ONE_DIRECTION) if at(results, baseline, method)]
    if set(directions) - {CTCD}:
        labels = {CTCD: "both"} | {method: method.replace("-", " ") for method in ONE_DIRECTION}
        found += [Variant(DIRECTIONS, labels[method], method, baseline, method == CTCD) for method in directions]
    return found


def left_out(results: list[Result], baseline: Setting) -> int:
    """Number of co-trainings that differ from the baseline in more than one axis."""
    settings = [baseline, *(variant.setting for variant in variants(results, baseline))]
    return sum(
        method_of(result) == CTCD and not any(belongs(result, setting) for setting in settings) for result in results
    )


def differences(
    variant: Variant, results: list[Result], baseline: Setting, learner: str, reference: Row, split: str
) -> list[float]:
    """Loss of a co-trained model minus the loss of a reference, at each common seed; negative is better.

    Args:
        variant: The co-training.
        results: All cells of its kind.
        baseline: Its soft weights and temperature replace those of `variant` where the reference has no such cells.
        learner: The co-trained model.
        reference: Method and model to compare with, at the same steps, rows, initialisation and learning rates.
        split: `dev` or `validation`.
    """
    ours = scores_of(at(results, variant.setting, variant.method), LOSS, split).get((variant.method, learner), {})
    theirs = scores_of(reference_cells(variant.setting, results, baseline, reference[0]), LOSS, split)
    return paired_differences(ours, theirs.get(reference, {}))


def curve_differences(
    variant: Variant, results: list[Result], baseline: Setting, learner: str, reference: Row
) -> dict[int, list[float]]:
    """The differences of all seeds by step of the training, on the validation set; see `differences`."""
    ours = curves_of(at(results, variant.setting, variant.method)).get((variant.method, learner), {})
    theirs = curves_of(reference_cells(variant.setting, results, baseline, reference[0])).get(reference, {})
    by_step: dict[int, list[float]] = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        for step in sorted(ours[seed].keys() & theirs[seed].keys()):
            by_step.setdefault(step, []).append(ours[seed][step] - theirs[seed][step])
    return dict(sorted(by_step.items()))


def reference_cells(setting: Setting, results: list[Result], baseline: Setting, method: str) -> list[Result]:
    """The cells of another method that a setting is compared with.

    Args:
        setting: The setting.
        results: All cells of its kind.
        baseline: Its soft weights and temperature are used if the method has no cells with those of `setting`.
        method: The method.
    """
    soft = {name: baseline[name] for name in SOFT_FIELDS if name in baseline}
    return at(results, setting, method) or at(results, setting | soft, method)
