"""Scores of the models, of their mixture and of their soft losses, from the measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..graph import TEACHER, Edge
from ..losses.reliability import trusted_weight
from ..soft_losses import Bernoulli, Point
from .measuring import CELLS, SHARES, TEMPERATURES, Measurements

_FOLDS = 5
_RESAMPLES = 1000


class Gain(NamedTuple):
    """An improvement (positive is better) with its 95 % interval, by a paired bootstrap over the rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class ModelScores:
    """One model on the held-out rows. Scores that its kind of predictions does not have are `None`.

    Attributes:
        loss: Mean loss of an item: negative log-likelihood in nats, or squared error of numbers.
        temperature: The temperature at which its loss is least.
        scaled_loss: The loss with a temperature that was chosen on other rows (5-fold cross-validation).
        accuracy: Share of the items whose labels are all predicted.
        squared_error: Mean Brier score, from 0 to 2, or squared error of numbers.
        calibration_error: Expected calibration error, with 15 bins, of one class of several.
        label_share: Mean probability of the label, its share in the model's soft targets.
        training_loss: The loss on training rows.
        training_label_share: `label_share` on training rows.
    """

    loss: float
    squared_error: float
    temperature: float | None = None
    scaled_loss: float | None = None
    accuracy: float | None = None
    calibration_error: float | None = None
    label_share: float | None = None
    training_loss: float | None = None
    training_label_share: float | None = None


@dataclass(frozen=True)
class Mixture:
    """The mixture of both predictions, by the teacher's share in it.

    Attributes:
        shares: The teacher's shares, from 0 (the student alone) to 1 (the teacher alone).
        losses: The mean loss at each share.
        accuracies: The accuracy at each share; `None` for numbers.
        best_share: The share at which the loss is least.
        gain: How much smaller the loss is than that of the better model. Share and better model are chosen on other
            rows (5-fold cross-validation).
        accuracy_gain: The same of the accuracy, at the same share.
    """

    shares: Sequence[float]
    losses: Sequence[float]
    best_share: float
    gain: Gain
    accuracies: Sequence[float] | None = None
    accuracy_gain: Gain | None = None


@dataclass(frozen=True)
class EdgeScores:
    """A soft loss (KL at temperature 1) from one model to the other.

    Attributes:
        soft_loss: Its mean value.
        cells: By source right (T) or wrong (F) x learner right or wrong: the share of the items, and their mean soft
            loss (`None` without items). `TF`: the source is right and the learner wrong. Empty for numbers.
        smoothing: The share of the whole target, label and prediction, that is on wrong classes at the weight of the
            diagnosis; label smoothing of this strength is the control.
        training_smoothing: The same on training rows.
        trusted_weight: The best weight beside a hard loss of weight 1, from 0 to 1; see `trusted_weight`.
    """

    soft_loss: float
    trusted_weight: float
    cells: dict[str, tuple[float, float | None]]
    smoothing: float | None = None
    training_smoothing: float | None = None


def chance_loss(found: Measurements) -> float:
    """Compute the loss of the frequencies of the labels, or of the mean of numbers, as the prediction."""
    if isinstance(found.family, Point):
        return float(found.family.chance_error(found.labels))
    if isinstance(found.family, Bernoulli):
        present = found.labels.double().nanmean(0)
        return float(
            torch.stack([present, 1 - present]).xlogy(torch.stack([present, 1 - present])).sum(0).mean().neg()
        )
    shares = found.labels.flatten().bincount() / len(found.labels)
    return float(-shares.double().xlogy(shares).sum())


def model_scores(name: str, found: Measurements, training: Measurements | None) -> ModelScores:
    """Score one model on held-out rows and, if there are any, on training rows."""
    scaled = found.sums.get(f"{name}_scaled")
    calibration, label = found.mean(f"{name}_calibration"), found.mean(f"{name}_label")
    right = found.mean("mixture_right")
    trained = {} if training is None else {"training_loss": float(training.mean(f"{name}_loss")[0])}
    if trained and label is not None:
        trained["training_label_share"] = float(training.mean(f"{name}_label")[0])
    return ModelScores(
        loss=float(found.mean(f"{name}_loss")[0]),
        squared_error=float(found.mean(f"{name}_error")[0]),
        temperature=None if scaled is None else TEMPERATURES[scaled.sum(0).argmin()],
        scaled_loss=None
        if scaled is None
        else float(_taken(scaled, _chosen(scaled)).sum() / found.sums["items"].sum()),
        accuracy=None if right is None else float(right[SHARES.index(float(name == TEACHER))]),
        calibration_error=None if calibration is None else float(np.abs(calibration).sum()),
        label_share=None if label is None else float(label[0]),
        **trained,
    )


