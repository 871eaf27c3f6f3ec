"""A scale of the protocol, read from a YAML file: data, models, and the grid of cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Text:
    """A data set of text for masked language modelling.

    Attributes:
        path: Folder or name of a data set, as `load_dataset` takes it.
        name: Configuration of the data set.
        column: Column of text.
        texts: Number of the first training texts, which are used; `None` for all.
        validation_split: Its split that is scored. If no data set has any, part of the training texts is scored.
    """

    path: str
    name: str | None = None
    column: str = "text"
    texts: int | None = None
    validation_split: str | None = "validation"


@dataclass(frozen=True)
class Models:
    """The two models before any training.

    Attributes:
        source: Folder or name of the model whose weights, config and tokenizer are used.
        teacher: Settings of the config in which the teacher differs.
        student: Settings of the config in which the student differs from the teacher.
        pretrained_teacher: Folder or name of the frozen teacher of `pretrained_teacher: prepared`.
        vocab_size: Size of a new tokenizer, trained on the text, for models from scratch; `None` for the source's own.
    """

    source: str
    teacher: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)
    pretrained_teacher: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Scale:
    """Everything that a YAML file says.

    Attributes:
        name: Name of the scale.
        text: The data sets of text for masked language modelling.
        glue: Folder or name of the GLUE data set.
        tasks: The GLUE tasks, with `max_length` in tokens and `train_rows` (drawn at random), both optional.
        models: The models.
        block_length: Number of tokens of a row of text.
        train_blocks: Number of training rows of text; `None` for all.
        score_blocks: Number of rows of each of the two scored sets of text: for choosing, and for the results.
        dev_share: Share of the training rows of a GLUE task that is kept for choosing.
        curve_rows: Number of the rows of validation text that are scored during a pre-training.
        evaluations: How often that is done.
        checkpoints: How often a training is saved.
        defaults: See `cells.expand`.
        grid: See `cells.expand`.

    How often to evaluate is no part of a cell's key, but evaluations draw random numbers as well: do not change it in
    the middle of a grid.
    """

    name: str
    text: Sequence[Text]
    glue: str
    tasks: Mapping[str, Mapping[str, int]]
    models: Models
    grid: Sequence[Mapping[str, Any]]
    block_length: int = 128
    train_blocks: int | None = None
    score_blocks: int = 256
    dev_share: float = 0.1
    curve_rows: int = 64
    evaluations: int = 8
    checkpoints: int = 4
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_scale(path: Path) -> Scale:
    """Read a YAML file.

    Raises:
        ValueError: A setting is unknown or missing.
    """
    values = yaml.safe_load(path.read_text())
    values["text"] = [_make(Text, each, f"{path}: text") for each in values.get("text") or []]
    values["models"] = _make(Models, values.get("models") or {}, f"{path}: models")
    return _make(Scale, values, str(path))


def _make(cls: type, values: Mapping[str, Any], place: str) -> Any:
    known = {item.name for item in fields(cls)}
    if set(values) - known:
        raise ValueError(
            f"{place}: unknown settings {sorted(set(values) - known)}. Valid ones: {', '.join(sorted(known))}."
        )
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{place}: {error}. Add what is missing.") from error
