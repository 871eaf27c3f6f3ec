"""The setting of co-training that is best on the dev sets, and its value on the validation sets."""

from collections.abc import Iterator
from dataclasses import dataclass

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.common.statistics import Comparison, compare
from examples.common.tables import format_rows as table

from .ablations import reference_cells
from .cells import METHODS
from .claims import CLAIMS, in_words
from .grouping import (
    MLM,
    Experiments,
    Measure,
    Result,
    Row,
    Setting,
    at,
    baseline_of,
    loss,
    method_of,
    metric,
    plain_method,
    scores_of,
    setting_of,
)
from .tables import differing

#: Fields that describe every setting on a GLUE task.
LENGTH = ("steps", "epochs", "rows")


@dataclass(frozen=True)
class Candidate:
    """A setting of co-training beside its reference, positive where it is better.

    Attributes:
        measure: What is compared.
        method: The method of co-training.
        setting: Description of the setting.
        dev: The comparison that decides the choice.
        validation: The comparison that counts.
    """

    measure: Measure
    method: str
    setting: str
    dev: Comparison
    validation: Comparison


def is_cotraining(method: str, learner: str) -> bool:
    """Tell whether a method trains both models at once, and one learns from the other."""
    graph = METHODS[plain_method(method)].graph
    return len(graph.trained) == 2 and any(
        edge.learner == learner and edge.source in (TEACHER, STUDENT) for edge in graph.edges
    )


def candidates(
    cells: list[Result], measure: Measure, unsaid: Setting, learner: str, reference: Row
) -> Iterator[Candidate]:
    """All settings and methods of co-training that were tried.

    Args:
        cells: All cells of pre-training, or all pairs on one GLUE task.
        measure: What is compared.
        unsaid: Fields that the description of a setting leaves out.
        learner: The co-trained model.
        reference: Method and model to compare with, of the same steps, rows, initialisation and learning rates.
    """
    baseline = baseline_of(cells)
    tried: list[tuple[str, Setting]] = []
    for result in cells:
        method, setting = own = method_of(result), setting_of(result)
        if own in tried or not is_cotraining(method, learner):
            continue
        tried.append(own)
        others = reference_cells(setting, cells, baseline, reference[0])
        found = {
            split: compare(
                scores_of(at(cells, setting, method), measure, split).get((method, learner), {}),
                scores_of(others, measure, split).get(reference, {}),
                measure.higher_is_better,
            )
            for split in ("dev", "validation")
        }
        if all(found.values()):
            yield Candidate(measure, method, differing(setting, unsaid) or "as the baseline", **found)


def choosing(experiments: Experiments) -> list[str]:
    """Write tables by claim: the best setting on dev for each measure, and all settings that were tried."""
    groups = [(experiments.pretraining, loss(MLM), experiments.baseline)] if experiments.pretraining else []
    for task in sorted({task for task, _ in experiments.cotraining}):
        cells = [result for (name, _), own in experiments.cotraining.items() if name == task for result in own]
        unsaid = {name: value for name, value in baseline_of(cells).items() if name not in LENGTH}
        groups += [(cells, metric(task), unsaid), (cells, loss(task), unsaid)]
    best, every = [], []
    for claim, (_, learner), reference in CLAIMS:
        rows = []
        for group in groups:
            ranked = sorted(candidates(*group, learner, reference), key=lambda each: -each.dev.mean)
            rows += [_row(each) for each in ranked]
            best += [{"claim": claim[:3], "tried": str(len(ranked))} | _row(each) for each in ranked[:1]]
        if rows:
            every += [f"#### All that were tried, {claim[:3]}", table(rows)]
    if not best:
        return []
    intro = (
        "For each claim and measure, the co-training (method and setting) that is best on dev among all that were "
        "*tried*, and its result on the validation set. Dev is the part of the training set that is kept for "
        "choosing; the validation set plays no part in the choice. Differences to the reference of the claim with the "
        "same steps, rows, initialisation and learning rates: **positive is better**. A setting with one seed may be "
        "chosen by luck. `community` learns from a third model, which its references (`alone`, `kd`) do not have."
    )
    return ["### Choosing a setting on dev", intro, table(best), *every]


def _row(candidate: Candidate) -> dict[str, str]:
    measure, words = candidate.measure, in_words(candidate.validation, candidate.measure)
    return {
        "measure": measure.name,
        "method": candidate.method,
        "setting": candidate.setting,
        "dev": f"{candidate.dev.mean:+.{measure.digits + 1}f}",
        "validation": words.pop("mean"),
    } | words