def mixture_of(found: Measurements) -> Mixture:
    """Score the mixture of both models."""
    losses, rights, items = found.sums["mixture_loss"], found.sums.get("mixture_right"), found.sums["items"][:, 0]
    chosen = _chosen(losses)
    alone = losses[:, [0, -1]]
    accuracy_gain = None
    if rights is not None:
        accuracy_gain = _gain(_taken(rights, chosen) - _taken(rights[:, [0, -1]], _chosen(-rights[:, [0, -1]])), items)
    return Mixture(
        shares=SHARES,
        losses=found.mean("mixture_loss").tolist(),
        best_share=SHARES[losses.sum(0).argmin()],
        gain=_gain(_taken(alone, _chosen(alone)) - _taken(losses, chosen), items),
        accuracies=None if rights is None else found.mean("mixture_right").tolist(),
        accuracy_gain=accuracy_gain,
    )


def edge_scores(edge: Edge, weight: float, found: Measurements, training: Measurements | None) -> EdgeScores:
    """Score the soft loss of an edge."""
    soft, shares = found.mean(edge.loss_name), found.mean("cells")
    cells = {}
    if shares is not None:
        swapped = [cell if edge.source == TEACHER else cell[::-1] for cell in CELLS]  # measured: teacher x student
        cells = {c: (float(n), float(s / n) if n else None) for c, n, s in zip(swapped, shares, soft, strict=True)}
    weight *= found.labels_of_item  # the hard loss of several labels is their mean, and the soft loss their sum

    def smoothing(measured: Measurements | None) -> float | None:
        label = measured and measured.mean(f"{edge.source}_label")
        return None if label is None else float(weight / (1 + weight) * (1 - label[0]))

    errors = (float(found.mean(name)[0]) for name in (f"{edge.source}_error", f"{edge.learner}_error", "product"))
    return EdgeScores(
        soft_loss=float(soft.sum()),
        trusted_weight=trusted_weight(
            *errors, float(found.family.chance_error(found.labels)), hard_weight=1.0 / found.labels_of_item
        ),
        cells=cells,
        smoothing=smoothing(found),
        training_smoothing=smoothing(training),
    )


def _chosen(losses: np.ndarray) -> np.ndarray:
    """Choose for each row `(rows,)` the column of `(rows, columns)` whose sum over the other folds is least."""
    folds = np.random.default_rng(0).permutation(len(losses)) % _FOLDS
    best = np.array([losses[folds != fold].sum(0).argmin() for fold in range(_FOLDS)])
    return best[folds]


def _taken(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Take one column of each row."""
    return values[np.arange(len(values)), columns]


def _gain(sums: np.ndarray, items: np.ndarray) -> Gain:
    """The mean over all items of sums over the items of each row, and its interval by a bootstrap over the rows."""
    random, means = np.random.default_rng(0), []
    for _ in range(_RESAMPLES):
        rows = random.integers(len(sums), size=len(sums))
        means.append(sums[rows].sum() / items[rows].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Gain(float(sums.sum() / items.sum()), float(low), float(high))


def agreement_of(decisions: np.ndarray | None) -> tuple[float | None, float | None]:
    """Compute agreement and Cohen's kappa of decisions `(2, items, decisions)`."""
    if decisions is None:
        return None, None
    agreement = float((decisions[0] == decisions[1]).mean())
    counts = [[np.bincount(c, minlength=int(decisions.max()) + 1) for c in each.T.astype(int)] for each in decisions]
    by_chance = float(np.mean([a @ b for a, b in zip(*counts, strict=True)])) / decisions.shape[1] ** 2
    return agreement, (agreement - by_chance) / (1 - by_chance) if by_chance < 1 else float(agreement == 1)
