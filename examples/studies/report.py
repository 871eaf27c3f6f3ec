"""Tables (in Markdown) and figure of a study: quality of both models, what they cost, and the Pareto front.

Without costs there is no front. With a reference, each variant is compared with it, seed by seed.

Example:
    python -m examples.studies.report docs/results/choices.jsonl --costs docs/results/choices-costs.json \
        --output docs/results/choices.md --figure docs/results/figures/choices.png
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.common.statistics import compare, summarise
from examples.common.tables import format_rows
from examples.paper.tables import between, with_std

from .pareto import TOLERANCE, Point, front

LEARNERS = (TEACHER, STUDENT)
#: Metrics whose scores are shares, from -1 or 0 to 1, are given in percent.
NAMES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "matthews_correlation": "Matthews correlation",
    "combined_score": "mean of Pearson and Spearman correlation",
}
#: The costs of the fronts, with their names.
COSTS: Mapping[str, str] = {"latency_ms": "latency (ms)", "parameters": "parameters (M)"}


class Scores:
    """The scores of all runs.

    Args:
        records: The lines of the results.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.records = records
        self.variants = list(dict.fromkeys(record["variant"] for record in records))
        self.tasks = list(dict.fromkeys(record["task"] for record in records))
        self.choices = {record["variant"]: record["choice"] for record in records}

    def metric(self, task: str) -> str:
        """The main metric of a task; the mean of several, as in GLUE's score."""
        names = next(record[TEACHER] for record in self.records if record["task"] == task)
        names = [name for name in names if name not in ("loss", "agreement")]
        return "combined_score" if "combined_score" in names else names[0]

    def by_seed(self, variant: str, task: str, learner: str, metric: str | None = None) -> dict[int, float]:
        """The scores of a model by seed, in percent for the main metric. Regression has no agreement."""
        scale = 100 if metric is None else 1
        name = metric or self.metric(task)
        return {
            record["seed"]: scale * record[learner][name]
            for record in self.records
            if (record["variant"], record["task"]) == (variant, task) and name in record[learner]
        }

    def mean(self, variant: str, task: str, learner: str, metric: str | None = None) -> str:
        """Mean ± standard deviation over the seeds, as a cell of a table; a dash without any."""
        return with_std(self.by_seed(variant, task, learner, metric).values(), 1 if metric is None else 3) or "-"

    def seeds(self) -> int:
        """The largest number of seeds of a variant and a task."""
        return max(len(self.by_seed(variant, task, STUDENT)) for variant in self.variants for task in self.tasks)


def points_of(scores: Scores, costs: Mapping[str, Any], task: str, cost: str) -> dict[str, Point]:
    """The students of a task by the name of the variant."""
    points = {}
    for variant in scores.variants:
        quality = summarise(scores.by_seed(variant, task, STUDENT).values())
        if quality is not None and variant in costs:
            value = costs[variant][cost]
            points[variant] = Point(quality.mean, value[STUDENT] / 1e6 if cost == "parameters" else value)
    return points


def quality_table(scores: Scores) -> str:
    """Both models' main metric and loss, and their agreement."""
    rows = []
    for task in scores.tasks:
        for variant in scores.variants:
            row = {"task": task, "variant": variant, "seeds": str(len(scores.by_seed(variant, task, STUDENT)))}
            for learner in LEARNERS:
                row[f"{learner} (%)"] = scores.mean(variant, task, learner)
            for learner in LEARNERS:
                row[f"{learner}, loss"] = scores.mean(variant, task, learner, "loss")
            row["agreement"] = scores.mean(variant, task, STUDENT, "agreement")
            rows.append(row)
    return format_rows(rows)


def comparison_table(scores: Scores, reference: str) -> str:
    """The reference minus each other variant, at the same seeds: the mean and its t interval."""
    rows = []
    for task in scores.tasks:
        for variant in scores.variants:
            if variant == reference:
                continue
            row = {"task": task, f"{reference}, against": variant}
            for metric, title, digits in ((None, "(points)", 1), ("loss", "loss (positive = better)", 3)):
                for learner in LEARNERS:
                    pair = [scores.by_seed(each, task, learner, metric) for each in (reference, variant)]
                    found = compare(*pair, higher_is_better=metric is None)
                    cell = "-" if found is None else f"{found.mean:+.{digits}f}"
                    if found is not None and found.student_t is not None:
                        cell += f" {between(found.student_t, digits)}"
                    row[f"{learner} {title}"] = cell
            rows.append(row)
    return format_rows(rows)


