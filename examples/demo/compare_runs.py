"""Put the models of several training runs side by side: size, latency, metrics and learning curves.

A run is an output folder of `run_glue_ctcd.py` (or of Hugging Face's `run_glue.py`): the teacher at its root, the
student, if there is one, in `student/`. The models are read with plain transformers.

Example:
    python examples/demo/compare_runs.py outputs/ctcd outputs/alone --labels co-trained alone --output comparison.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whose package `examples` this is in


import argparse
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from ctcd_trainer.cards import results as card_results
from ctcd_trainer.model_structure import count_parameters
from ctcd_trainer.students.costs import measure_latencies, weight_bytes
from examples.common.tables import format_table

MODELS = ("teacher", "student")
#: The preferred metrics of the third panel; without them, it shows the first metric.
MAIN_METRICS = ("accuracy", "matthews_correlation")


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: Its output folder.
        label: Its name in the table and in the figure.
        results: The evaluation at its end, by key (`eval_accuracy`, `eval_student_accuracy`, ...).
        log_history: The logs of its training.
        models: Folder of each model by name.
    """

    folder: Path
    label: str
    results: dict[str, float]
    log_history: list[dict[str, float]]
    models: dict[str, Path] = field(default_factory=dict)

    def metrics(self, model: str) -> dict[str, float]:
        """Final metrics of one model without prefix; the agreement belongs to both models."""
        return metrics_of(self.results, model)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a key of the logs; one point for a key that was only evaluated at the end."""
        points: dict[int, float] = {}
        for entry in self.log_history:
            if key in entry:
                points.setdefault(entry["step"], entry[key])
        if not points and key in self.results and self.log_history:
            points[self.log_history[-1]["step"]] = self.results[key]
        return list(points), list(points.values())


def metrics_of(evaluation: dict[str, float], model: str) -> dict[str, float]:
    """The metrics of one model in an evaluation, without prefix: losses first, the agreement of both models last."""
    metrics = card_results.metrics_of(evaluation, MODELS)
    agreements = {name: value for name, value in metrics["teacher"].items() if name.startswith("agreement")}
    found = metrics[model] | agreements  # MNLI's second one has a suffix
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("loss"), item[0] in agreements)))


def load_run(folder: Path, label: str) -> Run:
    """Read the results of a run, without its models.

    Raises:
        FileNotFoundError: The folder does not hold a finished run.
    """
    results = next(
        (folder / name for name in ("all_results.json", "eval_results.json") if (folder / name).exists()), None
    )
    missing = [name for name in ("config.json", "trainer_state.json") if not (folder / name).exists()]
    if missing or results is None:
        missing += [] if results is not None else ["all_results.json"]
        reason = f"it has no {', no '.join(missing)}" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"{str(folder)!r} is not the folder of a finished run: {reason}. Pass the --output_dir of a run of "
            "run_glue_ctcd.py that was started with --do_train --do_eval and has ended."
        )
    return Run(
        folder=folder,
        label=label,
        results=json.loads(results.read_text()),
        log_history=json.loads((folder / "trainer_state.json").read_text())["log_history"],
        models={
            name: path
            for name, path in zip(MODELS, (folder, folder / "student"), strict=True)
            if (path / "config.json").exists()
        },
    )


def make_rows(runs: list[Run], sequence_length: int, repeats: int) -> list[dict[str, Any]]:
    """One row of the table for each model of each run, by column."""
    places = [(run, name, path) for run in runs for name, path in run.models.items()]
    models = [AutoModelForSequenceClassification.from_pretrained(path).eval() for _, _, path in places]
    rows = []
    for (run, name, path), model, latency in zip(
        places, models, measure_latencies(models, sequence_length, repeats), strict=True
    ):
        rows.append(
            {
                "run": run.label,
                "model": name,
                "parameters (M)": count_parameters(model) / 1e6,
                "on disk (MB)": weight_bytes(path) / 1e6,
                "latency (ms)": latency,
                **run.metrics(name),
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]], markdown: bool) -> str:
    """The rows as text in aligned columns, or as a Markdown table; the agreement, which is of both models, is last."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns.sort(key=lambda column: column.startswith("agreement"))

    def cell(column: str, value: str | float | None) -> str:
        if isinstance(value, int | float):
            return f"{value:.1f}" if column.endswith(")") else f"{value:.4f}"
        return value or "-"

    lines = [[cell(column, row.get(column)) for column in columns] for row in rows]
    return format_table([columns, *lines], markdown)


