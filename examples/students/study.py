"""A study: named variants of the arguments of `run_glue_ctcd.py`, each with several tasks and seeds."""

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


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        variant: Name of the variant.
        task: Name of the task.
        seed: The seed.
        arguments: The arguments of `run_glue_ctcd.py`, without the seed and the output folder.
    """

    variant: str
    task: str
    seed: int
    arguments: Mapping[str, Any] = field(hash=False)

    @property
    def sources(self) -> tuple["Cell", ...]:
        """No cell needs another one."""
        return ()

    def folder(self, output: Path) -> Path:
        """Folder of the run."""
        return output / self.task / re.sub(r"[^\w.-]+", "-", self.variant) / f"seed-{self.seed}"

    def all_arguments(self, output: Path) -> dict[str, Any]:
        """The arguments of `run_glue_ctcd.py`, with the seed and the output folder."""
        return {**self.arguments, "seed": self.seed, "output_dir": str(self.folder(output))}

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
        variants: Further ones, by name of the variant.
        seeds: The seeds.
    """

    common: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]

    def arguments(self, variant: str, task: str) -> dict[str, Any]:
        """The arguments of `run_glue_ctcd.py`, without seed and output folder; the variant overrides the task."""
        values = {**DEFAULTS, **self.common, **self.tasks[task], **self.variants[variant]}
        return {name: os.path.expandvars(value) if isinstance(value, str) else value for name, value in values.items()}

    def cells(self) -> Iterator[Cell]:
        """All cells, ordered by seed, then by variant, then by task."""
        for seed, variant, task in itertools.product(self.seeds, self.variants, self.tasks):
            yield Cell(variant, task, seed, self.arguments(variant, task))


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
    folders: dict[Path, str] = {}
    for cell in study.cells():
        if (other := folders.setdefault(cell.folder(Path()), cell.variant)) != cell.variant:
            raise ValueError(f"{path}: {other!r} and {cell.variant!r} have one folder. Rename one.")
    return study


def record_of(cell: Cell, metrics: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """The line of a finished run in the results: its place in the study, its variant, and both models' scores."""
    return {
        "variant": cell.variant,
        "task": cell.task,
        "seed": cell.seed,
        "choice": dict(study.variants[cell.variant]),
        "train_rows": metrics["train_samples"],
        TEACHER: metrics_of(metrics, TEACHER),
        STUDENT: metrics_of(metrics, STUDENT),
    }
