"""Groups of the results of a grid: by setting, method, model and seed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.data.metrics import GLUE_SCORES

from .cells import METHODS, MLM

Result = dict[str, Any]
Setting = dict[str, Any]
#: A method and one of its two models.
Row = tuple[str, str]
#: A value of each row at each seed.
Scores = dict[Row, dict[int, float]]

TASK_NAMES = {
    MLM: "MLM",
    "cola": "CoLA",
    "mnli": "MNLI",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST-2",
    "stsb": "STS-B",
}
ONE_DIRECTION = ("student-from-teacher", "teacher-from-student")
#: Null for a method that does not use them; such a cell belongs to every value of other methods.
SOFT_FIELDS = ("hard_weight", "soft_weight", "teacher_soft_weight", "temperature", "soft_warmup_ratio")
#: Fields that tell the rows of a table apart; they are not part of a setting.
ROW_FIELDS = ("method", "pretrained_teacher", "seed", "start", "learner")


# ---- Settings ----


def method_of(result: Result) -> str:
    """Name of the method in the tables, with its frozen teacher unless that is the teacher trained alone."""
    frozen = result["cell"].get("pretrained_teacher")
    return result["cell"]["method"] + (f" ({frozen})" if frozen not in (None, "alone") else "")


def plain_method(name: str) -> str:
    """The method of a name in the tables, without its frozen teacher."""
    return name.split(" (")[0]


def method_order(method: str) -> tuple[int, str]:
    """Sorts the names of methods as they are listed in `cells.py`."""
    base = plain_method(method)
    return (list(METHODS).index(base) if base in METHODS else len(METHODS)), method


def setting_of(result: Result) -> Setting:
    """All fields of a cell that are neither its method nor its seed."""
    cell = result["cell"]
    setting = {name: value for name, value in cell.items() if name not in ROW_FIELDS}
    # Null means "as the student's" if the teacher has soft losses, and "not used" otherwise.
    method = METHODS.get(cell["method"])
    learns = method is not None and any(edge.learner == TEACHER for edge in method.graph.edges)
    if learns and setting.get("teacher_soft_weight") is None:
        setting["teacher_soft_weight"] = setting.get("soft_weight")
    return setting


def belongs(result: Result, setting: Setting) -> bool:
    """Tell whether a cell has a setting; fields that the cell or the setting does not use count as equal."""
    own = setting_of(result)
    return all(
        own.get(name) == value or (name in SOFT_FIELDS and None in (own.get(name), value))
        for name, value in setting.items()
    )


def at(results: Iterable[Result], setting: Setting, method: str | None = None) -> list[Result]:
    """The cells with a setting, of all methods or of one."""
    return [result for result in results if belongs(result, setting) and method in (None, method_of(result))]


def baseline_of(results: list[Result]) -> Setting:
    """The most common setting among those with the fewest unused fields; `{}` without cells."""

    def most_common(settings: list[Setting], names: Iterable[str]) -> Setting:
        parts = [{name: setting.get(name) for name in names} for setting in settings]
        return max(parts, key=parts.count, default={})

    settings = [setting_of(result) for result in results]
    soft = [name for name in SOFT_FIELDS if any(name in setting for setting in settings)]
    hard = [name for name in dict.fromkeys(name for setting in settings for name in setting) if name not in soft]
    baseline = most_common(settings, hard)
    rest = [setting for setting in settings if all(setting.get(name) == value for name, value in baseline.items())]
    gaps = [sum(setting.get(name) is None for name in soft) for setting in rest]
    rest = [setting for setting, count in zip(rest, gaps, strict=True) if count == min(gaps)]
    return baseline | most_common(rest, soft)


# ---- Measures ----


@dataclass(frozen=True)
class Measure:
    """A number that says how good a model is.

    Attributes:
        name: Its name in the tables.
        keys: The scores of a cell whose mean it is.
        scale: Factor.
        digits: Number of decimals that are shown.
        higher_is_better: Whether a larger value is a better one.
    """

    name: str
    keys: tuple[str, ...]
    scale: float = 1.0
    digits: int = 3
    higher_is_better: bool = False

    def value(self, scores: Mapping[str, float]) -> float | None:
        """The number, from the scores of a model; `None` if a score is missing."""
        values = [scores.get(key) for key in self.keys]
        return None if None in values else self.scale * sum(values) / len(values)


LOSS = Measure("loss", ("loss",))
CALIBRATION = Measure("calibration error", ("calibration_error",))
AVERAGE = Measure("GLUE average", (), scale=100, digits=1, higher_is_better=True)


def metric(task: str) -> Measure:
    """The metric of a GLUE task (not F1), times 100; the mean if there are two."""
    keys = tuple(key for key in GLUE_SCORES.get(task, ("accuracy",)) if key != "f1")
    return Measure(TASK_NAMES.get(task, task), keys, scale=100, digits=1, higher_is_better=True)


def loss(task: str) -> Measure:
    """The validation loss of a task, under its usual name."""
    name = "loss" if task == MLM else "MSE" if task == "stsb" else "NLL"
    return Measure(f"{TASK_NAMES.get(task, task)} {name}", LOSS.keys)


def calibration(task: str) -> Measure:
    """The calibration error of a task with classes."""
    return replace(CALIBRATION, name=f"{TASK_NAMES.get(task, task)} {CALIBRATION.name}")


def collect(results: Iterable[Result], value: Callable[[Result, str], Any]) -> dict[Row, dict[int, Any]]:
    """The values of each trained model by seed, without `None`.

    Args:
        results: Cells of one setting.
        value: Takes a cell and the name of one of its models.
    """
    collected: dict[Row, dict[int, Any]] = {}
    for result in results:
        for learner in result.get("models", {}):
            row = (method_of(result), learner)
            found = value(result, learner)
            if found is not None:
                seed, seeds = result["cell"]["seed"], collected.setdefault(row, {})
                if seed in seeds:
                    raise ValueError(
                        f"There are two results of {' '.join(row)} on {result['cell']['task']} with seed {seed}, one "
                        f"of them {result['key']}. Report on the files of one grid only."
                    )
                seeds[seed] = found
    return dict(sorted(collected.items(), key=lambda item: (item[0][1] == STUDENT, method_order(item[0][0]))))


def scores_of(results: Iterable[Result], measure: Measure, split: str = "validation") -> Scores:
    """A measure of each trained model at each seed."""
    return collect(
        results, lambda result, learner: measure.value(result["models"][learner].get("scores", {}).get(split, {}))
    )


def curves_of(results: Iterable[Result]) -> dict[Row, dict[int, dict[int, float]]]:
    """The validation loss of each trained model at each seed, by step."""

    def curve(result: Result, learner: str) -> dict[int, float] | None:
        points = {
            point["step"]: point[learner]["loss"]
            for point in result.get("curve") or []
            if (point.get(learner) or {}).get("loss") is not None
        }
        return points or None

    return collect(results, curve)


def parameters_of(results: Iterable[Result]) -> dict[Row, float]:
    """Millions of parameters of each trained model; the mean if task heads differ."""
    counts: dict[Row, list[int]] = {}
    for result in results:
        for row, seeds in collect([result], lambda cell, learner: cell["models"][learner].get("parameters")).items():
            counts.setdefault(row, []).extend(seeds.values())
    return {row: sum(values) / len(values) / 1e6 for row, values in counts.items()}


def average(tables: Iterable[Scores]) -> Scores:
    """The mean over several tables, at each row and seed of all tables."""
    tables = list(tables)
    averages: Scores = {}
    for row in tables[0] if tables else ():
        seeds = set.intersection(*(set(table.get(row, {})) for table in tables))
        if seeds:
            averages[row] = {seed: sum(table[row][seed] for table in tables) / len(tables) for seed in sorted(seeds)}
    return averages


# ---- Experiments ----


@dataclass
class Experiments:
    """The cells of one scale.

    Attributes:
        pretraining: All cells of pre-training.
        baseline: The most common setting of pre-training.
        finetuned: By GLUE task, the models of pre-trainings at the baseline, each fine-tuned by itself, as cells of
            the methods that pre-trained them.
        finetuned_others: Models of the other pre-trainings, likewise fine-tuned by themselves: the setting of the
            pre-training, and the cell.
        cotraining: By GLUE task and number of training rows (`None`: all), the pairs trained on that task.
        orphans: Number of fine-tuned cells whose pre-training is not among the results.
    """

    pretraining: list[Result]
    baseline: Setting
    finetuned: dict[str, list[Result]]
    finetuned_others: list[tuple[Setting, Result]]
    cotraining: dict[tuple[str, int | None], list[Result]]
    orphans: int

    @property
    def pretrained(self) -> list[Result]:
        """The pre-trainings at the baseline."""
        return at(self.pretraining, self.baseline)

    @property
    def row_limits(self) -> list[int | None]:
        """Numbers of training rows of the co-trainings on a GLUE task, all rows last."""
        return sorted({rows for _, rows in self.cotraining}, key=lambda rows: (rows is None, rows))

    def cotrained(self, rows: int | None) -> dict[str, list[Result]]:
        """By GLUE task, the pairs trained on that many rows, at the setting that most of them share."""
        groups = {task: cells for (task, limit), cells in self.cotraining.items() if limit == rows}
        return {task: at(cells, baseline_of(cells)) for task, cells in groups.items()}


def arrange(results: list[Result]) -> Experiments:
    """Sort the cells of one scale into the three kinds."""
    pretraining = [result for result in results if result["cell"]["task"] == MLM]
    baseline = baseline_of(pretraining)
    known = {result["key"]: result for result in pretraining}
    chosen = {result["key"] for result in at(pretraining, baseline)}
    singles: dict[tuple[str, str], list[Result]] = {}
    others: list[tuple[Setting, Result]] = []
    cotraining: dict[tuple[str, int | None], list[Result]] = {}
    orphans = 0
    for result in results:
        cell = result["cell"]
        start = known.get(cell.get("start"))
        if cell["task"] == MLM:
            continue
        if cell.get("start") is None:
            cotraining.setdefault((cell["task"], cell.get("rows")), []).append(result)
        elif start is None:
            orphans += 1
        else:
            origin = {name: start["cell"].get(name) for name in ("method", "pretrained_teacher")}
            single = {**result, "cell": {**cell, **origin}}
            if start["key"] in chosen:
                singles.setdefault((cell["task"], cell.get("learner") or ""), []).append(single)
            else:
                others.append((setting_of(start), single))
    finetuned: dict[str, list[Result]] = {}
    for (task, _), cells in sorted(singles.items()):
        finetuned.setdefault(task, []).extend(at(cells, baseline_of(cells)))
    ordered = dict(sorted(cotraining.items(), key=lambda item: str(item[0])))
    return Experiments(pretraining, baseline, finetuned, others, ordered, orphans)
