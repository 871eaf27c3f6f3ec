"""Soft losses: how the predictions of one model are compared with those of another.

A *soft loss* compares two predictions, and knows its value and its gradient in closed form: to add one, write a
`SoftLoss` class and put it into `SOFT_LOSSES`. A *prediction family* says what a head's logits mean (one of several
classes, several yes/no labels, a number). A family returns one value per position, not reduced, in fp32 (or fp64 if
the logits are), already multiplied by the square of the temperature (Hinton et al. 2015, section 2), so that the
gradient keeps its scale. Language models go through `losses/fused_linear.py`, which applies the temperature itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn import functional as F

#: Returns memory of the shape and dtype of a tensor, its content undefined.
Buffer = Callable[[Tensor], Tensor]


class Prediction(NamedTuple):
    """Log-probabilities `(rows, outcomes)` and their exponentials, or the logits if the loss is one `of_logits`."""

    outcomes: Tensor
    probs: Tensor | None = None


class ClosedForm(NamedTuple):
    """Value `(rows,)` of a soft loss, and its gradient for the learner's logits divided by the temperature.

    The gradient is `probs_factor * p + factor * term`. The learner's probabilities `p` are a separate part because the
    caller has them already. `term` `(rows, outcomes)` is a buffer, or the probabilities of a prediction.
    """

    value: Tensor
    term: Tensor
    factor: float = 1.0
    probs_factor: float = 0.0


class SoftLoss(ABC):
    """A comparison of two predictions: a sum over the outcomes, or a mean."""

    #: Description of the loss, for the help text of the argument `soft_loss`.
    summary: ClassVar[str]
    #: True if logits are compared, not log-probabilities; the temperature has no effect then.
    of_logits: ClassVar[bool] = False
    #: True if the sum that `value` returns is to be divided by the number of outcomes.
    averaged: ClassVar[bool] = False

    @abstractmethod
    def value(self, learner: Tensor, source: Tensor) -> Tensor:
        """The loss `(...)`, a differentiable sum over the outcomes.

        Args:
            learner: Log-probabilities (or logits, if `of_logits`) `(..., outcomes)` of the model that is trained.
            source: Those of the model it learns from.
        """

    @abstractmethod
    def closed_form(self, learner: Prediction, source: Prediction, buffer: Buffer) -> ClosedForm:
        """The same value with its gradient, without autograd and with no new memory.

        The predictions must not be changed. `buffer` gives the memory for results (`out=`).
        """


class _KL(SoftLoss):
    """The soft loss of arXiv 2311.02849. Its gradient is `q - r` (learner's minus source's probabilities)."""

    summary = "KL(source || learner)"

    def value(self, learner: Tensor, source: Tensor) -> Tensor:
        return _kl(learner, source)

    def closed_form(self, learner: Prediction, source: Prediction, buffer: Buffer) -> ClosedForm:
        difference = torch.sub(source.outcomes, learner.outcomes, out=buffer(learner.outcomes))
        return ClosedForm(vecdot(source.probs, difference), source.probs, factor=-1.0, probs_factor=1.0)


class _ReverseKL(SoftLoss):
    """Mode-seeking, as in MiniLLM (arXiv 2306.08543). Its gradient is `q (log q - log r - KL(q || r))`."""

    summary = "KL(learner || source)"

    def value(self, learner: Tensor, source: Tensor) -> Tensor:
        return _kl(source, learner)

    def closed_form(self, learner: Prediction, source: Prediction, buffer: Buffer) -> ClosedForm:
        difference = torch.sub(learner.outcomes, source.outcomes, out=buffer(learner.outcomes))
        value = vecdot(learner.probs, difference)
        return ClosedForm(value, difference.sub_(value.unsqueeze(-1)).mul_(learner.probs))


class _JensenShannon(SoftLoss):
    """The mean of both KLs to the mixture `m`; at most log 2. Its gradient is `q/2 (log q - log m - KL(q || m))`."""

    summary = "Jensen-Shannon divergence"

    def value(self, learner: Tensor, source: Tensor) -> Tensor:
        mixture = torch.logaddexp(learner, source) - math.log(2.0)
        return 0.5 * (_kl(mixture, source) + _kl(mixture, learner))

    def closed_form(self, learner: Prediction, source: Prediction, buffer: Buffer) -> ClosedForm:
        q, r = learner.outcomes, source.outcomes
        mixture, difference = buffer(q), buffer(q)
        torch.logaddexp(q, r, out=mixture).sub_(math.log(2.0))
        from_source = vecdot(source.probs, torch.sub(r, mixture, out=difference))
        from_learner = vecdot(learner.probs, torch.sub(q, mixture, out=difference))
        difference.sub_(from_learner.unsqueeze(-1)).mul_(learner.probs)
        return ClosedForm(0.5 * (from_source + from_learner), difference, factor=0.5)


class _MeanSquaredError(SoftLoss):
    """The mean of the squared differences of the logits. The gradient of their sum is twice the difference."""

    summary = "mean squared difference of the logits (no temperature)"
    of_logits = averaged = True

    def value(self, learner: Tensor, source: Tensor) -> Tensor:
        return (learner - source).square().sum(-1)

    def closed_form(self, learner: Prediction, source: Prediction, buffer: Buffer) -> ClosedForm:
        difference = torch.sub(learner.outcomes, source.outcomes, out=buffer(learner.outcomes))
        return ClosedForm(vecdot(difference, difference), difference, factor=2.0)


#: The soft losses by the name that the argument `soft_loss` takes.
SOFT_LOSSES: dict[str, SoftLoss] = {
    "kl": _KL(),
    "reverse_kl": _ReverseKL(),
    "js": _JensenShannon(),
    "mse": _MeanSquaredError(),
}


def find_soft_loss(name: str) -> SoftLoss:
    """The soft loss of a name; raises `ValueError` if there is none."""
    if name not in SOFT_LOSSES:
        raise ValueError(f"`soft_loss={name!r}` is unknown. Valid values: {', '.join(sorted(SOFT_LOSSES))}.")
    return SOFT_LOSSES[name]


def _kl(learner: Tensor, source: Tensor) -> Tensor:
    """KL(source || learner) of log-probabilities."""
    return F.kl_div(learner, source, reduction="none", log_target=True).sum(-1)


def _upcast(logits: Tensor) -> Tensor:
    """Logits of half precision in fp32: a log-softmax in bf16 would lose what the soft loss is about."""
    return logits if logits.dtype == torch.float64 else logits.float()


class Family(Protocol):
    """The meaning of a head's logits, for the comparison of two models."""

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Compare the predictions of two models; returns one value per position, `(...)`.

        Args:
            learner: Logits `(..., outputs)` of the model that is trained.
            source: Logits of the model it learns from, detached by the caller.
            name: A key of `SOFT_LOSSES`.
            temperature: Temperature of both predictions; losses `of_logits` do not depend on it.
        """

    def predicted(self, logits: Tensor) -> Tensor | None:
        """Return the decisions: the class `(...)` of logits `(..., classes)`, or for each label `(..., labels)`.

        A label is decided as present (bool) if its probability is above one half. `None` for numbers.
        """

    def same(self, first: Tensor, second: Tensor) -> Tensor | None:
        """Mark where two models with logits `(..., outputs)` decide the same (bool); `None` if that is undefined."""
        decisions = [self.predicted(logits) for logits in (first, second)]
        return None if decisions[0] is None else decisions[0] == decisions[1]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class or label, or the numbers: `(..., outputs)` in fp32 (or fp64)."""
        return _upcast(logits)

    def from_probabilities(self, probabilities: Tensor) -> Tensor:
        """Return logits `(..., outputs)` of these probabilities or numbers, the inverse of `probabilities`."""
        return probabilities

    def pooled(self, logits: Sequence[Tensor], weights: Sequence[float], of: str) -> Tensor:
        """Return logits `(..., outputs)` of the mean of several predictions, in fp32 (or fp64).

        Args:
            logits: Logits of each model. Outputs beyond those of the model with the fewest are left out.
            weights: The weight of each model; their sum is 1.
            of: "logits" or "probabilities".
        """
        common = min(z.shape[-1] for z in logits)
        parts = [_upcast(z[..., :common]) for z in logits]
        if of == "probabilities":
            parts = [self.probabilities(z) for z in parts]
        mean = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        return self.from_probabilities(mean) if of == "probabilities" else mean

    def labels_of_item(self, logits: Tensor) -> int:
        """Count the labels of an item that the soft losses sum up and `nll` averages; 1 for classes and numbers."""
        return 1

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the hard loss of each item `(...)`, as the models of transformers do, in fp32 (or fp64).

        Args:
            logits: Logits `(..., outputs)`.
            labels: A class for each item, negative where it has none; or a value for each output, NaN where there is
                none. The result is the mean over the values that are there, and NaN for an item without a label.
        """

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Subtract the label from the prediction, a probability or a number: `(..., outputs)`, NaN without a label.

        Several labels or numbers are scaled such that the scalar product of the errors of two models is the mean over
        the values that are there; a label that may be present has two outcomes. Labels are as for `nll`.
        """
        errors = self.probabilities(logits) - labels.reshape(logits.shape)
        return errors.nan_to_num(nan=0.0) / (~errors.isnan()).sum(-1, keepdim=True).sqrt()

    def error_product(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """Multiply the errors of two models, `(p - y) . (q - y)`: their scalar product for each item, `(...)`."""
        return vecdot(self.errors(first, labels), self.errors(second, labels))

    def squared_error(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the Brier score of each item `(...)`, from 0 to 2, or the squared error of numbers.

        The Brier score is the sum over the outcomes of the squared differences of probability and label. Several
        labels, or numbers, are averaged. Labels are as for `nll`.
        """
        errors = self.errors(logits, labels)
        return vecdot(errors, errors)

    def chance_error(self, labels: Tensor) -> Tensor:
        """Compute the mean squared error of the frequencies of the labels, or of their means, as the prediction.

        Returns:
            0-dimensional; NaN without any label. Labels are as for `nll`.
        """
        values = labels.double().reshape(len(labels), -1)
        return (values - values.nanmean(0)).square().nanmean()

    def right(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Mark the items whose labels are all predicted, bool `(...)`; `None` for numbers.

        An item without a label is not right. Labels are as for `nll`.
        """

    def confidence(self, logits: Tensor) -> Tensor | None:
        """Return 1 minus the entropy over its maximum for each item `(...)`, from 0 to 1; `None` for numbers."""


class Categorical(Family):
    """One of several classes: probabilities are the softmax over the last dimension.

    Args:
        possible: Marks the classes with a probability (bool, broadcast to the logits); `None` for all.
    """

    #: Logit of impossible classes: no probability in any dtype. An infinity times 0 would be NaN.
    _IMPOSSIBLE = -1e30

    def __init__(self, possible: Tensor | None = None) -> None:
        self._possible = possible

    def _masked(self, logits: Tensor) -> Tensor:
        """The logits in fp32 or fp64, at impossible classes too low for any probability."""
        logits = _upcast(logits)
        return logits if self._possible is None else logits.masked_fill(~self._possible, self._IMPOSSIBLE)

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Compare the two softmax distributions, or the logits; see `Family.soft_loss`."""
        loss, logits = find_soft_loss(name), (self._masked(learner), self._masked(source))
        if loss.of_logits:
            value = loss.value(*logits)
        else:
            value = loss.value(*(F.log_softmax(z / temperature, dim=-1) for z in logits)) * temperature**2
        if not loss.averaged:
            return value
        if self._possible is None:
            return value / learner.shape[-1]
        return value / self._possible.expand_as(learner).sum(-1).clamp(min=1)

    def predicted(self, logits: Tensor) -> Tensor:
        """Return the most probable class; see `Family.predicted`."""
        return (logits if self._possible is None else self._masked(logits)).argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax over the possible classes; see `Family.probabilities`."""
        return F.softmax(self._masked(logits), dim=-1)

    def from_probabilities(self, probabilities: Tensor) -> Tensor:
        """Return the logarithms; see `Family.from_probabilities`."""
        return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross-entropy; see `Family.nll`."""
        return -self._of_label(F.log_softmax(self._masked(logits), dim=-1), labels)

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Subtract the one-hot label from the probabilities; see `Family.errors`."""
        probs = self.probabilities(logits)
        labels = labels.reshape(*logits.shape[:-1], 1)
        ones = torch.ones_like(labels, dtype=probs.dtype).masked_fill(labels < 0, torch.nan)
        return probs.scatter_add(-1, labels.clamp(min=0), -ones)

    def chance_error(self, labels: Tensor) -> Tensor:
        """Compute the Brier score of the frequencies of the classes; see `Family.chance_error`."""
        counts = labels[labels >= 0].bincount().double()
        return 1.0 - (counts / counts.sum()).square().sum().where(counts.sum() > 0, torch.nan)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mark the items with the right class; see `Family.right`."""
        return self.predicted(logits) == labels.reshape(logits.shape[:-1])

    def confidence(self, logits: Tensor) -> Tensor:
        """Compare the entropy with that of equal probabilities; see `Family.confidence`."""
        log_probs = F.log_softmax(self._masked(logits), dim=-1)
        possible = torch.ones_like(log_probs) if self._possible is None else self._possible.expand_as(log_probs)
        return 1.0 + vecdot(log_probs.exp(), log_probs) / possible.sum(-1).clamp(min=2).log()

    @staticmethod
    def _of_label(values: Tensor, labels: Tensor) -> Tensor:
        """Select the value of the label from values `(..., classes)`; NaN without a label."""
        labels = labels.reshape(values.shape[:-1])
        found = values.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return found.masked_fill(labels < 0, torch.nan)


class Bernoulli(Family):
    """Several labels, each present or not: probabilities are the sigmoids of the logits."""

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Compare the probabilities of each label, and sum over the labels; see `Family.soft_loss`."""
        loss, logits = find_soft_loss(name), (_upcast(learner), _upcast(source))
        if loss.of_logits:  # one outcome per label
            return loss.value(*(z.unsqueeze(-1) for z in logits)).sum(-1)
        log_probs = (
            torch.stack([F.logsigmoid(z / temperature), F.logsigmoid(-z / temperature)], dim=-1) for z in logits
        )
        value = loss.value(*log_probs).sum(-1) * temperature**2
        return value / 2 if loss.averaged else value

    def predicted(self, logits: Tensor) -> Tensor:
        """Mark the labels that are present; see `Family.predicted`."""
        return logits > 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sigmoids; see `Family.probabilities`."""
        return torch.sigmoid(_upcast(logits))

    def from_probabilities(self, probabilities: Tensor) -> Tensor:
        """Return the log-odds; see `Family.from_probabilities`."""
        return torch.logit(probabilities, eps=torch.finfo(probabilities.dtype).eps)

    def labels_of_item(self, logits: Tensor) -> int:
        """Count the labels; see `Family.labels_of_item`."""
        return logits.shape[-1]

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean of the binary cross-entropies of the labels; see `Family.nll`."""
        labels = labels.reshape(logits.shape).to(_upcast(logits).dtype)
        return F.binary_cross_entropy_with_logits(_upcast(logits), labels, reduction="none").nanmean(-1)

    def errors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Subtract each label from its probability; see `Family.errors`."""
        return math.sqrt(2.0) * super().errors(logits, labels)

    def chance_error(self, labels: Tensor) -> Tensor:
        """Compute the Brier score of the frequencies of each label; see `Family.chance_error`."""
        return 2.0 * super().chance_error(labels)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mark the items with all labels right that are there; see `Family.right`."""
        labels = labels.reshape(logits.shape)
        missing = labels.isnan()
        return (self.predicted(logits) == (labels > 0.5)).logical_or(missing).all(-1) & ~missing.all(-1)

    def confidence(self, logits: Tensor) -> Tensor:
        """Compare the mean entropy of the labels with that of a coin; see `Family.confidence`."""
        z = _upcast(logits)
        return 1.0 - F.binary_cross_entropy_with_logits(z, torch.sigmoid(z), reduction="none").mean(-1) / math.log(2.0)


class Point(Family):
    """A number, or several: the logits are the predictions themselves."""

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Mean squared error; the KLs of normal distributions of one variance are a constant times it."""
        return (_upcast(learner) - _upcast(source)).square().mean(-1)

    def predicted(self, logits: Tensor) -> None:
        """`None`: two real numbers are never the same, so there is no agreement to report."""

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the squared error, the loss of numbers; see `Family.nll`."""
        return self.squared_error(logits, labels)

    def right(self, logits: Tensor, labels: Tensor) -> None:
        """`None`: a number is never exactly right."""

    def confidence(self, logits: Tensor) -> None:
        """`None`: a number says nothing about its own error."""
