"""A study: named variants of the arguments of `run_glue_ctcd.py`, each with several tasks and seeds.

A variant can start from the models of another one: the value `@NAME` is the folder of the variant NAME, of the same
task and seed, and `@NAME/student` its student. With `tune`, some of its arguments are chosen first, by trials at a
seed of their own. The trial that is best on the validation set gives the arguments at all other seeds.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.demo.compare_runs import metrics_of

#: Arguments of every run, unless the study says otherwise.
DEFAULTS: Mapping[str, Any] = {
    "do_train": True,
    "do_eval": True,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "pad_to_max_length": False,
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": "none",
    "disable_tqdm": True,
}
#: File in the folder of a run with its arguments.
ARGUMENTS = "arguments.json"
#: File in the folder of a run with the scores of its models on each part of the data.
SCORES = "scores.json"
VALIDATION, TEST = "validation", "test"
#: Seed of the trials that choose arguments; no seed of a study.
TUNING_SEED = 1000


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        variant: Name of the variant.
        task: Name of the task.
        seed: The seed.
        arguments: The arguments of `run_glue_ctcd.py`, without the seed, the output folder and what is tuned.
        trials: The runs that choose the tuned arguments.
        tried: The tuned arguments of a trial; `None` for a run of the study itself.
        others: The cells whose models this one starts from, by the name of the variant.
        selects: Name of the model by whose score a trial is chosen.
    """

    variant: str
    task: str
    seed: int
    arguments: Mapping[str, Any] = field(hash=False)
    trials: tuple["Cell", ...] = ()
    tried: tuple[tuple[str, Any], ...] | None = None
    others: Mapping[str, "Cell"] = field(default_factory=dict, hash=False)
    selects: str = STUDENT

    @property
    def sources(self) -> tuple["Cell", ...]:
        """The cells that must be finished before this one."""
        return (*self.trials, *self.others.values())

    @property
    def name(self) -> str:
        """The cell as the log names it."""
        tried = "".join(f", {name}={value}" for name, value in self.tried or ())
        return f"{self.task}, {self.variant}, seed {self.seed}{tried}"

    def folder(self, output: Path) -> Path:
        """Folder of the run."""
        trial = "" if self.tried is None else "-".join(["", *(f"{name}={value}" for name, value in self.tried)])
        return output / self.task / _as_name(self.variant) / f"seed-{self.seed}{_as_name(trial)}"

    def all_arguments(self, output: Path) -> dict[str, Any]:
        """The arguments of `run_glue_ctcd.py`, with the chosen ones, the seed and the output folder."""
        values = {**self.arguments, **dict(self.tried or ()), **self.chosen(output)}
        for name, value in values.items():
            if isinstance(value, str) and value.startswith("@"):
                other, slash, part = value[1:].partition("/")
                values[name] = f"{self.others[other].folder(output)}{slash}{part}"
        if self.tried is not None and "test_file" in values:  # the validation rows, which come first, are enough
            with open(values["validation_file"]) as file:
                values["max_predict_samples"] = sum(1 for _ in file)
        return {**values, "seed": self.seed, "output_dir": str(self.folder(output))}

    def chosen(self, output: Path) -> dict[str, Any]:
        """The tuned arguments of the trial with the best main metric on the validation set, by its loss if equal."""
        if not self.trials:
            return {}

        def quality(trial: "Cell") -> tuple[float, float]:
            found = json.loads((trial.folder(output) / SCORES).read_text())[VALIDATION][self.selects]
            return found["score"], -found["nll"]

        return dict(max(self.trials, key=quality).tried)

    def check_arguments(self, output: Path) -> None:
        """Raise `ValueError` if the finished run of this cell had other arguments."""
        folder, ours = self.folder(output), self.all_arguments(output)
        theirs = json.loads((folder / ARGUMENTS).read_text())
        if different := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
            name = different[0]
            raise ValueError(
                f"'{folder}' holds a run with {name}={theirs.get(name)!r}, and the study has {ours.get(name)!r}: "
                "remove the folder and its line of the results, or give another --output."
            )


