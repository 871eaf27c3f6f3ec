r"""Turns the results of a grid into Markdown tables and figures, whether or not the grid has ended.

Example:
    python -m examples.paper.report outputs/paper/nano/results.jsonl --output report.md --figures figures \
        --latency latency.json
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcd_trainer.graph import TEACHER
from examples.common.tables import format_rows
from examples.grid.results import load_results

from . import tables
from .ablations import Variant, variants
from .choosing import choosing
from .claims import claims
from .grouping import (
    AVERAGE,
    LOSS,
    MLM,
    Experiments,
    Result,
    Row,
    arrange,
    average,
    baseline_of,
    collect,
    method_of,
    method_order,
    metric,
    scores_of,
)
from .latency import latency_of

#: The axes along which the difference to "alone" is drawn over the steps.
AXES_OVER_STEPS = ("hard : soft weight", "length of training", "rows (passes)", "soft warm-up (share of the steps)")
NO_LATENCY: Mapping[str, Any] = {"conditions": {}, "models": []}


def read_results(paths: list[Path]) -> list[Result]:
    """The finished cells of all files.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: The files hold no finished cell, or a line is no result.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {str(path)!r}. Pass the results.jsonl that examples.paper.run writes."
            )
    results = load_results(paths)
    if not results:
        raise ValueError(
            f"{', '.join(map(repr, map(str, paths)))}: no cell of the grid has finished yet. Report when "
            "examples.paper.run has written at least one."
        )
    return results


def read_latency(path: Path | None) -> Mapping[str, Any]:
    """The file of `examples.paper.latency`; empty without a path.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: The file has another content.
    """
    if path is None:
        return NO_LATENCY
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. Make it with examples.paper.latency.")
    try:
        found = json.loads(path.read_text())
        return {"conditions": dict(found["conditions"]), "models": list(found["models"])}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} was not written by examples.paper.latency ({error!r}). Pass its --output."
        ) from error


def write_report(
    results: list[Result], latency: Mapping[str, Any] = NO_LATENCY, figures: Path | None = None, base: Path = Path()
) -> str:
    """The whole report as Markdown.

    Args:
        results: The cells.
        latency: The content of the file of `examples.paper.latency`.
        figures: Folder for the figures; without it, none are drawn.
        base: Folder of the report, from which it links the figures.

    Raises:
        ValueError: No table has any content.
    """
    by_scale: dict[str, list[Result]] = {}
    for result in results:
        by_scale.setdefault(result["cell"].get("scale") or "unnamed", []).append(result)
    text = []
    for scale, cells in by_scale.items():
        experiments = arrange(cells)
        sections = [
            *tables.pretraining(experiments),
            *tables.finetuning(experiments),
            *tables.cotraining(experiments),
            *claims(experiments),
            *tables.ablations(experiments),
            *choosing(experiments),
            *_size_and_latency(experiments, latency),
        ]
        if sections:
            drawn = draw_figures(experiments, latency, figures, scale) if figures is not None else {}
            links = [f"![{title}]({os.path.relpath(path, base)})" for title, path in drawn.items()]
            figure_section = ["### Figures", *links] if links else []
            text += [f"## Scale `{scale}`", _origin(cells), *sections, *figure_section]
    if not text:
        raise ValueError(
            f"Nothing in these {len(results)} cells can be compared: they are models fine-tuned from pre-trainings "
            "that the files do not hold. Pass the results.jsonl of the pre-trainings as well."
        )
    return "\n\n".join(part for part in text if part) + "\n"