def choices_table(scores: Scores, costs: Mapping[str, Any]) -> str:
    """A line a variant: quality, size, latency, time and memory of training, and the fronts that it is on."""
    fronts = {(task, cost): front(points_of(scores, costs, task, cost)) for task in scores.tasks for cost in COSTS}
    rows = []
    for number, variant in enumerate(scores.variants, 1):
        row = {"variant": f"{number}: {variant}"}
        for task in scores.tasks:
            for learner in LEARNERS:
                row[f"{task}, {learner} (%)"] = scores.mean(variant, task, learner)
        own = costs.get(variant)
        if own is not None:
            row |= {
                "student (M)": f"{own['parameters'][STUDENT] / 1e6:.1f}",
                "both in memory (M)": f"{own['parameters']['both'] / 1e6:.1f}",
                "trained (M)": f"{own['parameters']['trained'] / 1e6:.1f}",
                "latency (ms)": f"{own['latency_ms']:.1f}",
                "time of a step": f"{own['step_ratio']:.2f}",
                "peak memory (MB)": f"{own['peak_mb']:.0f}",
            }
        on = [f"{task} ({cost.split('_')[0]})" for (task, cost), names in fronts.items() if variant in names]
        row["on the front of"] = ", ".join(on) or "-"
        rows.append(row)
    return format_rows(rows)


def notes(scores: Scores, measured: Mapping[str, Any] | None) -> list[str]:
    """Notes that explain the tables."""
    metrics = [f"{task}: {NAMES.get(scores.metric(task), scores.metric(task))}" for task in scores.tasks]
    rows = sorted({record["train_rows"] for record in scores.records})
    lines = [f"Quality in percent ({'; '.join(metrics)}) on the validation sets, {scores.seeds()} seed(s)"]
    lines.append(f"Training rows: {', '.join(f'{count:,}' for count in rows)}")
    if measured is not None:
        conditions, teacher = measured["conditions"], measured["costs"][TEACHER]
        same = measured["costs"][conditions["reference"]]
        noise = "{:.2f} to {:.2f}".format(*same["step_ratio_range"])
        lines += [
            f"Latency of the student for one sequence of {conditions['latency_tokens']} tokens, fp32, adapters "
            f"merged, all models in turns; of the teacher: {teacher['latency_ms']:.1f} ms",
            f'Time of one optimizer step for both models, over that of "{conditions["reference"]}" in turns with it '
            f"({same['step_s']:.3f} s; against itself from {noise}); rows of {conditions['tokens']} tokens",
            "Peak memory of a process that trains for a few steps, above what the imports take",
            f"On a front: no other is better at a cost that is at most {TOLERANCE:.0%} higher, or as good for less",
            f"Costs: {conditions['machine']}, {conditions['date']}",
        ]
    return [f"- {line}." for line in lines]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the results.jsonl of examples.studies.run")
    parser.add_argument("--costs", type=Path, help="what examples.studies.costs wrote")
    parser.add_argument("--reference", help="compare this variant with each other one, seed by seed")
    parser.add_argument("--output", type=Path, required=True, help="a Markdown file")
    parser.add_argument("--figure", type=Path, help="quality over latency and parameters (needs --costs)")
    args = parser.parse_args(argv)
    scores = Scores([json.loads(line) for line in args.results.read_text().splitlines()])
    if args.reference is not None and args.reference not in scores.variants:
        parser.error(f"--reference {args.reference!r} is none of the variants {scores.variants}.")
    if args.figure is not None and args.costs is None:
        parser.error("--figure needs --costs.")
    measured = json.loads(args.costs.read_text()) if args.costs is not None else None
    parts = [] if measured is None else [choices_table(scores, measured["costs"])]
    parts.append(quality_table(scores))
    if args.reference is not None:
        parts.append(comparison_table(scores, args.reference))
    parts.append("\n".join(notes(scores, measured)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n\n".join(parts) + "\n")
    print(f"Written to {args.output}")
    if args.figure is not None:
        from .figure import draw

        draw(scores, measured["costs"], args.figure)
        print(f"Written to {args.figure}")


if __name__ == "__main__":
    main()