@dataclass(frozen=True)
class Study:
    """The content of a YAML file; `${NAME}` in a value stands for a variable of the environment.

    Attributes:
        common: Arguments of `run_glue_ctcd.py` for all runs.
        tasks: Further ones, by name of the task.
        variants: Further ones, by name of the variant. `tune` maps arguments to the values that are tried, and
            `select` names the model that chooses among them (`student`, or `teacher`).
        seeds: The seeds.
    """

    common: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]

    def arguments(self, variant: str, task: str) -> dict[str, Any]:
        """The arguments of `run_glue_ctcd.py`, without seed and output folder; the variant overrides the task."""
        own = {name: value for name, value in self.variants[variant].items() if name not in ("tune", "select")}
        values = {**DEFAULTS, **self.common, **self.tasks[task], **own}
        return {name: os.path.expandvars(value) if isinstance(value, str) else value for name, value in values.items()}

    def cells(self) -> Iterator[Cell]:
        """All cells, ordered by seed, then by variant, then by task; the ones that others need come before them."""
        made: dict[tuple[Any, ...], Cell] = {}

        def cell(variant: str, task: str, seed: int, tried: tuple[tuple[str, Any], ...] | None = None) -> Cell:
            key = (variant, task, seed, tried)
            if key not in made:
                arguments, tune = self.arguments(variant, task), self.variants[variant].get("tune", {})
                named = {v[1:].partition("/")[0] for v in arguments.values() if isinstance(v, str) and v[:1] == "@"}
                others = {name: cell(name, task, seed) for name in sorted(named)}
                trials = ()
                if tune and tried is None:
                    values = itertools.product(*tune.values())
                    trials = tuple(
                        cell(variant, task, TUNING_SEED, tuple(zip(tune, each, strict=True))) for each in values
                    )
                selects = self.variants[variant].get("select", STUDENT)
                made[key] = Cell(variant, task, seed, arguments, trials, tried, others, selects)
            return made[key]

        for seed, variant, task in itertools.product(self.seeds, self.variants, self.tasks):
            cell(variant, task, seed)
        yield from made.values()


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: A variable is not set, a part is missing or unknown, or two variants have one folder.
    """
    values = yaml.safe_load(path.read_text())
    if missing := sorted({*re.findall(r"\$\{(\w+)\}", str(values))} - {*os.environ}):
        raise ValueError(f"{path} reads {missing[0]} from the environment, and it is not set: export {missing[0]}=...")
    names = set(Study.__dataclass_fields__)
    if wrong := sorted(names ^ set(values)):
        raise ValueError(f"{path}: {wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}.")
    study = Study(**values)
    if TUNING_SEED in study.seeds:
        raise ValueError(f"{path}: the seed {TUNING_SEED} is that of the trials. Choose other seeds.")
    for variant, task in itertools.product(study.variants, study.tasks):
        for name, value in study.arguments(variant, task).items():
            if isinstance(value, str) and value[:1] == "@" and value[1:].partition("/")[0] not in study.variants:
                raise ValueError(f"{path}: `{name}: {value}` of {variant!r} names no variant: {list(study.variants)}.")
    folders: dict[Path, str] = {}
    for cell in study.cells():
        if (other := folders.setdefault(cell.folder(Path()), cell.variant)) != cell.variant:
            raise ValueError(f"{path}: {other!r} and {cell.variant!r} have one folder. Rename one.")
    return study


def record_of(
    cell: Cell, metrics: Mapping[str, Any], study: Study, scores: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The line of a finished run in the results: its place in the study, its variant, and both models' scores.

    Args:
        cell: The run.
        metrics: Its `all_results.json`.
        study: The study.
        scores: Scores of the logits of each part of the data, if the study has test files.
    """
    record = {
        "variant": cell.variant,
        "task": cell.task,
        "seed": cell.seed,
        "choice": dict(study.variants[cell.variant]),
        "train_rows": metrics["train_samples"],
        TEACHER: metrics_of(metrics, TEACHER),
        STUDENT: metrics_of(metrics, STUDENT),
    }
    if scores is None:
        return record
    tuned = dict(cell.tried or ())
    return {**record, "trial": tuned, "scores": dict(scores)}
