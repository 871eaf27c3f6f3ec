"""The Markdown sections of the report; a section without results is empty."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.common.statistics import Interval, paired_differences, summarise
from examples.common.tables import format_rows as table

from .ablations import differences, left_out, variants
from .grouping import (
    CALIBRATION,
    LOSS,
    MLM,
    SOFT_FIELDS,
    TASK_NAMES,
    Experiments,
    Measure,
    Result,
    Scores,
    Setting,
    at,
    average,
    baseline_of,
    calibration,
    loss,
    method_of,
    method_order,
    metric,
    scores_of,
    setting_of,
)

#: The words for the fields of a setting, in this order.
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
#: The words for null, for fields in which null is a value.
SAID_OF_NONE = {"rows": "all rows", "student_learning_rate": "the same for the student"}

SPENT = "Compute of a run: means, and the median of the seconds of its steps."


# ---- Cells of tables ----


def with_std(values: Iterable[float], digits: int, sign: bool = False) -> str:
    """Mean ± standard deviation; only the mean of a single value, empty without values."""
    summary = summarise(values)
    if summary is None:
        return ""
    mean = f"{summary.mean:{'+' if sign else ''}.{digits}f}"
    return mean if summary.std is None else f"{mean} ± {summary.std:.{digits}f}"


def between(interval: Interval | None, digits: int) -> str:
    """An interval of differences in brackets; empty for `None`."""
    return "" if interval is None else f"[{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"


def seeds_in(counts: Iterable[int]) -> str:
    """Number of seeds of the entries of a row: "3", or "1-3" if they differ."""
    found = sorted({count for count in counts if count})
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}" if found else ""


def described(setting: Setting) -> str:
    """A setting in one sentence."""
    parts = _said({name: value for name, value in setting.items() if value is not None})
    return f"Setting: {', '.join(parts)}{', bf16' if setting.get('bf16') else ''}." if parts else ""


def differing(setting: Setting, baseline: Setting) -> str:
    """The fields in which a setting differs from the baseline, without fields that one of the two does not use."""
    changed = {
        name: setting.get(name)
        for name in SAID
        if setting.get(name) != baseline.get(name, ...)
        and not (name in SOFT_FIELDS and None in (setting.get(name), baseline.get(name)))
    }
    if "teacher_soft_weight" in changed:  # it is said beside that of the student
        changed["soft_weight"] = setting["soft_weight"]
    return ", ".join(_said(changed))


def _said(setting: Setting) -> list[str]:
    """The words for each field; for the teacher's soft weight only if it is not the student's."""
    same = setting.get("teacher_soft_weight") == setting.get("soft_weight")
    return [
        words.format(setting[name]) if setting[name] is not None else SAID_OF_NONE[name]
        for name, words in SAID.items()
        if name in setting
        and (setting[name] is not None or name in SAID_OF_NONE)
        and not (same and name == "teacher_soft_weight")
    ]


# ---- Sections ----


def pretraining(experiments: Experiments) -> list[str]:
    """MLM validation loss of every method, and the cost of its runs."""
    cells = sorted(experiments.pretrained, key=lambda cell: method_order(method_of(cell)))
    if not cells:
        return []
    scores = scores_of(cells, LOSS)
    rows = []
    for method in sorted({method_of(result) for result in cells}, key=method_order):
        own = {learner: scores.get((method, learner), {}) for learner in (TEACHER, STUDENT)}
        row = {"method": method, "seeds": seeds_in(map(len, own.values()))}
        row |= {f"{learner}, validation loss": with_std(values.values(), 3) for learner, values in own.items()}
        for learner, values in own.items():
            differences = paired_differences(values, scores.get(("alone", learner), {})) if method != "alone" else []
            row[f"{learner} - alone"] = with_std(differences, 3, sign=True)
        rows.append(row)
    return [
        "### Pre-training",
        "Validation loss of masked language modelling in nats (lower is better), mean ± standard deviation over the "
        "seeds. `kd` trains no teacher and `reversed` no student: theirs are those of `alone`. The last columns are "
        "differences to the same model trained alone with the same seeds: negative is better.",
        described(experiments.baseline),
        table(rows),
        f"{SPENT} The cost of `kd` and `reversed` comes on top of the run of `alone` that trained their frozen model. "
        "So does the cost of community methods with a frozen teacher that was trained alone.",
        table(costs([{"method": method_of(cell)} for cell in cells], cells)),
    ]


def costs(names: list[dict[str, str]], results: list[Result]) -> list[dict[str, str]]:
    """The cost of runs, as rows of a table.

    Args:
        names: For each result, the columns by which results are grouped.
        results: The results.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for name, result in zip(names, results, strict=True):
        groups.setdefault(tuple(name.values()), []).append(result.get("compute") or {})
    rows = []
    for values, runs in groups.items():
        spent = {
            name: summarise(run[name] for run in runs if run.get(name) is not None)
            for name in ("steps", "tokens", "flops")
        }
        seconds = [run["seconds"] for run in runs if run.get("seconds") is not None]
        rows.append(
            dict(zip(names[0], values, strict=True))
            | {
                "runs": str(len(runs)),
                "steps": f"{spent['steps'].mean:,.0f}" if spent["steps"] else "",
                "tokens (M)": f"{spent['tokens'].mean / 1e6:.3g}" if spent["tokens"] else "",
                "FLOPs": f"{spent['flops'].mean:.2e}" if spent["flops"] else "",
                "seconds": f"{median(seconds):,.0f}" if seconds else "",
            }
        )
    return rows


