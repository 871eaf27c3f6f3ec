"""Tables of a study with test sets: scores and losses of both models, and paired intervals over seeds and rows.

An interval resamples the seeds and, for all seeds and variants alike, the test rows. It needs the logits in the
folders of the runs.

Example:
    python -m examples.studies.evidence outputs/fine_tuning --against "warm, alone" "warm, kd" --ours "warm, ctcd" \
        --output docs/results/fine_tuning.md
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.common.statistics import CONFIDENCE
from examples.common.tables import format_rows
from examples.grid.results import load_results
from examples.grid.runner import RESULTS
from examples.paper.tables import between, with_std

from .scoring import fitted_temperature, load_logits, load_rows, losses_of, score_of
from .study import ARGUMENTS, TEST, TUNING_SEED, VALIDATION

LEARNERS = (TEACHER, STUDENT)
RESAMPLES = 2_000
#: The columns of the tables: the keys of the scores with their titles and digits.
MEASURES: Mapping[str, tuple[str, int]] = {"score": ("%", 1), "nll": ("loss", 3), "scaled_nll": ("scaled loss", 3)}


class Evidence:
    """The runs of a study.

    Args:
        folder: The folder of the study.
        part: The part of the test rows that is scored.
    """

    def __init__(self, folder: Path, part: str = TEST) -> None:
        self.folder, self.part = folder, part
        records = load_results([folder / RESULTS])
        self.records = [record for record in records if record["seed"] != TUNING_SEED]
        self.variants = list(dict.fromkeys(record["variant"] for record in self.records))
        self.tasks = list(dict.fromkeys(record["task"] for record in self.records))

    def record(self, task: str, variant: str) -> dict[int, dict[str, Any]]:
        """The runs of a variant by seed."""
        return {r["seed"]: r for r in self.records if (r["task"], r["variant"]) == (task, variant)}

    def values(self, task: str, variant: str, learner: str, measure: str) -> dict[int, float]:
        """A measure of a model by seed."""
        scores = {seed: r["scores"][self.part] for seed, r in self.record(task, variant).items()}
        return {seed: score[learner][measure] for seed, score in scores.items() if learner in score}

    @functools.cache  # noqa: B019  every comparison reads the same runs
    def rows(
        self, task: str, variant: str, learner: str
    ) -> tuple[dict[int, np.ndarray], dict[int, float], np.ndarray]:
        """The logits `(rows, outputs)` and the fitted temperature by seed, and the labels `(rows,)`."""
        logits, temperatures, labels = {}, {}, np.empty(0)
        for seed, record in self.record(task, variant).items():
            folder = self.folder / record["key"]
            found = load_logits(folder)
            if learner in found:
                test_file = json.loads((folder / ARGUMENTS).read_text())["test_file"]
                every_label, parts = load_rows(test_file, len(found[learner]))
                held_out = parts == VALIDATION
                temperatures[seed] = fitted_temperature(found[learner][held_out], every_label[held_out])
                logits[seed], labels = found[learner][parts == self.part], every_label[parts == self.part]
        return logits, temperatures, labels


def difference(
    evidence: Evidence, task: str, ours: tuple[str, str], theirs: tuple[str, str], measure: str
) -> tuple[float, tuple[float, float] | None, int]:
    """Compare two models, each named by its variant and its learner, over the seeds that both have.

    Returns:
        The mean difference, positive where ours is better; its interval over seeds and rows, `None` for a single seed;
        and the number of seeds.
    """
    found = [evidence.rows(task, *each) for each in (ours, theirs)]
    seeds = sorted(found[0][0].keys() & found[1][0].keys())
    if not seeds:
        return float("nan"), None, 0
    labels, generator = found[0][2], np.random.default_rng(0)

    def value(side: int, seed: int, rows: np.ndarray) -> float:
        logits, temperatures, _ = found[side]
        if measure == "score":
            return score_of(task, logits[seed][rows], labels[rows])
        scaled = temperatures[seed] if measure == "scaled_nll" else 1.0
        return -float(losses_of(logits[seed][rows], labels[rows], scaled).mean())

    def mean(drawn: Sequence[int], rows: np.ndarray) -> float:
        return float(np.mean([value(0, seed, rows) - value(1, seed, rows) for seed in drawn]))

    every_row = np.arange(len(labels))
    if len(seeds) == 1:
        return mean(seeds, every_row), None, 1
    resampled = [
        mean(generator.choice(seeds, len(seeds)), generator.integers(0, len(labels), len(labels)))
        for _ in range(RESAMPLES)
    ]
    bounds = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return mean(seeds, every_row), (float(bounds[0]), float(bounds[1])), len(seeds)


def score_table(evidence: Evidence) -> str:
    """Mean and standard deviation over the seeds of each measure of both models."""
    rows = []
    for task in evidence.tasks:
        for variant in evidence.variants:
            runs = evidence.record(task, variant)
            if not runs:
                continue
            row = {"task": task, "way": variant, "seeds": str(len(runs))}
            for learner in LEARNERS:
                for measure, (title, digits) in MEASURES.items():
                    values = evidence.values(task, variant, learner, measure).values()
                    row[f"{learner}, {title}"] = with_std(values, digits) or "-"
            rows.append(row)
    return format_rows(rows)


def comparison_table(evidence: Evidence, pairs: Sequence[tuple[str, str, str, str]]) -> str:
    """The differences of pairs of models, given as our variant, our learner, their variant and their learner."""
    rows = []
    for task in evidence.tasks:
        for ours, our_learner, theirs, their_learner in pairs:
            row = {"task": task, "model": f"{our_learner}, {ours}", "minus": f"{their_learner}, {theirs}"}
            for measure, (title, digits) in MEASURES.items():
                mean, interval, seeds = difference(
                    evidence, task, (ours, our_learner), (theirs, their_learner), measure
                )
                row |= {"seeds": str(seeds)}
                row[f"{title} (positive = better)"] = (
                    f"{mean:+.{digits}f} {between(interval, digits) if interval else ''}" if seeds else "-"
                )
            rows.append(row)
    return format_rows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output folder of examples.studies.run")
    parser.add_argument("--ours", nargs="+", default=[], help="variants that are compared with the others")
    parser.add_argument("--against", nargs="+", default=[], help="the variants with which they are compared")
    parser.add_argument("--part", default=TEST, help="part of the test rows (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="a Markdown file")
    args = parser.parse_args(argv)
    evidence = Evidence(args.folder, args.part)
    for name in (*args.ours, *args.against):
        if name not in evidence.variants:
            parser.error(f"{name!r} is none of the variants {evidence.variants}.")
    pairs = [(o, learner, a, learner) for learner in LEARNERS for o in args.ours for a in args.against if o != a]
    parts = [score_table(evidence), *([comparison_table(evidence, pairs)] if pairs else [])]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n\n".join(parts) + "\n")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
