"""The figure of a model card: how the loss and the main metric of each model moved. Needs matplotlib."""

from io import BytesIO
from typing import Any

from ..arguments import greater_is_better
from .results import Metrics, Results, format_number, words

#: Dark to light, so that neighbours differ in grey; their markers differ as well.
_COLOURS = ("#08306b", "#e6550d", "#31a354", "#9e9ac8", "#fdae6b")
_MARKERS = "os^Dv"


def draw_curves(results: Results, metric: str | None, baseline: Metrics) -> tuple[bytes, str] | None:
    """Draw task loss and main metric over the optimizer steps, for all learners.

    Args:
        results: The evaluations and the training losses.
        metric: The metric that tells best how good the models are; `None` without an evaluation.
        baseline: Metrics of models that were trained in another way, drawn as level lines.

    Returns:
        The PNG file and its alternative text; `None` without matplotlib, or if fewer than two steps are known.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = {}
    for key in dict.fromkeys(("loss", metric or "loss")):
        evaluated = {
            name: [(entry.step, entry.metrics[name][key]) for entry in results.during if key in entry.metrics[name]]
            for name in results.learners
        }
        trained = results.curves if key == "loss" else {}
        if any(len(points) > 1 for points in (*evaluated.values(), *trained.values())):
            panels[key] = {"validation": evaluated, "training": trained}
    if not panels:
        return None
    figure = Figure(figsize=(4.8 * len(panels), 4.0), dpi=150, layout="constrained")  # without the user's backend
    described, handles = [], {}
    for axes, (key, kinds) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, name in enumerate(results.learners):
            style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)]}
            if points := kinds["training"].get(name):
                axes.plot(*zip(*points, strict=True), ":", label=f"{name}, training", **style)
                described.append(f"training loss of the {name} {format_number(points[-1][1])}")
            if points := kinds["validation"][name]:
                marker = {"marker": _MARKERS[index % len(_MARKERS)], "markevery": max(1, len(points) // 8)}
                axes.plot(*zip(*points, strict=True), "-", label=f"{name}, validation", **marker, **style)
                described.append(f"validation {words(key)} of the {name} {format_number(points[-1][1])}")
            if (level := baseline.get(name, {}).get(key)) is not None:
                axes.axhline(level, linestyle="--", linewidth=1, label=f"{name}, baseline", **style)
                described.append(f"its baseline {format_number(level)}")
        better = {True: " (higher is better)", False: " (lower is better)", None: ""}[greater_is_better(key)]
        axes.set(title=f"{words(key).capitalize()}{better}", xlabel="optimizer step", ylabel=words(key))
        axes.grid(color="0.88", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        handles |= {line.get_label(): line for line in axes.lines}
    labels = sorted(handles, key=lambda label: results.learners.index(label.rpartition(",")[0]))  # a column for each
    lines, columns = [handles[label] for label in labels], len(results.learners)
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
    file = BytesIO()
    figure.savefig(file, format="png")
    titles = " and ".join(words(key) for key in panels)
    return file.getvalue(), f"Line charts of {titles} over the optimizer steps. At the end: {'; '.join(described)}."