def main_metric(runs: list[Run]) -> str | None:
    """Name of the metric that the figure shows; `None` if no run has one."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics("teacher")))
    names = [name for name in names if not name.startswith(("loss", "agreement"))]
    return next((name for name in MAIN_METRICS if name in names), names[0] if names else None)


def draw(runs: list[Run], path: Path) -> None:
    """Draw training loss, validation loss and main metric of all models over the steps.

    Runs differ by colour and marker, teacher and student by line style and by whether the markers are filled, so the
    figure can be read in grey too.
    """
    from examples.common.figures import VALUE_STYLES, draw_legend, figure_of, line_style

    metric = main_metric(runs)
    panels = [
        ("Training: own task loss", "loss", ("teacher_hard_loss", "student_hard_loss")),
        ("Validation: task loss", "loss", ("eval_loss", "eval_student_loss")),
    ]
    if metric is not None:
        title = f"Validation: {metric.replace('_', ' ')}"
        panels.append((title, metric.replace("_", " "), (f"eval_{metric}", f"eval_student_{metric}")))
    with figure_of(path, 1, len(panels), height=4.4, width=4.5 * len(panels), dpi=150) as (figure, axes):
        for axis, (title, unit, keys) in zip(axes[0], panels, strict=True):
            for index, run in enumerate(runs):
                colour, marker, _ = VALUE_STYLES[index % len(VALUE_STYLES)]
                for model, key in zip(MODELS, keys, strict=True):
                    steps, values = run.curve(key)
                    if key == "teacher_hard_loss" and not steps:
                        steps, values = run.curve("loss")  # a run of one model
                    if model in run.models and steps:
                        style = line_style(colour, marker, "-" if model == "teacher" else "--", model == "student")
                        every = max(1, len(steps) // 8)
                        axis.plot(steps, values, label=f"{run.label}: {model}", markevery=every, **style)
            axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        draw_legend(figure, axes)


def main() -> None:
    """Read the runs, print the table, and write the files that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="output folder of a finished run")
    parser.add_argument("--labels", nargs="+", help="names of the runs, in order (default: the names of the folders)")
    parser.add_argument("--output", type=Path, help="write a figure of the learning curves to this file")
    parser.add_argument("--json", type=Path, help="write the rows of the table to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--sequence_length", type=int, default=128, help="tokens of the timed sequence")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each model")
    args = parser.parse_args()
    labels = args.labels or [folder.name for folder in args.run_dirs]
    if len(labels) != len(args.run_dirs):
        parser.error(f"--labels has {len(labels)} names for {len(args.run_dirs)} runs: give one name for each run.")
    if len(set(labels)) < len(labels):
        parser.error(f"two runs have the same name in {labels}: tell them apart with --labels.")
    try:
        runs = [load_run(folder, label) for folder, label in zip(args.run_dirs, labels, strict=True)]
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")

    logging.disable_progress_bar()
    rows = make_rows(runs, args.sequence_length, args.repeats)
    print(table_of(rows, args.markdown))
    conditions = {
        "device": "cpu",
        "batch_size": 1,
        "sequence_length": args.sequence_length,
        "torch_threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    print(
        f"\nLatency: one sequence of {args.sequence_length} tokens on the CPU, {torch.get_num_threads()} torch "
        f"thread(s), median of {args.repeats} calls of each model in turn after 3 to warm up. Size: the weight files."
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"latency_conditions": conditions, "rows": rows}, indent=2) + "\n")
        print(f"Table written to {args.json}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, args.output)
        print(f"Figure written to {args.output}")


if __name__ == "__main__":
    main()
