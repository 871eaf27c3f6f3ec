"""The figure of a study: quality of the students over what they cost, and the front. It can be read in grey too."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ctcd_trainer.graph import TEACHER
from examples.common.figures import draw_legend, figure_of, handles_of
from examples.common.statistics import summarise

from .pareto import front
from .report import COSTS, Scores, points_of

#: Colour (apart in grey), marker, and whether it is filled, of each kind of choice.
KINDS: Mapping[str, tuple[str, str, bool]] = {
    "depth": ("#08306b", "o", True),
    "width": ("#e6550d", "s", True),
    "sharing": ("#31a354", "^", True),
    "adapters": ("#000000", "D", False),
    "trained alone": ("#000000", "X", False),
}


def kind_of(choice: Mapping[str, Any]) -> str:
    """Return the kind of choice that a variant makes."""
    if choice.get("distillation_mode") == "standalone":
        return "trained alone"
    if "student_lora_r" in choice:
        return "adapters"
    if "share" in choice:
        return "sharing"
    return "width" if {"student_hidden_size", "student_intermediate_size"} & set(choice) else "depth"


def draw(scores: Scores, costs: Mapping[str, Any], path: Path) -> None:
    """Draw a row of panels for each task; choices on a front have their number in the table, and a key below.

    Args:
        scores: The scores.
        costs: What the variants cost.
        path: A PNG file.
    """
    with figure_of(path, len(scores.tasks), len(COSTS), 1.2 + 2.8 * len(scores.tasks)) as (figure, axes):
        numbered: set[str] = set()
        for task, panels in zip(scores.tasks, axes, strict=True):
            for axis, (cost, unit) in zip(panels, COSTS.items(), strict=True):
                numbered |= set(_panel(axis, scores, costs, task, cost))
                axis.set(title=task, xlabel=f"{unit} of the student")
            panels[0].set_ylabel(f"{scores.metric(task).replace('_', ' ')} of the student (%)")
        handles = handles_of(axes)
        order = [label for label in (*KINDS, "front", "teachers, mean") if label in handles]
        key = [f"{number}: {name}" for number, name in enumerate(scores.variants, 1) if name in numbered]
        draw_legend(figure, axes, order, title=textwrap.fill("On a front: " + ";  ".join(key), 110))


def _panel(axis: Axes, scores: Scores, costs: Mapping[str, Any], task: str, cost: str) -> list[str]:
    points = points_of(scores, costs, task, cost)
    for variant, point in points.items():
        kind = kind_of(scores.choices[variant])
        colour, marker, filled = KINDS[kind]
        axis.plot(
            point.cost,
            point.quality,
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor=colour if filled else "white",
            linestyle="none",
            label=kind,
            zorder=3,
        )
    best = front(points)
    axis.plot(
        [points[name].cost for name in best],
        [points[name].quality for name in best],
        color="0.45",
        linestyle="--",
        linewidth=1.2,
        label="front",
        zorder=2,
    )
    for name in best:
        axis.annotate(
            str(scores.variants.index(name) + 1),
            (points[name].cost, points[name].quality),
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            fontweight="bold",
        )
    teachers = [value for variant in points for value in scores.by_seed(variant, task, TEACHER).values()]
    axis.axhline(summarise(teachers).mean, color="black", linewidth=1.0, linestyle=":", label="teachers, mean")
    axis.margins(0.08, 0.14)
    return best
