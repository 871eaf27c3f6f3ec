"""The figures of the report. Methods differ in marker, line and darkness, so that they can be told apart in grey.

Each function writes one PNG file, and returns whether there was anything to draw.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.common.figures import (
    draw_legend,
    draw_line,
    draw_points,
    figure_of,
    handles_of,
    note_if_empty,
    style_of,
    value_style,
)
from examples.common.statistics import summarise

from .ablations import DIRECTIONS, Variant, curve_differences, differences
from .grouping import (
    AVERAGE,
    CALIBRATION,
    MLM,
    TASK_NAMES,
    Experiments,
    Result,
    Row,
    Scores,
    curves_of,
    loss,
    method_of,
    method_order,
    metric,
    parameters_of,
    scores_of,
)
from .tables import labels_used

LEARNERS = (TEACHER, STUDENT)
#: Where a label of the axis of an ablation is broken.
BREAKS = re.compile(r"(?<=,) | (?=\(|/ |from |steps|epochs)")
#: Share of the steps that the loss curves show once more by themselves.
LAST_SHARE = 0.4


def draw_curves(results: list[Result], path: Path) -> bool:
    """Validation loss of every method over the steps, and over the last of them by itself, where methods part.

    Lines are means over the seeds, bands their range where there are several.
    """
    curves = curves_of(results)
    if not curves:
        return False
    last = max(step for seeds in curves.values() for curve in seeds.values() for step in curve)
    with figure_of(path, 2, 2, 5.8) as (figure, axes):
        for panels, first in zip(axes, (0.0, (1 - LAST_SHARE) * last), strict=True):
            for axis, learner in zip(panels, LEARNERS, strict=True):
                for (method, model), seeds in curves.items():
                    by_step: dict[int, list[float]] = {}
                    for curve in seeds.values():
                        for step, value in curve.items():
                            if step >= first:
                                by_step.setdefault(step, []).append(value)
                    if model == learner and by_step:
                        draw_line(axis, by_step, method, style_of(method))
                title = f"{learner.capitalize()}s" + (f", last {LAST_SHARE:.0%} of the steps" if first else "")
                axis.set(title=title, xlabel="optimizer step")
                note_if_empty(axis)
            panels[0].set_ylabel("validation loss (nats)")
        draw_legend(figure, axes, order=sorted({method for method, _ in curves}, key=method_order))
    return True


def draw_differences(
    rows: Mapping[str, list[Variant]], results: list[Result], baseline: dict[str, Any], path: Path
) -> bool:
    """Validation loss minus that of the same model trained alone, over the steps.

    Args:
        rows: The lines of each row of panels, by what they vary: the methods, or the values of an axis.
        results: All cells of pre-training.
        baseline: Their baseline.
        path: The file.
    """
    lines = {
        title: {
            (index, learner): found
            for index, variant in enumerate(group)
            for learner in LEARNERS
            if (found := curve_differences(variant, results, baseline, learner, ("alone", learner)))
        }
        for title, group in rows.items()
    }
    lines = {
        title: found for title, found in lines.items() if any(not rows[title][index].is_baseline for index, _ in found)
    }
    if not lines:
        return False
    with figure_of(path, len(lines), 2, 0.5 + 2.6 * len(lines)) as (_, axes):
        for (title, found), pair in zip(lines.items(), axes, strict=True):
            for axis, learner in zip(pair, LEARNERS, strict=True):
                for index, variant in enumerate(rows[title]):
                    if by_step := found.get((index, learner)):
                        of_methods = len({variant.method for variant in rows[title]}) > 1
                        style = style_of(variant.method) if of_methods else value_style(index)
                        draw_line(axis, by_step, variant.label, style)
                axis.axhline(0, color="black", linewidth=1.0)
                axis.set(title=f"{learner.capitalize()}: {title.split(' (')[0]}", xlabel="optimizer step")
                note_if_empty(axis)
            pair[0].set_ylabel("loss minus that of\nthe model alone\n(negative = better)")
            handles = handles_of([pair])
            order = [variant.label for variant in rows[title] if variant.label in handles]
            pair[1].legend(
                [handles[label] for label in order],
                order,
                loc="center left",
                bbox_to_anchor=(1.02, 0.5),
                frameon=False,
                handlelength=3.2,
            )
    return True


def draw_quality(
    experiments: Experiments, losses: Scores, glue: Scores, latencies: Mapping[tuple[str, Row], float], path: Path
) -> bool:
    """MLM loss and GLUE average of every model against its parameters and its latency.

    Args:
        experiments: The cells, for the number of parameters.
        losses: The MLM validation loss.
        glue: The GLUE average.
        latencies: Milliseconds by task ("mlm" or "glue") and row; may be empty.
        path: The file.
    """
    finetuned = [result for cells in experiments.finetuned.values() for result in cells]
    sizes = {MLM: parameters_of(experiments.pretrained), "glue": parameters_of(finetuned)}
    measures = {
        MLM: (losses, f"{loss(MLM).name}\n(lower = better)"),
        "glue": (glue, f"{AVERAGE.name}\n(higher = better)"),
    }
    kinds = [kind for kind, (scores, _) in measures.items() if scores]
    if not kinds:
        return False
    columns = ["parameters (M)"] + (["CPU latency (ms)"] if latencies else [])
    methods = sorted({method for kind in kinds for method, _ in measures[kind][0]}, key=method_order)
    with figure_of(path, len(kinds), len(columns), 0.7 + 2.7 * len(kinds)) as (figure, axes):
        for kind, panels in zip(kinds, axes, strict=True):
            scores, unit = measures[kind]
            for axis, column in zip(panels, columns, strict=True):
                known = sizes[kind] if column == columns[0] else {row: latencies.get((kind, row)) for row in scores}
                places = {row: known[row] for row in scores if known.get(row) is not None}
                if not places:
                    note_if_empty(axis)
                    continue
                # Models of one size stand side by side; the ticks are where they belong.
                low, high = min(places.values()), max(places.values())
                gap = 0.5 * ((high - low) or 0.2 * high) / len(methods)
                for (method, learner), place in places.items():
                    summary = summarise(scores[method, learner].values())
                    style = style_of(method) | {"linestyle": "none"}
                    if learner == STUDENT:
                        style["markerfacecolor"] = "white"
                    axis.errorbar(
                        place + gap * (methods.index(method) - (len(methods) - 1) / 2),
                        summary.mean,
                        yerr=summary.std,
                        label=method if learner == TEACHER else f"{method} ",
                        capsize=2.5,
                        elinewidth=1.0,
                        **style,
                    )
                ticks = sorted({round(place, 1) for place in places.values()})
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.set_xlabel(column)
            panels[0].set_ylabel(unit)
        handles = handles_of(axes)
        labels = [method if method in handles else f"{method} " for method in methods]
        draw_legend(
            figure,
            axes,
            order=labels,
            title="filled: teachers, hollow: students, spread around their tick; bars: standard deviation",
        )
    return True


def draw_ablations(variants: list[Variant], results: list[Result], baseline: dict[str, Any], path: Path) -> bool:
    """Loss on the dev set minus that of the same model trained alone, along each axis; mean and standard deviation."""
    panels: dict[str, list[Variant]] = {}
    for variant in variants:
        panels.setdefault(variant.axis, []).append(variant)
    values = {
        (axis, learner): {
            index: summary
            for index, variant in enumerate(group)
            if (summary := summarise(differences(variant, results, baseline, learner, ("alone", learner), "dev")))
        }
        for axis, group in panels.items()
        for learner in LEARNERS
    }
    panels = {
        axis: group
        for axis, group in panels.items()
        if any(not group[index].is_baseline for learner in LEARNERS for index in values[axis, learner])
    }
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    with figure_of(path, rows, 2, 0.5 + 2.6 * rows) as (figure, axes):
        flat = [axis for pair in axes for axis in pair]
        for axis, (name, group) in zip(flat, panels.items(), strict=False):
            for learner in LEARNERS:
                draw_points(axis, learner, values[name, learner], joined=name != DIRECTIONS)  # nothing between methods
            axis.axhline(0, color="black", linewidth=1.0)
            labels = [f"{variant.label}{' *' * variant.is_baseline}" for variant in group]
            axis.set_xticks(range(len(group)), [BREAKS.sub("\n", label) for label in labels])
            axis.set_xlim(-0.5, len(group) - 0.5)
            axis.set_title(name)
        for axis in flat[len(panels) :]:
            axis.set_visible(False)
        for pair in axes:
            pair[0].set_ylabel("dev loss minus that of\nthe model alone\n(negative = better)")
        draw_legend(figure, axes, title="* baseline")
    return True


def draw_cotraining(experiments: Experiments, path: Path) -> bool:
    """Metric, loss and calibration error of the pairs trained on each GLUE task; mean and standard deviation."""
    groups = {
        (task, limit): cells
        for limit in experiments.row_limits
        for task, cells in experiments.cotrained(limit).items()
    }
    methods = sorted({method_of(cell) for cells in groups.values() for cell in cells}, key=method_order)
    if len(methods) < 2:
        return False
    by_task = sorted(groups.items(), key=lambda item: item[0][0])
    with figure_of(path, len(groups), 3, 0.9 + 1.75 * len(groups)) as (figure, axes):
        for panels, ((task, limit), cells) in zip(axes, by_task, strict=True):
            for axis, measure in zip(panels, (metric(task), loss(task), CALIBRATION), strict=True):
                scores = scores_of(cells, measure)
                if not scores:
                    axis.set_visible(False)
                    continue
                for learner in LEARNERS:
                    seeds = {place: scores.get((method, learner), {}) for place, method in enumerate(methods)}
                    found = {place: summarise(own.values()) for place, own in seeds.items() if own}
                    draw_points(axis, learner, found, joined=False)
                axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
                axis.set_xlim(-0.5, len(methods) - 0.5)
                better = "higher" if measure.higher_is_better else "lower"
                axis.set_title(f"{measure.name} ({better} = better)", fontsize=8.5)
            panels[0].set_ylabel(f"{TASK_NAMES.get(task, task)}, {labels_used(limit)}")
        draw_legend(figure, axes, title="mean and standard deviation over the seeds")
    return True
