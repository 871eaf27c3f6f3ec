"""The Markdown sections of the report; each is empty where there are no results for it."""

from collections.abc import Iterable, Mapping
from typing import Any

from ctcd_trainer.graph import STUDENT, TEACHER

from ..compare_runs import format_table
from .ablations import CTCD, differences, left_out, variants
from .grouping import (
    AVERAGE,
    CALIBRATION,
    LOSS,
    MLM,
    TASK_NAMES,
    Experiments,
    Measure,
    Result,
    Row,
    Scores,
    average,
    baseline_of,
    loss,
    method_of,
    method_order,
    metric,
    scores_of,
    setting_of,
)
from .statistics import Comparison, compare, summarise

#: What is claimed of co-training: the better model and the one that it is compared with.
CLAIMS: tuple[tuple[str, Row, Row], ...] = (
    ("(a) The co-trained teacher beats the teacher trained alone", (CTCD, TEACHER), ("alone", TEACHER)),
    ("(b) The co-trained student beats the student of KD", (CTCD, STUDENT), ("kd", STUDENT)),
    ("(c) The co-trained student beats the teacher trained alone", (CTCD, STUDENT), ("alone", TEACHER)),
)
#: How the fields of a setting are said, in this order.
SAID = {
    "steps": "{:,} steps",
    "epochs": "{:g} epochs",
    "rows": "{:,} rows",
    "batch_size": "batch {}",
    "learning_rate": "learning rate {:g}",
    "student_learning_rate": "{:g} for the student",
    "weight_decay": "weight decay {:g}",
    "warmup_ratio": "warm-up {:g}",
    "teacher_init": "teacher {}",
    "student_init": "student {}",
    "hard_weight": "hard weights {:g}",
    "soft_weight": "soft weights {:g}",
    "teacher_soft_weight": "{:g} for the teacher",
    "temperature": "temperature {:g}",
    "soft_warmup_ratio": "soft warm-up {:g}",
}
COMMUNITY, COMMUNITY_KD = "community", "community-kd"


# ---- Cells of tables ----


def with_std(values: Iterable[float], digits: int, sign: bool = False) -> str:
    """Mean ± standard deviation; the mean alone of one value, empty without any."""
    summary = summarise(values)
    if summary is None:
        return ""
    mean = f"{summary.mean:{'+' if sign else ''}.{digits}f}"
    return mean if summary.std is None else f"{mean} ± {summary.std:.{digits}f}"


def seeds_in(counts: Iterable[int]) -> str:
    """How many seeds the entries of a row have: "3", or "1-3" where they differ."""
    found = sorted({count for count in counts if count})
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}" if found else ""


def described(setting: Mapping[str, Any]) -> str:
    """A setting in one sentence."""
    setting = {"student_learning_rate": None, "teacher_soft_weight": None, **setting}
    if setting["teacher_soft_weight"] == setting.get("soft_weight"):
        setting["teacher_soft_weight"] = None
    parts = [words.format(setting[name]) for name, words in SAID.items() if setting.get(name) is not None]
    return f"Setting: {', '.join(parts)}{', bf16' if setting.get('bf16') else ''}." if parts else ""


def _table(rows: list[dict[str, str]]) -> str:
    return format_table(rows, markdown=True)


# ---- Sections ----


def pretraining(experiments: Experiments) -> list[str]:
    """MLM validation loss of every method, and what its runs cost."""
    cells = experiments.pretrained
    if not cells:
        return []
    scores = scores_of(cells, LOSS)
    rows, costs = [], []
    for method in sorted({method_of(result) for result in cells}, key=method_order):
        own = [scores.get((method, learner), {}) for learner in (TEACHER, STUDENT)]
        rows.append(
            {
                "method": method,
                "seeds": seeds_in(map(len, own)),
                "teacher, validation loss": with_std(own[0].values(), 3),
                "student, validation loss": with_std(own[1].values(), 3),
            }
        )
        runs = [result.get("compute") or {} for result in cells if method_of(result) == method]
        spent = {
            name: summarise(run[name] for run in runs if run.get(name) is not None)
            for name in ("steps", "tokens", "flops", "seconds")
        }
        costs.append(
            {
                "method": method,
                "runs": str(len(runs)),
                "steps": f"{spent['steps'].mean:,.0f}" if spent["steps"] else "",
                "tokens (M)": f"{spent['tokens'].mean / 1e6:.3g}" if spent["tokens"] else "",
                "FLOPs": f"{spent['flops'].mean:.2e}" if spent["flops"] else "",
                "seconds": with_std((run["seconds"] for run in runs if run.get("seconds") is not None), 0),
            }
        )
    return [
        "### Pre-training",
        "Validation loss of masked language modelling in nats (lower is better), mean ± standard deviation over the "
        "seeds. `kd` trains no teacher and `reversed` no student: theirs are those of `alone`.",
        described(experiments.baseline),
        _table(rows),
        "Mean compute of a run. That of `kd` and `reversed` comes on top of the run of `alone` that trained their "
        "frozen model, and so does that of the community methods whose frozen teacher was trained alone.",
        _table(costs),
    ]


