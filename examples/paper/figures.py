"""The figures of the report. Methods differ in marker, line and darkness, so that they can be told apart in grey.

Each function writes one PNG file, and returns whether there was anything to draw.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctcd_trainer.graph import STUDENT, TEACHER

from .ablations import DIRECTIONS, Variant, curve_differences, differences
from .grouping import AVERAGE, MLM, Experiments, Result, Row, Scores, curves_of, loss, method_order, parameters_of
from .statistics import summarise

LEARNERS = (TEACHER, STUDENT)
#: Colour (apart in grey from those that it meets), marker, and dashes of each method.
STYLES: Mapping[str, tuple[str, str, Any]] = {
    "alone": ("#000000", "o", "-"),
    "kd": ("#e6550d", "^", "--"),
    "reversed": ("#9e9ac8", "v", "-."),
    "ctcd": ("#08306b", "s", "-"),
    "student-from-teacher": ("#31a354", ">", ":"),
    "teacher-from-student": ("#74c476", "<", (0, (4, 1, 1, 1, 1, 1))),
    "community": ("#7f2704", "D", (0, (6, 2))),
    "community-kd": ("#fd8d3c", "X", (0, (3, 2))),
}
#: For the values of an axis, dark to light.
VALUE_STYLES = (
    ("#000000", "o", "-"),
    ("#08519c", "s", "--"),
    ("#e6550d", "^", "-."),
    ("#41ab5d", "D", ":"),
    ("#9e9ac8", "v", (0, (6, 2))),
    ("#fdae6b", "X", (0, (3, 2))),
)
#: Where a label of the axis of an ablation is broken.
BREAKS = re.compile(r"(?<=,) | (?=\(|/ |from |steps|epochs)")
#: Share of the steps that the loss curves show once more by themselves.
LAST_SHARE = 0.4
#: As wide as a printed page, so that text keeps its size there.
WIDTH = 7.2


def style_of(method: str) -> dict[str, Any]:
    """How a method is drawn; a variant of it, such as "community (prepared)", has hollow markers."""
    base = method.split(" (")[0]
    return _style(*STYLES.get(base, ("#636363", "P", "-")), hollow=base != method)


def draw_curves(results: list[Result], path: Path) -> bool:
    """Validation loss of every method over the steps, and over the last of them by itself, where methods part.

    Lines are means over the seeds, bands their range where there are several.
    """
    curves = curves_of(results)
    if not curves:
        return False
    last = max(step for seeds in curves.values() for curve in seeds.values() for step in curve)
    with _figure(path, 2, 2, 5.8) as (figure, axes):
        for panels, first in zip(axes, (0.0, (1 - LAST_SHARE) * last), strict=True):
            for axis, learner in zip(panels, LEARNERS, strict=True):
                for (method, model), seeds in curves.items():
                    by_step: dict[int, list[float]] = {}
                    for curve in seeds.values():
                        for step, value in curve.items():
                            if step >= first:
                                by_step.setdefault(step, []).append(value)
                    if model == learner and by_step:
                        _line(axis, by_step, method, style_of(method))
                title = f"{learner.capitalize()}s" + (f", last {LAST_SHARE:.0%} of the steps" if first else "")
                axis.set(title=title, xlabel="optimizer step")
                _note_if_empty(axis)
            panels[0].set_ylabel("validation loss (nats)")
        _legend(figure, axes, order=sorted({method for method, _ in curves}, key=method_order))
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
    with _figure(path, len(lines), 2, 0.5 + 2.6 * len(lines)) as (_, axes):
        for (title, found), pair in zip(lines.items(), axes, strict=True):
            for axis, learner in zip(pair, LEARNERS, strict=True):
                for index, variant in enumerate(rows[title]):
                    if by_step := found.get((index, learner)):
                        of_methods = len({variant.method for variant in rows[title]}) > 1
                        style = style_of(variant.method) if of_methods else _value_style(index)
                        _line(axis, by_step, variant.label, style)
                axis.axhline(0, color="black", linewidth=1.0)
                axis.set(title=f"{learner.capitalize()}: {title.split(' (')[0]}", xlabel="optimizer step")
                _note_if_empty(axis)
            pair[0].set_ylabel("loss minus that of\nthe model alone\n(negative = better)")
            handles = _handles([pair])
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
    experiments: Experiments,
    losses: Scores,
    glue: Scores,
    latencies: Mapping[tuple[str, Row], float],
    path: Path,
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
    with _figure(path, len(kinds), len(columns), 0.7 + 2.7 * len(kinds)) as (figure, axes):
        for kind, panels in zip(kinds, axes, strict=True):
            scores, unit = measures[kind]
            for axis, column in zip(panels, columns, strict=True):
                known = sizes[kind] if column == columns[0] else {row: latencies.get((kind, row)) for row in scores}
                places = {row: known[row] for row in scores if known.get(row) is not None}
                if not places:
                    _note_if_empty(axis)
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
        handles = _handles(axes)
        labels = [method if method in handles else f"{method} " for method in methods]
        _legend(
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
    with _figure(path, rows, 2, 0.5 + 2.6 * rows) as (figure, axes):
        flat = [axis for pair in axes for axis in pair]
        for axis, (name, group) in zip(flat, panels.items(), strict=False):
            for learner, colour, marker, line in ((TEACHER, "#08306b", "o", "-"), (STUDENT, "#e6550d", "s", "--")):
                found = values[name, learner]
                style = _style(colour, marker, line, hollow=learner == STUDENT)
                if name == DIRECTIONS:
                    style["linestyle"] = "none"  # nothing lies between methods
                offset = -0.06 if learner == TEACHER else 0.06
                axis.errorbar(
                    [index + offset for index in found],
                    [summary.mean for summary in found.values()],
                    yerr=[summary.std or 0.0 for summary in found.values()],
                    label=learner,
                    capsize=2.5,
                    elinewidth=1.0,
                    **style,
                )
            axis.axhline(0, color="black", linewidth=1.0)
            labels = [f"{variant.label}{' *' * variant.is_baseline}" for variant in group]
            axis.set_xticks(range(len(group)), [BREAKS.sub("\n", label) for label in labels])
            axis.set_xlim(-0.5, len(group) - 0.5)
            axis.set_title(name)
        for axis in flat[len(panels) :]:
            axis.set_visible(False)
        for pair in axes:
            pair[0].set_ylabel("dev loss minus that of\nthe model alone\n(negative = better)")
        _legend(figure, axes, title="* baseline")
    return True


# ---- Parts ----


@contextmanager
def _figure(path: Path, rows: int, columns: int, height: float) -> Iterator[tuple[Figure, Any]]:
    with plt.rc_context(
        {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8}
    ):
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDTH, height), dpi=200, layout="constrained", squeeze=False
        )
        for axis in axes.flat:
            axis.grid(color="0.85", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _style(colour: str, marker: str, line: Any, hollow: bool = False) -> dict[str, Any]:
    return {
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "linewidth": 1.6,
        "markersize": 5,
        "markerfacecolor": "white" if hollow else colour,
    }


def _value_style(index: int) -> dict[str, Any]:
    rounds, place = divmod(index, len(VALUE_STYLES))
    return _style(*VALUE_STYLES[place], hollow=rounds % 2 == 1)


def _line(axis: Axes, by_step: Mapping[int, list[float]], label: str, style: dict[str, Any]) -> None:
    steps = sorted(by_step)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    axis.plot(steps, means, label=label, markevery=max(1, len(steps) // 8), **style)
    if any(len(values) > 1 for values in by_step.values()):
        low, high = ([bound(by_step[step]) for step in steps] for bound in (min, max))
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _note_if_empty(axis: Axes) -> None:
    if not axis.get_legend_handles_labels()[1]:
        axis.text(0.5, 0.5, "no results yet", transform=axis.transAxes, ha="center", color="0.4")


def _handles(axes: Any) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    for pair in axes:
        for axis in pair:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
    return handles


def _legend(figure: Figure, axes: Any, order: Sequence[str] | None = None, title: str | None = None) -> None:
    if handles := _handles(axes):
        labels = list(order or handles)
        figure.legend(
            [handles[label] for label in labels],
            labels,
            loc="outside lower center",
            ncols=min(4, len(labels)),
            frameon=False,
            handlelength=3.2,
            title=title,
            title_fontsize=8.5,
        )
