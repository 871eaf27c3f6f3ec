"""Soft losses: how the predictions of one model are compared with those of another.

A *prediction family* says what a head's logits mean (one of several classes, several yes/no labels, a number); a *soft
loss* says how two predictions of a family are compared. All functions return one value per position, not reduced, in
fp32 (or fp64 if the logits are), already multiplied by the square of the temperature (Hinton et al. 2015, section 2),
so that the gradient keeps its scale.
"""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

#: Arguments: log-probabilities of the learner and of the source, both `(..., outcomes)`. Returns `(...)`.
Divergence = Callable[[Tensor, Tensor], Tensor]


def kl(learner: Tensor, source: Tensor) -> Tensor:
    """KL(source || learner), the soft loss of arXiv 2311.02849."""
    return F.kl_div(learner, source, reduction="none", log_target=True).sum(-1)


def reverse_kl(learner: Tensor, source: Tensor) -> Tensor:
    """KL(learner || source): mode-seeking, as in MiniLLM (arXiv 2306.08543)."""
    return kl(source, learner)


def js(learner: Tensor, source: Tensor) -> Tensor:
    """Jensen-Shannon divergence: the mean of both KLs to the mixture of the two, at most log 2."""
    mixture = torch.logaddexp(learner, source) - math.log(2.0)
    return 0.5 * (kl(mixture, source) + kl(mixture, learner))


#: The divergences by name; `None` stands for the squared difference of the logits, which needs no probabilities.
SOFT_LOSSES: Mapping[str, Divergence | None] = {"kl": kl, "reverse_kl": reverse_kl, "js": js, "mse": None}


def _upcast(logits: Tensor) -> Tensor:
    """Logits of half precision in fp32: a log-softmax in bf16 would lose what the soft loss is about."""
    return logits if logits.dtype == torch.float64 else logits.float()


class Family(Protocol):
    """What the logits of a head mean, for the purpose of comparing two models."""

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Compare the logits `(..., outputs)` of two models; returns `(...)`."""

    def same(self, first: Tensor, second: Tensor) -> Tensor | None:
        """Where two models with logits `(..., outputs)` predict the same (bool), `None` if that means nothing."""


class Categorical:
    """One of several classes: probabilities are the softmax over the last dimension.

    Args:
        possible: Which classes are possible, bool, of a shape that broadcasts to that of the logits; `None` for all.
            The others have no probability.
    """

    #: In place of the logits of impossible classes: no probability in any dtype, and finite after a division by any
    #: temperature, since infinities would make NaN of 0 times infinity.
    _IMPOSSIBLE = -1e30

    def __init__(self, possible: Tensor | None = None) -> None:
        self._possible = possible

    def _masked(self, logits: Tensor) -> Tensor:
        """The logits in fp32 or fp64, at impossible classes too low for any probability."""
        logits = _upcast(logits)
        return logits if self._possible is None else logits.masked_fill(~self._possible, self._IMPOSSIBLE)

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Divergence of the two softmax distributions at this temperature, or mean squared difference of the logits.

        Args:
            learner: Logits `(..., classes)` of the model that is trained.
            source: Logits `(..., classes)` of the model it learns from, detached by the caller.
            name: A key of `SOFT_LOSSES`.
            temperature: Temperature of both distributions. `mse` does not depend on it: the temperature's square
                cancels it.

        Returns:
            One value per position, `(...)`.
        """
        learner, source = self._masked(learner), self._masked(source)
        divergence = SOFT_LOSSES[name]
        if divergence is None:
            squares = (learner - source).square()
            if self._possible is None:
                return squares.mean(-1)
            return squares.sum(-1) / self._possible.expand_as(squares).sum(-1).clamp(min=1)
        log_probs = (F.log_softmax(logits / temperature, dim=-1) for logits in (learner, source))
        return divergence(*log_probs) * temperature**2

    def same(self, first: Tensor, second: Tensor) -> Tensor:
        """Whether both choose the same class: bool `(...)` from logits `(..., classes)`."""
        if self._possible is not None:
            first, second = self._masked(first), self._masked(second)
        return first.argmax(-1) == second.argmax(-1)


class Bernoulli:
    """Several labels, each present or not: probabilities are the sigmoids of the logits."""

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Sum over the labels of the divergences of the per-label Bernoulli distributions (or squared differences).

        Args:
            learner: Logits `(..., labels)` of the model that is trained.
            source: Logits `(..., labels)` of the model it learns from, detached by the caller.
            name: A key of `SOFT_LOSSES`.
            temperature: Temperature of both distributions; `mse` does not depend on it.

        Returns:
            One value per position, `(...)`.
        """
        learner, source = _upcast(learner), _upcast(source)
        divergence = SOFT_LOSSES[name]
        if divergence is None:
            return (learner - source).square().sum(-1)
        log_probs = (
            torch.stack([F.logsigmoid(logits / temperature), F.logsigmoid(-logits / temperature)], dim=-1)
            for logits in (learner, source)
        )
        return divergence(*log_probs).sum(-1) * temperature**2

    def same(self, first: Tensor, second: Tensor) -> Tensor:
        """Whether both predict the same for each label (probability above one half): bool `(..., labels)`."""
        return (first > 0) == (second > 0)


class Point:
    """A number, or several: the logits are the predictions themselves."""

    def soft_loss(self, learner: Tensor, source: Tensor, name: str, temperature: float) -> Tensor:
        """Mean squared error between the predictions `(..., outputs)`, whatever the soft loss and the temperature.

        Both KLs between two normal distributions of the same fixed variance are this error times a constant.

        Returns:
            One value per position, `(...)`.
        """
        return (_upcast(learner) - _upcast(source)).square().mean(-1)

    def same(self, first: Tensor, second: Tensor) -> None:
        """Two real numbers are never the same: there is no agreement to report."""
        return None