def finetuning(experiments: Experiments) -> list[str]:
    """The pre-trained models, each fine-tuned by itself: metrics, then loss and calibration."""
    tasks = experiments.finetuned
    if not tasks:
        return _finetuned_others(experiments)
    metrics = {task: scores_of(cells, metric(task)) for task, cells in tasks.items()}
    qualities = {loss(task).name: scores_of(cells, LOSS) for task, cells in tasks.items()}
    qualities |= {
        calibration(task).name: found for task, cells in tasks.items() if (found := scores_of(cells, CALIBRATION))
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
        f"{SPENT} It is the same for every method; the pre-training comes on top.",
        table(costs(*_named([cell for cells in tasks.values() for cell in cells]))),
        *_finetuned_others(experiments),
    ]
    if experiments.orphans:
        section.append(
            f"{experiments.orphans} fine-tuned models are left out: their pre-training is not in the files given."
        )
    return section


def _named(cells: list[Result]) -> tuple[list[dict[str, str]], list[Result]]:
    """Cells of models fine-tuned by themselves, for `costs`: in order, with task and model."""
    cells = sorted(cells, key=lambda cell: (cell["cell"]["task"], STUDENT in cell["models"]))
    names = [{"task": metric(cell["cell"]["task"]).name, "model": next(iter(cell["models"]))} for cell in cells]
    return names, cells


def _finetuned_others(experiments: Experiments) -> list[str]:
    """The models of pre-trainings at other settings: their metrics."""
    groups: dict[str, dict[str, list[Result]]] = {}
    for setting, cell in experiments.finetuned_others:
        tasks = groups.setdefault(differing(setting, experiments.baseline) or "other data", {})
        tasks.setdefault(cell["cell"]["task"], []).append(cell)
    section = []
    for words, tasks in groups.items():
        columns = [
            (metric(task).name, 1, scores_of(at(cells, baseline_of(cells)), metric(task)))
            for task, cells in sorted(tasks.items())
        ]
        columns.append((f"average of {len(tasks)}", 1, average(scores for _, _, scores in columns)))
        section += [f"#### Pre-trained with {words}, fine-tuned", _by_model(columns)]
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
    return table(rows)


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
                section.append(f"#### {TASK_NAMES.get(task, task)}, {labels_used(limit)}")
                section += [] if setting in section else [setting]
                section.append(table(rows))
    cells = [cell for limit in experiments.row_limits for own in experiments.cotrained(limit).values() for cell in own]
    cells.sort(key=lambda cell: (cell["cell"]["task"], method_order(method_of(cell))))
    names = [
        {
            "task": f"{metric(cell['cell']['task']).name}, {labels_used(cell['cell'].get('rows'))}",
            "method": method_of(cell),
        }
        for cell in cells
    ]
    intro = (
        "Pairs that start from the initial models and are trained on a task. Metrics times 100 (higher is better), "
        "loss and calibration error (lower is better). A setting holds until the next one is named."
    )
    spent = f"{SPENT} That of frozen models trained alone comes on top."
    if not section:
        return []
    section += ["#### Compute of co-training", spent, table(costs(names, cells))]
    return ["### Co-training at fine-tuning", intro, *section]


def labels_used(rows: int | None) -> str:
    """Number of training rows, in words."""
    return "all rows" if rows is None else f"{rows:,} rows"


def ablations(experiments: Experiments) -> list[str]:
    """The effect of each setting, for pre-training and for every task that pairs were trained on."""
    groups: dict[str, tuple[list[Result], Measure]] = {}
    if experiments.pretraining:
        groups["Pre-training"] = experiments.pretraining, loss(MLM)
    for (task, rows), cells in sorted(experiments.cotraining.items(), key=lambda item: str(item[0])):
        groups[f"{TASK_NAMES.get(task, task)}, {labels_used(rows)}"] = cells, loss(task)
    section = []
    for title, (cells, measure) in groups.items():
        baseline = baseline_of(cells)
        if rows := _ablation_rows(cells, baseline):
            section += [f"#### {title}: {measure.name}", described(baseline), table(rows)]
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
