"""Measure the predictions of two models for labelled rows, as sums over the items of a row: no logits are kept."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph import EDGES, LEARNERS
from ..soft_losses import Categorical, Family, Point
from ..tasks.base import Task

#: The temperatures by which logits are divided.
TEMPERATURES = tuple(2.0 ** (k / 4) for k in range(-8, 13))
#: The shares of the teacher in the mixtures.
SHARES = tuple(k / 20 for k in range(21))
#: The cells of the table right (T) or wrong (F) of the teacher x that of the student.
CELLS = ("TT", "TF", "FT", "FF")
#: The edges between the two models.
BETWEEN = tuple(edge for edge in EDGES if {edge.source, edge.learner} == set(LEARNERS))
#: Number of bins of the calibration error.
_BINS = 15
#: Logits of a language model that are looked at together.
_ELEMENTS = 2**22

#: Runs a model, by its name, on a batch.
RunModel = Callable[[str, Mapping[str, Any]], Any]


class Measurements:
    """Runs both models on all batches, and keeps what the diagnosis needs.

    Args:
        run: Runs a model.
        task: The task of both.
        batches: The batches, with labels.
        brief: Whether to measure only the losses and the probabilities of the labels.

    Attributes:
        sums: Sums over the items of each row that has a label, by name: fp64 `(rows, values)`.
        family: The meaning of the predictions.
        labels: The labels of all items, `(items, ...)`.
        decisions: The decisions of both models for all items, `(2, items, decisions)`; `None` for numbers.
        labels_of_item: As in `Family`.

    Raises:
        FloatingPointError: A model predicts NaN.
        ValueError: No row has a label.
    """

    def __init__(self, run: RunModel, task: Task, batches: Iterable[Mapping[str, Any]], brief: bool = False) -> None:
        tables, labels, decisions = [], [], []
        for batch in batches:
            with torch.no_grad():
                logits = [task.compared_logits(run(name, batch), batch) for name in LEARNERS]
            for name, z in zip(LEARNERS, logits, strict=True):
                if z.isnan().any():
                    raise FloatingPointError(f"The {name} predicts NaN for rows of the data. Check its weights.")
            table: dict[str, Tensor] = {}
            for family, part, targets, rows in _parts(task, logits, batch):
                there = ~family.nll(part[0], targets).isnan()
                for name, values in _scores(family, part, targets, brief).items():
                    zeros = torch.zeros(len(task.scored(batch)), values.shape[-1], dtype=torch.float64)
                    table.setdefault(name, zeros).index_add_(0, rows[there].cpu(), values[there].cpu().double())
                labels.append(targets[there].cpu())
                chosen = [family.predicted(z) for z in part]
                if chosen[0] is not None:
                    decisions.append(torch.stack([d.unsqueeze(-1)[there].flatten(1) for d in chosen]).cpu())
            if table:
                tables.append({name: sums[table["items"][:, 0] > 0] for name, sums in table.items()})
        self.labels = torch.cat(labels) if labels else torch.empty(0)
        if not len(self.labels):
            raise ValueError(
                "No row of the data has a label. A diagnosis compares predictions with labels: give labelled rows."
            )
        self.sums = {name: torch.cat([table[name] for table in tables]).numpy() for name in tables[0]}
        self.family = family
        self.labels_of_item = family.labels_of_item(part[0])
        self.decisions = torch.cat(decisions, dim=1).numpy() if decisions else None

    def mean(self, name: str) -> np.ndarray | None:
        """The mean over all items, `(values,)`; `None` if it was not measured."""
        return self.sums[name].sum(0) / self.sums["items"].sum() if name in self.sums else None


def _parts(
    task: Task, logits: Sequence[Tensor], batch: Mapping[str, Any]
) -> Iterator[tuple[Family, list[Tensor], Tensor, Tensor]]:
    """Yield the family, the logits of both, the labels, and the row of each item, for a part of a batch at a time."""
    family, labels = task.family(batch), task.targets(batch)
    if not task.language_model:  # all positions: the labels say which of them count
        shape = family.nll(logits[0], labels).shape
        rows = torch.arange(shape[0], device=labels.device).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        yield family, list(logits), labels, rows
        return
    scored = task.scored(batch)
    labels, rows = labels[scored], scored.nonzero()[:, 0]
    common = min(z.shape[-1] for z in logits)
    for at in torch.arange(len(labels)).split(max(1, _ELEMENTS // common)):
        yield family, [z[at, :common] for z in logits], labels[at], rows[at]


def _scores(family: Family, logits: Sequence[Tensor], labels: Tensor, brief: bool) -> dict[str, Tensor]:
    """Score the predictions of both models for each item, by name: `(..., values)`, NaN without a label."""
    numbers, single = isinstance(family, Point), isinstance(family, Categorical)
    nll = [family.nll(z, labels) for z in logits]
    scores = {"items": torch.ones_like(nll[0])[..., None]}
    for name, z, loss in zip(LEARNERS, logits, nll, strict=True):
        scores[f"{name}_loss"] = loss[..., None]
        if not numbers:
            scores[f"{name}_label"] = torch.exp(-loss)[..., None]
        if not numbers and not brief:
            scores[f"{name}_scaled"] = torch.stack([family.nll(z / t, labels) for t in TEMPERATURES], dim=-1)
    if brief:
        return scores
    probs = [family.probabilities(z if single else z.double()) for z in logits]
    losses, hits = [], []
    for share in SHARES:
        mixed = torch.lerp(probs[1], probs[0], share)
        if single:  # only the label's probability counts: a mixture of all logits would take long
            own = [math.log(a) - loss for a, loss in zip((share, 1 - share), nll, strict=True) if a > 0]
            losses.append(-torch.stack(own).logsumexp(0))
        else:
            mixed = mixed if numbers else mixed.logit(eps=1e-15)
            losses.append(family.nll(mixed, labels))
        hits.append(family.right(mixed, labels))
    scores["mixture_loss"] = torch.stack(losses, dim=-1)
    scores["product"] = family.error_product(*logits, labels)[..., None]
    cells = scores["items"]
    if not numbers:
        scores["mixture_right"] = torch.stack(hits, dim=-1).float()
        cells = scores["cells"] = F.one_hot(2 * (~hits[-1]).long() + (~hits[0]).long(), len(CELLS)).float()
    for name, z, hit in zip(LEARNERS, logits, (hits[-1], hits[0]), strict=True):
        scores[f"{name}_error"] = family.squared_error(z, labels)[..., None]
        if single:
            confidence = torch.exp(-family.nll(z, family.predicted(z)))
            bins = F.one_hot((confidence * _BINS).long().clamp(max=_BINS - 1), _BINS)
            scores[f"{name}_calibration"] = bins * (hit.float() - confidence)[..., None]
    for edge in BETWEEN:
        learner, source = (logits[LEARNERS.index(name)] for name in (edge.learner, edge.source))
        scores[edge.loss_name] = cells * family.soft_loss(learner, source, "kl", 1.0)[..., None]
    return scores
