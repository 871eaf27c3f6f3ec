"""The cells of a grid: each is one training, described completely, with a key that is a hash of the description."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ctcd_trainer.graph import EDGES, MODES, PRETRAINED, STUDENT, TEACHER, Edge, Mode

MLM = "mlm"
#: Fields that are real numbers: 2 and 2.0 are one training.
_NUMBERS = ("learning_rate", "epochs", "student_learning_rate", "weight_decay", "warmup_ratio", "hard_weight")
_NUMBERS += ("soft_weight", "teacher_soft_weight", "temperature", "soft_warmup_ratio")
#: Must change when the same description begins to mean another training.
FORMAT = 1


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        mode: The `distillation_mode`.
        without: Edges of the mode that get weight 0.
    """

    mode: str
    without: tuple[Edge, ...] = ()

    @property
    def graph(self) -> Mode:
        """The trained models and the edges."""
        mode = MODES[self.mode]
        return Mode(mode.trained, tuple(edge for edge in mode.edges if edge not in self.without))

    @property
    def frozen(self) -> tuple[str, ...]:
        """The models of the pair that are not trained."""
        return tuple(name for name in (TEACHER, STUDENT) if name not in self.graph.trained)

    @property
    def uses_pretrained(self) -> bool:
        """True if there is a frozen teacher outside of the pair."""
        return any(edge.source == PRETRAINED for edge in self.graph.edges)


#: The methods of the paper (arXiv 2311.02849, section 3), their baselines, and each direction alone.
METHODS: Mapping[str, Method] = {
    "alone": Method("standalone"),
    "kd": Method("kd"),
    "reversed": Method("reversed"),
    "ctcd": Method("ctcd"),
    "student-from-teacher": Method("ctcd", without=EDGES[1:2]),
    "teacher-from-student": Method("ctcd", without=EDGES[:1]),
    "community": Method("community"),
    "community-kd": Method("community", without=EDGES[:2]),
}