def draw_figures(experiments: Experiments, latency: Mapping[str, Any], folder: Path, scale: str) -> dict[str, Path]:
    """Draw the figures; returns the path of each figure that has content, by its title."""
    from . import figures

    cells, baseline = experiments.pretraining, experiments.baseline
    pretrained = experiments.pretrained
    every = variants(cells, baseline)
    methods = sorted({method_of(cell) for cell in pretrained} - {"alone"}, key=method_order)
    over_steps = {"methods": [Variant("methods", method, method, baseline, False) for method in methods]}
    over_steps |= {axis: [variant for variant in every if variant.axis == axis] for axis in AXES_OVER_STEPS}
    finetuned = experiments.finetuned
    glue = average([scores_of(group, metric(task)) for task, group in finetuned.items()])
    times = {(MLM, row): value for row, value in _latencies(pretrained, latency).items()}
    for group in finetuned.values():
        times |= {("glue", row): value for row, value in _latencies(group, latency).items()}

    drawn: dict[str, Path] = {}

    def add(title: str, name: str, draw: Any, *arguments: Any) -> None:
        path = folder / f"{scale}-{name}.png"
        if draw(*arguments, path):
            drawn[title] = path

    add("Validation loss over the steps of pre-training", "curves", figures.draw_curves, pretrained)
    add(
        "Validation loss minus that of the same model trained alone, over the steps; negative is better",
        "differences",
        figures.draw_differences,
        over_steps,
        cells,
        baseline,
    )
    add(
        f"MLM loss and {AVERAGE.name} against the size and the latency of the models",
        "quality",
        figures.draw_quality,
        experiments,
        scores_of(pretrained, LOSS),
        glue,
        times,
    )
    add("Ablations of pre-training", "ablations", figures.draw_ablations, every, cells, baseline)
    add(
        "Co-training at fine-tuning: metric, loss and calibration error by method",
        "cotraining",
        figures.draw_cotraining,
        experiments,
    )
    for (task, rows), group in experiments.cotraining.items():
        own = baseline_of(group)
        name = f"{task}-{'all' if rows is None else rows}"
        add(f"Ablations, {name}", f"ablations-{name}", figures.draw_ablations, variants(group, own), group, own)
    return drawn


def _latencies(results: list[Result], latency: Mapping[str, Any]) -> dict[Row, float]:
    def find(result: Result, learner: str) -> float | None:
        model = result["models"][learner]
        return latency_of(latency["models"], model.get("layers"), model.get("parameters", 0))

    return {row: next(iter(seeds.values())) for row, seeds in collect(results, find).items()}


def _size_and_latency(experiments: Experiments, latency: Mapping[str, Any]) -> list[str]:
    """Layers, parameters and latency of the teacher and of the student."""
    rows: list[dict[str, str]] = []
    for result in experiments.pretrained:
        for learner, model in result["models"].items():
            row = {
                "model": learner,
                "layers": str(model.get("layers", "")),
                "parameters (M)": f"{model.get('parameters', 0) / 1e6:.1f}",
            }
            if latency["models"]:
                found = latency_of(latency["models"], model.get("layers"), model.get("parameters", 0))
                row["CPU latency (ms)"] = "" if found is None else f"{found:.1f}"
            if row not in rows:
                rows.append(row)
    if not rows:
        return []
    rows.sort(key=lambda row: row["model"] != TEACHER)
    section = ["### Size and latency", format_rows(rows)]
    if latency["models"]:
        conditions = latency["conditions"]
        measured = ", ".join(str(conditions[name]) for name in ("device", "date") if name in conditions)
        section.append(
            f"Latency: the median for one sequence of {conditions.get('sequence_length', '?')} tokens on the CPU "
            f"({measured or 'unknown'}) with {conditions.get('threads', '?')} torch thread(s), without the task head."
        )
    return section


def _origin(results: list[Result]) -> str:
    """Numbers of cells and seeds, and the machines and versions that computed them."""
    seeds = sorted({result["cell"]["seed"] for result in results})
    environments = [result.get("environment") or {} for result in results]

    def values(name: str) -> list[str]:
        return sorted({str(environment[name]) for environment in environments if environment.get(name) is not None})

    parts = [f"{len(results)} finished cells, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({seeds[0]}"]
    parts[0] += f" to {seeds[-1]})" if len(seeds) > 1 else ")"
    if devices := values("device"):
        parts.append(f"on {', '.join(devices)}")
    parts += [f"{name} {', '.join(found)}" for name in ("torch", "transformers") if (found := values(name))]
    if dates := values("date"):
        parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    return f"{', '.join(parts)}. A number without ± is from one seed."


def main() -> None:
    """Parse the command line, and report."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.jsonl", help="results of examples.paper.run")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print it)")
    parser.add_argument("--figures", type=Path, help="folder to draw the figures in (default: none are drawn)")
    parser.add_argument("--latency", type=Path, help="latency.json of examples.paper.latency")
    args = parser.parse_args()
    if args.figures is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--figures needs matplotlib, which is not installed: pip install matplotlib, or leave it out.")
    base = args.output.parent if args.output is not None else Path()
    try:
        report = write_report(read_results(args.results), read_latency(args.latency), args.figures, base)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.output is None:
        print(report, end="")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(report)
    print(f"Report written to {args.output}")


if __name__ == "__main__":
    main()
