"""Parts of figures: styles that can be told apart in grey, lines, legends."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctcd_trainer.graph import TEACHER
from examples.common.statistics import Summary
from examples.paper.grouping import plain_method

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
VALUE_STYLES = (
    ("#000000", "o", "-"),
    ("#08519c", "s", "--"),
    ("#e6550d", "^", "-."),
    ("#41ab5d", "D", ":"),
    ("#9e9ac8", "v", (0, (6, 2))),
    ("#fdae6b", "X", (0, (3, 2))),
)
#: Width of a printed page in inches, so that text keeps its size there.
WIDTH = 7.2


def style_of(method: str) -> dict[str, Any]:
    """The style of a method; a variant of a method, such as "community (prepared)", has hollow markers."""
    base = plain_method(method)
    return line_style(*STYLES.get(base, ("#636363", "P", "-")), hollow=base != method)


@contextmanager
def figure_of(
    path: Path, rows: int, columns: int, height: float, width: float = WIDTH, dpi: int = 200
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its panels `(rows, columns)`; it is written to a file at the end. Sizes are in inches."""
    with plt.rc_context(
        {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8}
    ):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), dpi=dpi, layout="constrained", squeeze=False
        )
        for axis in axes.flat:
            axis.grid(color="0.85", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def line_style(colour: str, marker: str, line: Any, hollow: bool = False) -> dict[str, Any]:
    """The settings of a line."""
    return {
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "linewidth": 1.6,
        "markersize": 5,
        "markerfacecolor": "white" if hollow else colour,
    }


def value_style(index: int) -> dict[str, Any]:
    """The style of a value of an axis, from dark to light."""
    rounds, place = divmod(index, len(VALUE_STYLES))
    return line_style(*VALUE_STYLES[place], hollow=rounds % 2 == 1)


def draw_line(axis: Axes, by_step: Mapping[int, list[float]], label: str, style: dict[str, Any]) -> None:
    """Draw the mean over the seeds, and their range as a band."""
    steps = sorted(by_step)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    axis.plot(steps, means, label=label, markevery=max(1, len(steps) // 8), **style)
    if any(len(values) > 1 for values in by_step.values()):
        low, high = ([bound(by_step[step]) for step in steps] for bound in (min, max))
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def draw_points(axis: Axes, learner: str, found: Mapping[int, Summary], joined: bool) -> None:
    """Draw mean and standard deviation of a teacher or a student at places that both share, a little apart.

    Args:
        axis: The panel.
        learner: The model, which is its label.
        found: Values by place.
        joined: Whether there is a line between them.
    """
    colour, marker, line, offset = ("#08306b", "o", "-", -0.06) if learner == TEACHER else ("#e6550d", "s", "--", 0.06)
    axis.errorbar(
        [place + offset for place in found],
        [summary.mean for summary in found.values()],
        yerr=[summary.std or 0.0 for summary in found.values()],
        label=learner,
        capsize=2.5,
        elinewidth=1.0,
        **line_style(colour, marker, line if joined else "none", hollow=learner != TEACHER),
    )


def note_if_empty(axis: Axes) -> None:
    """Write "no results yet" into an empty panel."""
    if not axis.get_legend_handles_labels()[1]:
        axis.text(0.5, 0.5, "no results yet", transform=axis.transAxes, ha="center", color="0.4")


def handles_of(axes: Any) -> dict[str, Any]:
    """The handles of all panels by label, each label once."""
    handles: dict[str, Any] = {}
    for pair in axes:
        for axis in pair:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
    return handles


def draw_legend(figure: Figure, axes: Any, order: Sequence[str] | None = None, title: str | None = None) -> None:
    """Draw one legend below all panels."""
    if handles := handles_of(axes):
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