@dataclass(frozen=True)
class Cell:
    """One training and how it is scored.

    Attributes:
        task: `mlm`, or a GLUE task.
        method: A key of `METHODS`.
        seed: Seed of new weights, of the order of the data, of the masks and of dropout.
        batch_size: Rows of a step.
        learning_rate: Peak learning rate, of both models unless the student has its own.
        steps: Number of optimizer steps; or
        epochs: Number of passes over the training rows.
        rows: The first training rows that are used; `None` for all.
        student_learning_rate: Peak learning rate of the student; `None` for the same.
        weight_decay: Weight decay of both.
        warmup_ratio: Share of the steps over which the learning rate rises; then it falls linearly to 0.
        bf16: Whether to train under bf16 autocast.
        teacher_init: `pretrained`, or `scratch` for random weights.
        student_init: `pretrained` (cut from the pre-trained teacher), or `scratch`.
        hard_weight: Weight of every hard loss.
        soft_weight: Weight of every soft loss.
        teacher_soft_weight: Weight of the soft losses that train the teacher; `None` for the same.
        temperature: Temperature of the soft losses.
        soft_warmup_ratio: Share of the steps over which the soft weights rise.
        pretrained_teacher: The frozen teacher of the community methods: `alone` for the teacher trained alone with the
            same settings and seed, `prepared` for the model that was prepared for it.
        start: The pre-training whose models this one starts from; `None` for the initial models.
        learner: The one model of `start` that is trained, by itself; `None` for the pair.
    """

    task: str
    method: str
    seed: int
    batch_size: int
    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    rows: int | None = None
    student_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    bf16: bool = False
    teacher_init: str = "pretrained"
    student_init: str = "pretrained"
    hard_weight: float | None = 1.0
    soft_weight: float | None = 1.0
    teacher_soft_weight: float | None = None
    temperature: float | None = 1.0
    soft_warmup_ratio: float | None = 0.0
    pretrained_teacher: str | None = "alone"
    start: "Cell | None" = None
    learner: str | None = None

    def __post_init__(self) -> None:
        """Give each training a single description: fields that the method does not use become `None`.

        Raises:
            ValueError: A value is not valid, or two contradict each other.
        """
        if self.method not in METHODS:
            raise ValueError(f"`method: {self.method}` is unknown. Valid values: {', '.join(METHODS)}.")
        for name in _NUMBERS:
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, None if value is None else float(value))
            except (TypeError, ValueError) as error:
                raise ValueError(f"`{name}: {value!r}` is no number (YAML wants a dot: 5.0e-4).") from error
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"A cell has either `steps` ({self.steps}) or `epochs` ({self.epochs}): give one of them."
            )
        for name, valid in {
            "teacher_init": ("pretrained", "scratch"),
            "student_init": ("pretrained", "scratch"),
            "pretrained_teacher": ("alone", "prepared", None),
            "learner": (TEACHER, STUDENT, None),
        }.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"`{name}: {getattr(self, name)}` is unknown. Valid values: {', '.join(map(str, valid))}."
                )
        if self.learner is not None and self.method != "alone":
            raise ValueError(f"One model by itself is trained `alone`, not by `method: {self.method}`.")
        graph = METHODS[self.method].graph
        unused = []
        if not graph.edges:
            unused += ["hard_weight", "soft_weight", "temperature", "soft_warmup_ratio"]
        if not any(edge.learner == TEACHER for edge in graph.edges):
            unused += ["teacher_soft_weight"]
        if not METHODS[self.method].uses_pretrained:
            unused += ["pretrained_teacher"]
        if self.teacher_soft_weight == self.soft_weight:
            unused += ["teacher_soft_weight"]
        if self.student_learning_rate == self.learning_rate or self.learner is not None:
            unused += ["student_learning_rate"]
        for name in unused:
            object.__setattr__(self, name, None)

    @property
    def arguments(self) -> dict[str, Any]:
        """The training arguments of the distillation."""
        method = METHODS[self.method]
        if self.method == "alone":
            return {"distillation_mode": method.mode}
        arguments: dict[str, Any] = {
            "distillation_mode": method.mode,
            "temperature": self.temperature,
            "soft_warmup_ratio": self.soft_warmup_ratio,
        }
        arguments |= {f"{learner}_hard_weight": self.hard_weight for learner in method.graph.trained}
        for edge in MODES[method.mode].edges:
            own = self.teacher_soft_weight if edge.learner == TEACHER else None
            weight = self.soft_weight if own is None else own
            arguments[edge.weight_name] = 0.0 if edge in method.without else weight
        return arguments

    @property
    def alone(self) -> "Cell":
        """The same training without soft losses: the baseline, and the source of frozen models."""
        return replace(self, method="alone")

    @property
    def sources(self) -> tuple["Cell", ...]:
        """The cells whose models this cell needs."""
        method = METHODS[self.method]
        needs_alone = method.frozen or self.pretrained_teacher == "alone"
        return tuple(cell for cell in (self.start, self.alone if needs_alone else None) if cell is not None)

    @property
    def trained(self) -> tuple[str, ...]:
        """The models that the cell trains."""
        return METHODS[self.method].graph.trained if self.learner is None else (self.learner,)

    def key(self, fingerprints: Mapping[str, str]) -> str:
        """Hash of the description and of the data and initial models.

        Unused fields and defaults do not count, so a new field changes no key.

        Args:
            fingerprints: Hashes of the prepared files, by task, and of the `models`.
        """
        defaults = {field.name: field.default for field in fields(self)}
        values = {
            name: value
            for name, value in self.describe(fingerprints).items()
            if value is not None and value != defaults.get(name)
        }
        data = values.pop("data").split("-")
        text = json.dumps([FORMAT, values, data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """All fields as JSON values, with the key of `start` in its place, and the hash of the data and models."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        start = None if self.start is None else self.start.key(fingerprints)
        return values | {"start": start, "data": f"{fingerprints[self.task]}-{fingerprints['models']}"}

    def num_steps(self, num_rows: int) -> int:
        """Number of optimizer steps.

        Args:
            num_rows: Number of prepared training rows.
        """
        if self.steps is not None:
            return self.steps
        rows = num_rows if self.rows is None else min(self.rows, num_rows)
        return math.ceil(rows * self.epochs / self.batch_size)


def expand(grid: Sequence[Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """All cells of a grid, each after the cells that it needs.

    Args:
        grid: Blocks with fields of `Cell`, and `then`, the GLUE tasks on which every resulting model is fine-tuned
            alone. A list of values makes a cell per value.
        defaults: Values of the fields that a block leaves out: `mlm` for pre-training, `finetuning` for one model
            by itself, `cotraining` for a pair on a GLUE task.

    Raises:
        ValueError: A field is unknown or a value is not valid.
    """
    cells: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        for source in cell.sources:
            add(source)
        cells.setdefault(cell)

    for block in grid:
        tasks = block.get("then", [])
        for values in _product({name: value for name, value in block.items() if name != "then"}):
            kind = MLM if values.get("task") == MLM else "cotraining"
            cell = _cell(defaults.get(kind, {}) | values)
            add(cell)
            for task in tasks:
                for learner in cell.trained:
                    settings = {"task": task, "method": "alone", "seed": cell.seed, "start": cell, "learner": learner}
                    add(_cell(defaults.get("finetuning", {}) | settings))
    return list(cells)


def _product(block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    values = [value if isinstance(value, list) else [value] for value in block.values()]
    for combination in itertools.product(*values):
        yield dict(zip(block, combination, strict=True))


def _cell(values: Mapping[str, Any]) -> Cell:
    known = {field.name for field in fields(Cell)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"Unknown settings of a cell: {', '.join(unknown)}. Valid ones: {', '.join(sorted(known))}.")
    missing = sorted({"task", "method", "seed", "batch_size", "learning_rate"} - set(values))
    if missing:
        raise ValueError(f"A cell has no {', '.join(missing)}. Give it in the block of the grid or in the defaults.")
    return Cell(**values)
