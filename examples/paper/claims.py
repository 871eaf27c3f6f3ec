"""The three claims, measure by measure, over paired seeds."""

from dataclasses import replace

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.common.statistics import Comparison, compare
from examples.common.tables import format_rows as table

from .ablations import CTCD
from .grouping import (
    AVERAGE,
    LOSS,
    MLM,
    Experiments,
    Measure,
    Row,
    Scores,
    average,
    calibration,
    loss,
    metric,
    plain_method,
    scores_of,
)
from .tables import between, labels_used

#: The claims about co-training: the model that should be better, and the model that it is compared with.
CLAIMS: tuple[tuple[str, Row, Row], ...] = (
    ("(a) The co-trained teacher beats the teacher trained alone", (CTCD, TEACHER), ("alone", TEACHER)),
    ("(b) The co-trained student beats the student of KD", (CTCD, STUDENT), ("kd", STUDENT)),
    ("(c) The co-trained student beats the teacher trained alone", (CTCD, STUDENT), ("alone", TEACHER)),
)
COMMUNITY, COMMUNITY_KD = "community", "community-kd"


def claims(experiments: Experiments) -> list[str]:
    """The three claims, measure by measure, followed by those of Community KD against its own baseline."""
    section: list[str] = []
    fewest: list[int] = []
    for claim, ours, theirs in CLAIMS:
        rows: dict[str, list[dict[str, str]]] = {}
        by_t: dict[str, int] = {}
        for protocol, measure, scores in measured(experiments):
            for names, result in compared(scores, measure, ours, theirs):
                rows.setdefault(names, []).append(
                    {"protocol": protocol, "measure": measure.name, "difference of": names} | in_words(result, measure)
                )
                by_t[names] = by_t.get(names, 0) + (result.verdict == "holds" and result.student_t[0] > 0)
                fewest.append(result.n)
        if rows:
            section += [f"#### {claim}", *(_tally(names, own, by_t[names]) for names, own in rows.items())]
            section.append(table([row for own in rows.values() for row in own]))
    if not section:
        return []
    intro = (
        "Differences between models of the same seed, **positive where the claim is right**, with 95 % intervals. "
        "*holds*: the whole bootstrap interval is above 0; *does not hold*: it is below 0; *undecided*: 0 is in it. "
        "Rows of `community` compare it with `community-kd`, where both models learn from the frozen teacher only."
    )
    limits = (
        f"**How much this says.** The fewest seeds of a row are {min(fewest)}. The bootstrap draws from the "
        "differences of these seeds. With three seeds, its interval goes from the smallest difference to the largest, "
        "and *holds* only means that all three agree. Without any effect, that happens by chance in one row of eight, "
        "and with two seeds in one of four. There are many rows, and they are not independent. The t interval is "
        "wider for few seeds, and assumes normally distributed differences; a row in which it contains 0 is a hint "
        "and no finding. Seeds vary the training (order, masks, dropout, new "
        "weights), but neither the validation set nor the pre-trained weights."
    )
    return ["### The three claims", intro, *section, limits]


def measured(experiments: Experiments) -> list[tuple[str, Measure, Scores]]:
    """Every measure by which methods are compared, with its protocol and scores."""
    found = [("pre-training", loss(MLM), scores_of(experiments.pretrained, LOSS))]
    protocols = {"fine-tuned by itself": experiments.finetuned}
    protocols |= {f"co-trained, {labels_used(rows)}": experiments.cotrained(rows) for rows in experiments.row_limits}
    for protocol, tasks in protocols.items():
        metrics = {task: scores_of(cells, metric(task)) for task, cells in tasks.items()}
        found += [(protocol, metric(task), scores) for task, scores in metrics.items()]
        if len(metrics) > 1:
            mean = replace(AVERAGE, name=f"average of {len(metrics)} tasks")
            found.append((protocol, mean, average(metrics.values())))
        for measure in (loss, calibration):
            found += [(protocol, measure(task), scores_of(cells, measure(task))) for task, cells in tasks.items()]
    return found


def compared(scores: Scores, measure: Measure, ours: Row, theirs: Row) -> list[tuple[str, Comparison]]:
    """A claim, and the same claim of Community KD against its own baseline, if they have common seeds."""
    pairs = [(ours, theirs)]
    for method in dict.fromkeys(method for method, _ in scores if plain_method(method) == COMMUNITY):
        pairs.append(((method, ours[1]), (method.replace(COMMUNITY, COMMUNITY_KD, 1), theirs[1])))
    found = [(pair, compare(*(scores.get(row, {}) for row in pair), measure.higher_is_better)) for pair in pairs]
    return [(" - ".join(f"{method} {model}" for method, model in pair), result) for pair, result in found if result]


def in_words(result: Comparison, measure: Measure) -> dict[str, str]:
    """The columns of a comparison."""
    digits = measure.digits + 1
    return {
        "mean": f"{result.mean:+.{digits}f}",
        "bootstrap interval": between(result.bootstrap, digits),
        "t interval": between(result.student_t, digits),
        "seeds": str(result.n),
        "verdict": result.verdict,
    }


def _tally(names: str, rows: list[dict[str, str]], by_t: int) -> str:
    verdicts = [row["verdict"] for row in rows]
    counts = ", ".join(
        f"{verdict} {verdicts.count(verdict)}" + f" ({by_t} of them by the t interval as well)" * (verdict == "holds")
        for verdict in dict.fromkeys(verdicts)
    )
    return f"{names} ({len(rows)} {'measures' if len(rows) > 1 else 'measure'}): {counts}."
