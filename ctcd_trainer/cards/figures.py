"""The pictures of a model card: learning curves, and quality against size and latency. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import Metrics, Results, lower_is_better
from .tables import format_number, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "loss_curves.png"
COMPARISON = "quality_size_latency.png"
#: Dark to light, so that neighbours differ in grey; lines and markers differ as well.
_COLOURS = ("#08306b", "#e6550d", "#31a354", "#9e9ac8", "#fdae6b")
_LINES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv"


def draw_pictures(
    folder: Path,
    results: Results,
    metric: str | None,
    sizes: Mapping[str, Mapping[str, float]],
    baseline: Metrics,
) -> dict[str, str]:
    """Draw what there is to draw into a folder.

    Args:
        folder: The folder.
        results: The evaluations and the training losses.
        metric: The metric that says how good the models are; `None` without an evaluation.
        sizes: What quality is drawn against: the value of each learner by name of the axis.
        baseline: Metrics of models that were trained otherwise.

    Returns:
        The alternative text of each picture by name of the file; none without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    pictures = {}
    for name, draw in {
        CURVES: lambda figure: _draw_curves(figure, results, metric),
        COMPARISON: lambda figure: _draw_comparison(figure, results, metric, sizes, baseline),
    }.items():
        figure = Figure(dpi=150, layout="constrained")  # without pyplot, whose backend is the user's
        text = draw(figure)
        if text is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name)
            pictures[name] = text
    return pictures


def _draw_curves(figure: "Figure", results: Results, metric: str | None) -> str | None:
    """Training loss, validation loss and main metric over the steps, as far as they are known."""

    def evaluated(key: str) -> dict[str, list[tuple[int, float]]]:
        return {
            name: [(each.step, each.metrics[name][key]) for each in results.during if key in each.metrics[name]]
            for name in results.learners
        }

    panels: dict[str, tuple[str, Mapping[str, list[tuple[int, float]]]]] = {
        "training loss": ("loss", results.curves),
        "validation loss": ("loss", evaluated("loss")),
    }
    if metric is not None and metric != "loss":
        panels[f"validation {words(metric)}"] = (words(metric), evaluated(metric))
    panels = {title: panel for title, panel in panels.items() if any(panel[1].values())}
    if not panels:
        return None
    figure.set_size_inches(4.5 * len(panels), 4.2)
    ends = []
    for axis, (title, (unit, curves)) in zip(_axes(figure, len(panels)), panels.items(), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            if curve:
                steps, values = zip(*curve, strict=True)
                line = {"linestyle": _LINES[index % len(_LINES)], "markevery": max(1, len(steps) // 8)}
                axis.plot(steps, values, label=name, linewidth=1.8, markersize=6, **line, **_style(index))
                ends.append(f"{title} of the {name} {format_number(values[-1])}")
        axis.set(title=title.capitalize(), xlabel="optimizer step", ylabel=unit)
    _legend(figure)
    return f"Line charts over the optimizer steps: {', '.join(panels)}. At the end: {'; '.join(ends)}."


def _draw_comparison(
    figure: "Figure",
    results: Results,
    metric: str | None,
    sizes: Mapping[str, Mapping[str, float]],
    baseline: Metrics,
) -> str | None:
    """The main metric of each learner against its size and its latency, beside the baseline's."""
    sizes = {label: values for label, values in sizes.items() if values}
    if metric is None or not sizes:
        return None
    figure.set_size_inches(4.5 * len(sizes), 4.2)
    qualities = {name: own[metric] for name, own in results.final_metrics.items() if metric in own}
    described = []
    for axis, (label, values) in zip(_axes(figure, len(sizes)), sizes.items(), strict=True):
        for index, (name, quality) in enumerate(qualities.items()):
            style = _style(index) | {"linestyle": "none", "markersize": 9}
            axis.plot(values[name], quality, label=name, **style)
            described.append(f"{name} {format_number(quality)} at {values[name]:.3g} {label}")
            alone = baseline.get(name, {}).get(metric)
            if alone is not None:
                style |= {"marker": "x", "markeredgewidth": 2}
                axis.plot(values[name], alone, label=f"{name}, baseline", **style)
                described.append(f"its baseline {format_number(alone)}")
        axis.set(xlabel=label, ylabel=words(metric) + (" (lower is better)" if lower_is_better(metric) else ""))
        axis.margins(y=0.15)
        axis.set_xlim(0, 1.15 * max(values.values()))
        axis.locator_params(axis="x", nbins=5)
    _legend(figure)
    return f"Scatter plots of {words(metric)} against {' and '.join(sizes)}: {'; '.join(described)}."


def _axes(figure: "Figure", count: int) -> Sequence["Axes"]:
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(color="0.85", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return axes


def _style(index: int) -> dict[str, Any]:
    """Colour and marker of a learner; the markers of the first one are filled."""
    colour = _COLOURS[index % len(_COLOURS)]
    return {
        "color": colour,
        "marker": _MARKERS[index % len(_MARKERS)],
        "markerfacecolor": colour if index == 0 else "white",
    }


def _legend(figure: "Figure") -> None:
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, handlelength=3.5
    )
