"""The settings of an edge: schedules over the steps, gates over the items, and the argument `edges`.

A *schedule* is a factor of the edge's weight that depends on the step. A *gate* is a factor of each compared item,
from 0 to 1, that depends on the predictions. To add one, write a class and put it into `SCHEDULES` or `GATES`.
"""

import functools
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .graph import EDGES, ENSEMBLE, MADE_EDGES, Edge, Graph
from .soft_losses import SOFT_LOSSES, Family

#: The weight that follows from held-out rows.
AUTO = "auto"
#: The gate that lets everything through.
OPEN = "none"
#: The rows on which an edge can hold. In tasks that score tokens, every scored token is labelled.
ROWS = ("all", "labelled", "unlabelled")


# ---- Schedules ----


@dataclass(frozen=True)
class Schedule(ABC):
    """The factor of an edge's weight over the steps. Its fields are the numbers in its text, shares of the steps."""

    #: Example of the text that sets it, and what it does, for the help text of the arguments.
    form: ClassVar[str]
    summary: ClassVar[str]
    #: Whether the factor depends on the length of the training.
    timed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        numbers = [getattr(self, field.name) for field in fields(self)]
        if not all(0 <= number <= 1 for number in numbers) or any(a >= b for a, b in itertools.pairwise(numbers)):
            raise ValueError
        if self.timed and not numbers[-1]:  # over no steps
            raise ValueError

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor, from 0 to 1.

        Args:
            step: Number of optimizer steps that are complete.
            max_steps: Number of optimizer steps of the whole training; 0 if that is unknown, which gives 1.0.
        """
        return self._factor(step, max_steps) if max_steps else 1.0

    @abstractmethod
    def _factor(self, step: int, max_steps: int) -> float:
        """Return the factor if the length is known."""


@dataclass(frozen=True)
class _Constant(Schedule):
    form, summary = "constant", "1 at every step"
    timed = False

    def _factor(self, step: int, max_steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class _Rise(Schedule):
    form, summary = "rise:0.2", "rises linearly from 0 to 1 over the first 20 % of the steps"
    end: float

    def _factor(self, step: int, max_steps: int) -> float:
        steps = math.ceil(self.end * max_steps)
        return min(1.0, step / steps) if steps else 1.0


@dataclass(frozen=True)
class _Fall(Schedule):
    """As in Knowledge Inheritance (Qin et al., 2022)."""

    form, summary = "fall:0.44", "falls linearly from 1 to 0 over the first 44 % of the steps"
    end: float

    def _factor(self, step: int, max_steps: int) -> float:
        steps = math.ceil(self.end * max_steps)
        return max(0.0, 1.0 - step / steps) if steps else 0.0


@dataclass(frozen=True)
class _Window(Schedule):
    form, summary = "window:0.1-0.5", "1 from 10 % to 50 % of the steps, otherwise 0"
    start: float
    end: float

    def _factor(self, step: int, max_steps: int) -> float:
        return float(math.ceil(self.start * max_steps) <= step < math.ceil(self.end * max_steps))


@dataclass(frozen=True)
class BurnIn(Schedule):
    """0 until an evaluation opens the edge; the trainer asks `opens`, and remembers it."""

    form = "burn-in:0.1"
    summary = "0 until the source's held-out error is 10 % below that of the frequencies of the labels, then 1"
    timed = False
    lead: float

    def _factor(self, step: int, max_steps: int) -> float:
        return 1.0

    def opens(self, source_error: float, chance_error: float) -> bool:
        """Tell whether a source with this held-out error has learnt enough."""
        return source_error <= (1.0 - self.lead) * chance_error


#: The schedules by the first word of the text that sets them.
SCHEDULES: dict[str, type[Schedule]] = {
    "constant": _Constant,
    "rise": _Rise,
    "fall": _Fall,
    "window": _Window,
    "burn-in": BurnIn,
}


@functools.cache
def find_schedule(text: str) -> Schedule:
    """Read a schedule, such as `rise:0.2`; raises `ValueError` if there is no such schedule."""
    name, _, numbers = text.partition(":")
    try:
        cls = SCHEDULES[name]
        split = numbers.split("-") if len(fields(cls)) > 1 else [numbers] if numbers else []
        return cls(*map(float, split))
    except (KeyError, TypeError, ValueError):
        forms = ", ".join(schedule.form for schedule in SCHEDULES.values())
        raise ValueError(
            f"{text!r} is no schedule. Valid forms, with shares of the steps from 0 to 1 in place of these: {forms}."
        ) from None


def held_out_edges(graph: Graph) -> list[Edge]:
    """Return the edges that depend on held-out rows: `auto` ones, those with a burn-in, those of a fitted ensemble."""
    fitted = {ENSEMBLE} if graph.fits_members else set()
    return [e for e in graph.edges if e.auto or e.source in fitted or isinstance(find_schedule(e.schedule), BurnIn)]


# ---- Gates ----


class Scores:
    """The predictions of one model for the compared items, as gates see them. No gradient goes through them.

    Args:
        family: The meaning of the logits.
        logits: Logits `(items..., outputs)`.
        labels: The labels of the items; see `Family.nll`.
    """

    def __init__(self, family: Family, logits: Tensor, labels: Tensor) -> None:
        self._family, self._logits, self._labels = family, logits.detach(), labels

    @functools.cached_property
    def nll(self) -> Tensor:
        """The hard loss of each item, NaN without a label."""
        return self._family.nll(self._logits, self._labels)

    @functools.cached_property
    def right(self) -> Tensor:
        """Whether each item is predicted right."""
        return self._family.right(self._logits, self._labels)

    @functools.cached_property
    def confidence(self) -> Tensor:
        """1 minus the entropy over its maximum."""
        return self._family.confidence(self._logits)


class Gate(ABC):
    """The factor of each compared item of an edge."""

    #: Its effect, for the help text of the arguments.
    summary: ClassVar[str]
    #: Whether it is 0 for items without a label.
    needs_labels: ClassVar[bool] = True
    #: Whether it is defined for numbers, not only for classes.
    of_numbers: ClassVar[bool] = False

    @abstractmethod
    def value(self, learner: Scores, source: Scores) -> Tensor:
        """Return the factors `(items...)`, from 0 to 1; NaN counts as 0."""


class _Open(Gate):
    summary = "every item counts"
    needs_labels, of_numbers = False, True

    def value(self, learner: Scores, source: Scores) -> Tensor:
        return torch.ones(())


class _Correct(Gate):
    """As in Knowledge Transfer Graph (Minami et al., 2020)."""

    summary = "only items that the source predicts right"

    def value(self, learner: Scores, source: Scores) -> Tensor:
        return source.right.float()


class _WSL(Gate):
    """Weighted soft labels (Zhou et al., arXiv 2102.00650): the bias-variance trade-off of each item."""

    summary = "`1 - exp(-L / S)` with the hard losses L of the learner and S of the source"
    of_numbers = True

    def value(self, learner: Scores, source: Scores) -> Tensor:
        losses = source.nll
        return -torch.expm1(-learner.nll / losses.clamp(min=torch.finfo(losses.dtype).tiny))


class _Confident(Gate):
    summary = "1 minus the entropy of the source over the largest possible entropy"
    needs_labels = False

    def value(self, learner: Scores, source: Scores) -> Tensor:
        return source.confidence


#: The gates by the name that the arguments take.
GATES: dict[str, Gate] = {OPEN: _Open(), "correct": _Correct(), "wsl": _WSL(), "confident": _Confident()}


# ---- The argument `edges` ----


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_schedule(value: Any) -> bool:
    return isinstance(value, str) and find_schedule(value) is not None


#: The settings of an edge: what is valid, and how a message says it.
_SETTINGS = {
    "weight": (
        lambda value: value == AUTO or (_is_number(value) and value >= 0),
        f"a number of 0 or more, or {AUTO!r}",
    ),
    "schedule": (_is_schedule, ""),
    "gate": (lambda value: value in GATES, ", ".join(GATES)),
    "rows": (lambda value: value in ROWS, ", ".join(ROWS)),
    "temperature": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "soft_loss": (lambda value: value in SOFT_LOSSES, ", ".join(sorted(SOFT_LOSSES))),
}


def check_setting(setting: str, value: Any, argument: str) -> None:
    """Refuse a value of a setting of an edge; `argument` is the name in the message.

    Raises:
        ValueError: The value is not valid.
    """
    is_valid, valid = _SETTINGS[setting]
    try:
        if is_valid(value):
            return
    except (TypeError, ValueError) as error:  # an unhashable value; no schedule
        valid = valid or str(error)
    raise ValueError(f"`{argument}={value!r}` is not valid. Valid values: {valid or 'a text such as rise:0.2'}.")


def read_edges(edges: Mapping[str, Mapping[str, Any]] | str | None) -> dict[str, dict[str, Any]]:
    """Read the argument `edges`: settings by the name of the edge, `source->learner`, as a dict or as JSON.

    Raises:
        ValueError: It is no such dict, or an edge, a setting or a value is unknown. The message lists the valid ones.
    """
    try:
        given = json.loads(edges) if isinstance(edges, str) else edges or {}
        read = {name.replace(" ", ""): dict(settings) for name, settings in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"`edges={edges!r}` is not valid. Give settings by the name of the edge, as a dict or as JSON: "
            '{"student->teacher": {"weight": 0.3, "gate": "wsl"}}.'
        ) from None
    for kind, names, known in (
        ("edge", read, [edge.arrow for edge in (*EDGES, *MADE_EDGES)]),
        ("setting", [name for settings in read.values() for name in settings], list(_SETTINGS)),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"`edges` has the unknown {kind} {unknown[0]!r}. Valid names: {', '.join(known)}.")
    for name, settings in read.items():
        for setting, value in settings.items():
            check_setting(setting, value, f"edges[{name!r}][{setting!r}]")
    return read


def setting_of(edge: Edge, setting: str, edges: Mapping[str, Mapping[str, Any]], shorthand: Any) -> Any:
    """Return a setting of an edge, from the argument `edges` or from the argument of its own; `None` if not given.

    Raises:
        ValueError: Both are given, and they differ.
    """
    value = edges.get(edge.arrow, {}).get(setting)
    if None not in (value, shorthand) and value != shorthand:
        raise ValueError(
            f"`{edge.name}_{setting}={shorthand!r}` contradicts `edges[{edge.arrow!r}][{setting!r}]={value!r}`. "
            "Leave out one of them."
        )
    return shorthand if value is None else value


# ---- The ensemble ----

#: The ways to take the mean of several predictions, with their meaning.
POOLS: dict[str, str] = {
    "logits": "the mean of the logits",
    "probabilities": "the mean of the probabilities",
}


def read_members(ensemble: Mapping[str, float] | str | None) -> dict[str, float] | str | None:
    """Read the argument `ensemble`: the weights of the members by name, as a dict or as JSON, or "auto".

    Raises:
        ValueError: It is neither, or a weight is negative, or all are 0.
    """
    if ensemble is None or ensemble == AUTO:
        return ensemble
    try:
        read = dict(json.loads(ensemble) if isinstance(ensemble, str) else ensemble)
    except (TypeError, ValueError):
        read = {}
    if not all(_is_number(weight) and weight >= 0 for weight in read.values()) or not sum(read.values()):
        raise ValueError(
            f"`ensemble={ensemble!r}` is not valid. Give the weights of the members by name, as a dict or as JSON: "
            f'{{"teacher": 0.7, "student": 0.3}}; or {AUTO!r}.'
        )
    return read


def fitted_members(products: Mapping[tuple[str, str], float], names: Sequence[str]) -> dict[str, float]:
    """The weights of a mean of predictions with the least squared error on held-out items (KDCL-Linear).

    Guo et al. 2020, *Online Knowledge Distillation via Collaborative Learning*, section 3.

    Args:
        products: Means of the scalar products of the errors of two models by their names.
        names: The members, at most ten.

    Returns:
        The weights, 0 or more, with the sum 1.
    """
    errors = torch.tensor(
        [[products[(p, q) if (p, q) in products else (q, p)] for q in names] for p in names], dtype=torch.float64
    )
    best, least = torch.eye(len(names), dtype=torch.float64)[int(errors.diagonal().argmin())], errors.diagonal().min()
    for size in range(2, len(names) + 1):
        for members in map(list, itertools.combinations(range(len(names)), size)):
            # At the minimum over the members, without regard to signs, all have one product with the mean's error.
            inner = errors[members][:, members]
            ones = torch.ones(size, 1, dtype=torch.float64)
            weights = torch.linalg.lstsq(inner, ones, driver="gelsd").solution[:, 0]
            weights = weights / weights.sum()
            error = weights @ inner @ weights
            if bool((weights >= 0).all()) and error < least:
                best, least = torch.zeros(len(names), dtype=torch.float64), error
                best[members] = weights
    return dict(zip(names, best.tolist(), strict=True))
