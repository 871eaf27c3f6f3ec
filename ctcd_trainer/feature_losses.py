"""How the insides of two models are compared: hidden states, or the relations of queries, keys and values.

To add a comparison, write one class with `values` and put it into `FEATURE_LOSSES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

#: The variance below which the state of a position counts as constant.
_LEAST_VARIANCE = 1e-8


@dataclass(frozen=True)
class Vectors:
    """The tensors of one layer that a feature loss compares, in fp32.

    Attributes:
        tensors: `hidden`; or `queries`, `keys` and `values`. Each is `(rows, positions, width)`.
        heads: Number of attention heads.
    """

    tensors: Mapping[str, Tensor]
    heads: int = 1

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def repeated_keys(self) -> Tensor:
        """Return the keys as wide as the queries, where several heads share a key (grouped-query attention)."""
        queries, keys = self["queries"], self["keys"]
        if queries.shape[-1] == keys.shape[-1]:
            return keys
        width = queries.shape[-1] // self.heads
        each = keys.unflatten(-1, (-1, width))
        return each.repeat_interleave(self.heads // each.shape[-2], -2).flatten(-2)


class FeatureLoss:
    """Compares a layer of the model that learns with a layer of the model that teaches."""

    #: One line for the help of the argument `feature_loss`.
    summary: ClassVar[str]
    #: The tensors that `values` reads.
    reads: ClassVar[tuple[str, ...]]
    #: Whether widths must be equal, so that a projection of the learner's tensors is needed where they are not.
    same_width: ClassVar[bool] = False
    #: Whether only the last layers are compared unless the user names others.
    last_only: ClassVar[bool] = False

    @staticmethod
    def values(learner: Vectors, source: Vectors, counted: Tensor, causal: bool) -> Tensor:
        """Compute the loss at each position.

        Args:
            learner: The layer of the model that learns.
            source: The layer of the model that teaches, detached.
            counted: The positions that are no padding, bool `(rows, positions)`.
            causal: Whether a position attends to earlier positions only.

        Returns:
            `(rows, positions)`; of any finite value where `counted` is false.
        """
        raise NotImplementedError


class Hidden(FeatureLoss):
    """Mean squared error of the hidden states after a layer, over the variance of the source's state.

    The variance is that over the units of one position. So the loss does not depend on the scale of the model, nor on
    the rows that happen to be in one batch.
    """

    summary = "mean squared error of the hidden states over the variance of the teacher's"
    reads = ("hidden",)
    same_width = True

    @staticmethod
    def values(learner: Vectors, source: Vectors, counted: Tensor, causal: bool) -> Tensor:
        """Compute the loss at each position; see the base class."""
        ours, theirs = learner["hidden"], source["hidden"]
        variance = theirs.var(-1, correction=0).clamp(min=_LEAST_VARIANCE)
        return (ours - theirs).square().mean(-1) / variance


class Relations(FeatureLoss):
    """MiniLMv2 (arXiv 2012.15828): Kullback-Leibler divergence of how queries, keys and values are alike.

    The softmax over positions of `Q Q^T`, `K K^T` and `V V^T`, each scaled and split into relation heads. There are as
    many as the source has attention heads, or the most below that which divide both widths.
    """

    summary = "KL divergence of the relations among queries, among keys and among values of the last layers (MiniLMv2)"
    reads = ("queries", "keys", "values")
    last_only = True

    @staticmethod
    def values(learner: Vectors, source: Vectors, counted: Tensor, causal: bool) -> Tensor:
        """Compute the loss at each position; see the base class."""
        each = [
            _divergence((learner[name],) * 2, (source[name],) * 2, source.heads, counted, causal)
            for name in Relations.reads
        ]
        return torch.stack(each).mean(0)


class Attention(FeatureLoss):
    """Kullback-Leibler divergence of the attention of the last layers, as the projected queries and keys give it.

    Rotary and relative positions, and norms of queries and keys, are not in it.
    """

    summary = "KL divergence of the attention of the last layers"
    reads = ("queries", "keys")
    last_only = True

    @staticmethod
    def values(learner: Vectors, source: Vectors, counted: Tensor, causal: bool) -> Tensor:
        """Compute the loss at each position; see the base class."""
        pairs = ((each["queries"], each.repeated_keys()) for each in (learner, source))
        return _divergence(*pairs, source.heads, counted, causal)


def _divergence(
    learner: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor], heads: int, counted: Tensor, causal: bool
) -> Tensor:
    """KL divergence of two relations, `(rows, positions)`: a mean over relation heads."""
    widths = learner[0].shape[-1], source[0].shape[-1]
    heads = next(number for number in range(heads, 0, -1) if all(width % number == 0 for width in widths))
    seen = counted[:, None, None, :]
    if causal:
        length = counted.shape[1]
        seen = seen & counted.new_ones(length, length).tril()
    ours, theirs = (_relation(*pair, heads, seen) for pair in (learner, source))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(1)


def _relation(first: Tensor, second: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Log-probabilities `(rows, heads, positions, positions)` of the positions, for each position."""
    first, second = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (first, second))
    scores = first @ second.mT / first.shape[-1] ** 0.5
    # Not -inf: a row may have no position that is seen.
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)


#: The comparisons by the name that the argument `feature_loss` takes.
FEATURE_LOSSES: Mapping[str, type[FeatureLoss]] = {"hidden": Hidden, "relations": Relations, "attention": Attention}


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """Read a map of layers such as `0:1,1:3,2:5`, the learner's layer before the teacher's, from 0.

    Raises:
        ValueError: The text is no such map, or names a pair twice.
    """
    pairs = [part.split(":") for part in layers.replace(" ", "").split(",")]
    if not all(len(pair) == 2 and all(number.isdecimal() for number in pair) for pair in pairs):
        raise ValueError(
            f"`feature_layers={layers!r}` is not valid: give pairs of the student's and the teacher's layer, counted "
            "from 0, such as '0:1,1:3,2:5'."
        )
    found = [(int(first), int(second)) for first, second in pairs]
    if len({*found}) < len(found):
        raise ValueError(f"`feature_layers={layers!r}` names a pair of layers twice: leave one of them out.")
    return found