def finetuning(experiments: Experiments) -> list[str]:
    """The pre-trained models, each fine-tuned by itself: metrics, then loss and calibration."""
    tasks = experiments.finetuned
    if not tasks:
        return []
    metrics = {task: scores_of(cells, metric(task)) for task, cells in tasks.items()}
    qualities = {loss(task).name: scores_of(cells, LOSS) for task, cells in tasks.items()}
    qualities |= {
        f"{TASK_NAMES.get(task, task)} calibration error": found
        for task, cells in tasks.items()
        if (found := scores_of(cells, CALIBRATION))
    }
    settings: dict[str, list[str]] = {}
    for task, cells in tasks.items():
        for setting in dict.fromkeys(described(setting_of(cell)) for cell in cells):
            settings.setdefault(setting, []).append(TASK_NAMES.get(task, task))
    columns = [(metric(task).name, 1, scores) for task, scores in metrics.items()]
    columns.append((f"average of {len(tasks)}", 1, average(metrics.values())))
    section = [
        "### Fine-tuning: every pre-trained model by itself",
        "Validation sets, times 100: Matthews correlation for CoLA, mean of Pearson and Spearman correlation for "
        "STS-B, accuracy for the others. Seeds without a result for every task are left out of the average.",
        *(f"{', '.join(names)}. {setting}" for setting, names in settings.items()),
        _by_model(columns),
        "Loss (NLL in nats; for STS-B the mean squared error) and expected calibration error, lower is better:",
        _by_model([(name, 3, scores) for name, scores in qualities.items()]),
    ]
    if experiments.orphans:
        section.append(
            f"{experiments.orphans} fine-tuned models are left out: their pre-training is not in the files given."
        )
    return section


def _by_model(columns: list[tuple[str, int, Scores]]) -> str:
    found = {row for _, _, scores in columns for row in scores}
    rows = []
    for method, learner in sorted(found, key=lambda row: (row[1] == STUDENT, method_order(row[0]))):
        seeds = [scores.get((method, learner), {}) for _, _, scores in columns]
        rows.append(
            {"method": method, "model": learner}
            | {name: with_std(own.values(), digits) for (name, digits, _), own in zip(columns, seeds, strict=True)}
            | {"seeds": seeds_in(map(len, seeds))}
        )
    return _table(rows)


def cotraining(experiments: Experiments) -> list[str]:
    """Pairs that were trained together on a GLUE task, by task and number of labels."""
    section: list[str] = []
    for limit in experiments.row_limits:
        for task, cells in experiments.cotrained(limit).items():
            measures = (metric(task), loss(task), CALIBRATION)
            found = {measure: scores_of(cells, measure) for measure in measures}
            rows = []
            for method in sorted({method for scores in found.values() for method, _ in scores}, key=method_order):
                values = {
                    f"{learner}, {measure.name}": (scores.get((method, learner), {}).values(), measure.digits)
                    for measure, scores in found.items()
                    if scores
                    for learner in (TEACHER, STUDENT)
                }
                rows.append(
                    {"method": method, "seeds": seeds_in(len(own) for own, _ in values.values())}
                    | {name: with_std(own, digits) for name, (own, digits) in values.items()}
                )
            if rows:
                setting = described(baseline_of(cells))
                section.append(f"#### {TASK_NAMES.get(task, task)}, {_labels(limit)}")
                section += [] if setting in section else [setting]
                section.append(_table(rows))
    intro = (
        "Pairs that start from the initial models and are trained on a task. Metrics times 100 (higher is better), "
        "loss and calibration error (lower is better). A setting holds until the next one is named."
    )
    return ["### Co-training at fine-tuning", intro, *section] if section else []


def _labels(rows: int | None) -> str:
    return "all rows" if rows is None else f"{rows:,} rows"


def measured(experiments: Experiments) -> list[tuple[str, Measure, Scores]]:
    """Every measure by which methods are compared, with the protocol it belongs to."""
    found = [("pre-training", loss(MLM), scores_of(experiments.pretrained, LOSS))]
    protocols = {"fine-tuned by itself": experiments.finetuned}
    protocols |= {f"co-trained, {_labels(rows)}": experiments.cotrained(rows) for rows in experiments.row_limits}
    for protocol, tasks in protocols.items():
        metrics = {task: scores_of(cells, metric(task)) for task, cells in tasks.items()}
        found += [(protocol, metric(task), scores) for task, scores in metrics.items()]
        if len(metrics) > 1:
            found.append((protocol, AVERAGE, average(metrics.values())))
        found += [(protocol, loss(task), scores_of(cells, LOSS)) for task, cells in tasks.items()]
    return found


def compared(scores: Scores, measure: Measure, ours: Row, theirs: Row) -> list[tuple[str, Comparison]]:
    """A claim, and the same of Community KD against its own baseline, where there are seeds to compare."""
    pairs = [(ours, theirs)]
    for method in dict.fromkeys(method for method, _ in scores if method.split(" (")[0] == COMMUNITY):
        pairs.append(((method, ours[1]), (method.replace(COMMUNITY, COMMUNITY_KD, 1), theirs[1])))
    found = [(pair, compare(*(scores.get(row, {}) for row in pair), measure.higher_is_better)) for pair in pairs]
    return [(" - ".join(f"{method} {model}" for method, model in pair), result) for pair, result in found if result]


def claims(experiments: Experiments) -> list[str]:
    """The three claims, measure by measure; those of Community KD, against its own baseline, below them."""
    section: list[str] = []
    fewest: list[int] = []
    for claim, ours, theirs in CLAIMS:
        rows: dict[str, list[dict[str, str]]] = {}
        for protocol, measure, scores in measured(experiments):
            for names, result in compared(scores, measure, ours, theirs):
                digits = measure.digits + 1
                rows.setdefault(names, []).append(
                    {
                        "protocol": protocol,
                        "measure": measure.name,
                        "difference of": names,
                        "mean": f"{result.mean:+.{digits}f}",
                        "bootstrap interval": _interval(result.bootstrap, digits),
                        "t interval": _interval(result.student_t, digits),
                        "seeds": str(result.n),
                        "verdict": result.verdict,
                    }
                )
                fewest.append(result.n)
        if rows:
            section += [f"#### {claim}", *(_tally(names, own) for names, own in rows.items())]
            section.append(_table([row for own in rows.values() for row in own]))
    if not section:
        return []
    intro = (
        "Differences between models of the same seed, **positive where the claim is right**, with 95 % intervals. "
        "*holds*: the whole bootstrap interval is above 0; *does not hold*: it is below 0; *undecided*: 0 is in it. "
        "Rows of `community` compare it with `community-kd`, where both models learn from the frozen teacher only."
    )
    limits = (
        f"**How much this says.** The fewest seeds of a row are {min(fewest)}. The bootstrap draws from the "
        "differences of the seeds that there are. With three, its interval is simply the smallest and the largest "
        "of them: *holds* then means no more than that all three agree, which happens by chance, without any "
        "effect, in one row of eight (with two seeds in one of four); and there are many rows, which are not "
        "independent. The t interval pays for few seeds, and assumes differences that are normally distributed; a "
        "row in which it contains 0 is a hint and no finding. Seeds vary the training (order, masks, dropout, new "
        "weights), but neither the validation set nor the pre-trained weights."
    )
    return ["### The three claims", intro, *section, limits]


def _tally(names: str, rows: list[dict[str, str]]) -> str:
    verdicts = [row["verdict"] for row in rows]
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts))
    return f"{names} ({len(rows)} {'measures' if len(rows) > 1 else 'measure'}): {counts}."


def _interval(interval: tuple[float, float] | None, digits: int) -> str:
    return "" if interval is None else f"[{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"


def ablations(experiments: Experiments) -> list[str]:
    """What each setting changes, for pre-training and for every task that pairs were trained on."""
    groups: dict[str, tuple[list[Result], Measure]] = {}
    if experiments.pretraining:
        groups["Pre-training"] = experiments.pretraining, loss(MLM)
    for (task, rows), cells in sorted(experiments.cotraining.items(), key=lambda item: str(item[0])):
        groups[f"{TASK_NAMES.get(task, task)}, {_labels(rows)}"] = cells, loss(task)
    section = []
    for title, (cells, measure) in groups.items():
        baseline = baseline_of(cells)
        if rows := _ablation_rows(cells, baseline):
            section += [f"#### {title}: {measure.name}", described(baseline), _table(rows)]
        if skipped := left_out(cells, baseline):
            section.append(
                f"{title}: {skipped} co-trainings differ from the baseline in several axes, and are left out."
            )
    intro = (
        "One axis at a time, all else as in the baseline (in bold). Loss of the co-trained model minus the loss of "
        "the one trained alone or by KD with the same steps, rows, initialisation and learning rates: **negative is "
        "better**. The teacher of KD is the one trained alone. Settings are chosen on the dev set, a part of the "
        "training set."
    )
    return ["### Ablations", intro, *section] if section else []


def _ablation_rows(cells: list[Result], baseline: Mapping[str, Any]) -> list[dict[str, str]]:
    comparisons = {
        "teacher - alone": (TEACHER, ("alone", TEACHER)),
        "student - alone": (STUDENT, ("alone", STUDENT)),
        "student - kd": (STUDENT, ("kd", STUDENT)),
    }
    rows = []
    for variant in variants(cells, baseline):
        found = {
            f"{split}: {name}": differences(variant, cells, baseline, learner, reference, split)
            for split in ("dev", "validation")
            for name, (learner, reference) in comparisons.items()
        }
        if any(found.values()):
            rows.append(
                {
                    "axis": variant.axis,
                    "value": f"**{variant.label}**" if variant.is_baseline else variant.label,
                    **{name: with_std(values, 4, sign=True) for name, values in found.items()},
                    "seeds": seeds_in(len(values) for values in found.values()),
                }
            )
    return rows
