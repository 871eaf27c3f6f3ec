"""Language-model heads and all their losses in one pass that never holds the logits of all positions.

The logits, `positions x vocabulary`, are by far the largest tensor of a language model, and naive co-distillation
needs a dozen of that size. Here the positions go through the heads of all models in chunks:

1. The logits of a chunk give every hard and soft loss and their gradients in closed form. The gradient of the
   cross-entropy is `softmax(logits) - onehot(label)`; a soft loss defines its gradient in `closed_form`.
2. These give the gradients of the hidden states and of the heads. The memory of the chunk is used for the next one.

The backward pass only scales these gradients. Every matrix product is computed once, as without distillation.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vecdot
from torch.nn import functional as F

from ..edges import GATES, OPEN
from ..graph import ENSEMBLE, Edge
from ..soft_losses import Prediction, SoftLoss, find_soft_loss
from ..tasks.labels import IGNORE_INDEX

#: Size of one model's logits of a chunk, as measured best with `examples/benchmarks/bench_fused_linear.py`.
_CPU_CHUNK_BYTES, _CUDA_CHUNK_BYTES = 2**27, 2**28
#: CPUs do the elementwise work in blocks of this size, which stay in the cache between operations.
_CPU_BLOCK_BYTES = 2**20
#: fp16 gradients are multiplied by this factor over the number of positions. Without it small gradients become 0;
#: with a larger one the sum over positions with the same label could overflow.
_FP16_SCALE = 2048.0


@dataclass(frozen=True)
class LinearHead:
    """The last layer of a language model and its input.

    The logits are `x = scale * (hidden @ weight.T + bias)`, or `softcap * tanh(x / softcap)`, with hidden states
    `(positions, width)` and a weight `(vocabulary, width)`. Cohere and Granite have a scale, Gemma 2 a softcap.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self) -> Tensor:
        """Compute the logits `(positions, vocabulary)`."""
        outputs = F.linear(self.hidden, self.weight, self.bias)
        if self.scale != 1.0:
            outputs = outputs * self.scale
        return outputs if self.softcap is None else self.softcap * torch.tanh(outputs / self.softcap)


class _Kind(NamedTuple):
    """The inputs of a soft loss: logits, or log-probabilities at a temperature."""

    of_logits: bool
    temperature: float


@dataclass(frozen=True)
class _Losses:
    """The losses to compute; the fields are arguments of `linear_losses`."""

    labels: Tensor
    hard_weights: Mapping[str, float]
    edges: Sequence[Edge]
    soft_loss: SoftLoss
    temperature: float
    chunk_size: int | None
    members: Mapping[str, float]
    pool: str

    @functools.cached_property
    def compared(self) -> list[tuple[Edge, SoftLoss, _Kind]]:
        """The edges with what they compare."""
        losses = [self.soft_loss if edge.soft_loss is None else find_soft_loss(edge.soft_loss) for edge in self.edges]
        return [
            (edge, loss, _Kind(loss.of_logits, 1.0 if loss.of_logits else edge.temperature or self.temperature))
            for edge, loss in zip(self.edges, losses, strict=True)
        ]

    @functools.cached_property
    def gated(self) -> list[Edge]:
        """The edges with a gate."""
        return [edge for edge in self.edges if edge.gate != OPEN]


def linear_losses(
    heads: Mapping[str, LinearHead],
    labels: Tensor,
    hard_weights: Mapping[str, float],
    edges: Sequence[Edge],
    soft_loss: str = "kl",
    temperature: float = 1.0,
    chunk_size: int | None = None,
    members: Mapping[str, float] | None = None,
    pool: str = "logits",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute all losses of several language-model heads, summed over the positions (not averaged).

    The result is differentiable once, for the hidden states, weights and biases of the learners that a loss trains.
    The cross-entropy is over a model's whole vocabulary. The soft losses are over the ids that all models have.
    Matrix products use the dtype of autocast where it is on. All else is in fp32, or in fp64 for fp64 inputs.

    Args:
        heads: The heads by name of the model, with the same positions.
        labels: Token ids `(positions,)`, without ignored ones.
        hard_weights: Weight of the cross-entropy of each learner that has one.
        edges: The soft losses. Their sources are detached.
        soft_loss: A key of `SOFT_LOSSES`, for edges that have none of their own.
        temperature: Temperature of the soft losses that have none of their own; `mse` does not depend on it.
        chunk_size: Positions in a chunk; by default it depends on vocabulary and device.
        members: Weights of the models whose mean is the source `ensemble`, with the sum 1.
        pool: The kind of mean, a key of `POOLS`.

    Returns:
        The weighted sum of the losses, 0-dimensional, and the unweighted losses and the sums of the gates, detached,
        by their names in the log.
    """
    losses = _Losses(
        labels,
        dict(hard_weights),
        tuple(edges),
        find_soft_loss(soft_loss),
        temperature,
        chunk_size,
        members or {},
        pool,
    )
    tensors = [tensor for head in heads.values() for tensor in (head.hidden, head.weight, head.bias)]
    total, values = _LinearLosses.apply(losses, dict(heads), *tensors)
    names = [f"{learner}_hard_loss" for learner in hard_weights] + [edge.loss_name for edge in losses.edges]
    names += [edge.gate_name for edge in losses.gated]
    return total, dict(zip(names, values.unbind(), strict=True))


class ScoredPositions:
    """The positions of a batch that are scored, from targets `(rows, length)`.

    Tensors of this size need the number of positions on the CPU. The copy from the GPU starts when this object is
    made, before the models run, and is awaited when their heads are reached, so the GPU never waits for it.
    """

    def __init__(self, targets: Tensor) -> None:
        self.shape = targets.shape
        self._targets = targets.flatten()
        self._mask = self._targets.ne(IGNORE_INDEX)
        self._count = self._mask.sum().to("cpu", non_blocking=targets.is_cuda)
        self._counted = torch.cuda.Event() if targets.is_cuda else None
        if self._counted is not None:
            self._counted.record()

    @functools.cached_property
    def index(self) -> Tensor:
        """Indices into the flattened positions, `(positions,)`."""
        if self._counted is not None:
            self._counted.synchronize()
        return torch.nonzero_static(self._mask, size=int(self._count)).squeeze(-1)

    @functools.cached_property
    def labels(self) -> Tensor:
        """Token ids of the scored positions, `(positions,)`."""
        return self._targets[self.index]

    def select(self, hidden: Tensor) -> Tensor:
        """Select the scored positions `(positions, width)` of hidden states `(rows, length, width)`."""
        return hidden.flatten(0, 1).index_select(0, self.index)


class _Part:
    """One head in the pass: operands in the dtype of the matrix products, and sums of the gradients."""

    def __init__(self, head: LinearHead, dtype: torch.dtype, exact: torch.dtype, needs: Sequence[bool]) -> None:
        self.head = head
        self.hidden, self.weight = head.hidden.to(dtype), head.weight.to(dtype)
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.vocabulary = head.weight.shape[0]
        new = {"dtype": exact, "device": head.weight.device}
        for_hidden, for_weight, for_bias = needs
        self.grad_hidden = torch.empty(head.hidden.shape, **new) if for_hidden else None
        self.grad_weight = torch.empty(head.weight.shape, **new) if for_weight else None
        self.grad_bias = torch.zeros(self.vocabulary, **new) if for_bias else None
        self.trained = any(needs)

    def outputs(self, rows: slice, out: Tensor) -> Tensor:
        """Write outputs of the linear layer for some positions to `out`, in its dtype."""
        hidden, weight = self.hidden[rows], self.weight.t()
        if out.dtype != hidden.dtype:
            return out.copy_(F.linear(hidden, self.weight, self.bias))
        if self.bias is None:
            return torch.mm(hidden, weight, out=out)
        return torch.addmm(self.bias, hidden, weight, out=out)

    def add_gradients(self, rows: slice, grad: Tensor) -> None:
        """Add the gradients of hidden states, weight and bias, from the gradient of some linear outputs."""
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)
        scale = 1.0
        if self.hidden.dtype != grad.dtype:
            scale = _FP16_SCALE / len(grad) if self.hidden.dtype == torch.float16 else 1.0
            grad = (grad * scale if scale != 1.0 else grad).to(self.hidden.dtype)
        if self.grad_hidden is not None:
            if grad.dtype == self.grad_hidden.dtype:
                torch.mm(grad, self.weight, out=self.grad_hidden[rows])
            else:
                self.grad_hidden[rows] = (grad @ self.weight).to(self.grad_hidden.dtype) / scale
        if self.grad_weight is not None:
            first = rows.start == 0  # the first chunk overwrites the buffer
            if grad.dtype == self.grad_weight.dtype:
                self.grad_weight.addmm_(grad.t(), self.hidden[rows], beta=0.0 if first else 1.0)
            elif first:
                self.grad_weight.copy_(grad.t() @ self.hidden[rows]).div_(scale)
            else:
                self.grad_weight.add_(grad.t() @ self.hidden[rows], alpha=1.0 / scale)


class _LinearLosses(torch.autograd.Function):
    """Computes the losses and the gradients in the forward pass; the backward pass scales the gradients."""

    @staticmethod
    def forward(ctx: Any, losses: _Losses, heads: dict[str, LinearHead], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        device = losses.labels.device
        exact = torch.float64 if any(head.hidden.dtype == torch.float64 for head in heads.values()) else torch.float32
        learners = {*losses.hard_weights, *(edge.learner for edge in losses.edges)}
        autocast = torch.is_autocast_enabled(device.type) and exact != torch.float64
        needs = ctx.needs_input_grad[2:]

        def compute() -> tuple[Tensor, list[Tensor | None]]:
            parts = {}
            for index, (name, head) in enumerate(heads.items()):
                dtype = torch.get_autocast_dtype(device.type) if autocast else head.weight.dtype
                needed = [need and name in learners for need in needs[3 * index : 3 * index + 3]]
                parts[name] = _Part(head, dtype, exact, needed)
            with torch.autocast(device.type, enabled=False):
                values = _run(losses, parts, exact)
            return values, [grad for p in parts.values() for grad in (p.grad_hidden, p.grad_weight, p.grad_bias)]

        values, ctx.gradients = compute()
        ctx.compute = compute
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*tensors)  # torch then raises an error if one was changed in place
        ctx.mark_non_differentiable(values)
        weights = [*losses.hard_weights.values(), *(edge.weight for edge in losses.edges)]
        terms = values[: len(weights)]  # without the gates
        total = (terms * torch.tensor(weights, dtype=exact).to(device, non_blocking=True)).sum()
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        # The gradients are not kept, so a second backward pass (`retain_graph=True`) computes them again.
        gradients, ctx.gradients = ctx.gradients or ctx.compute()[1], None
        scaled = (
            None if grad is None else grad.mul_(grad_total).to(dtype)
            for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, *scaled


def _run(losses: _Losses, parts: Mapping[str, _Part], exact: torch.dtype) -> Tensor:
    """Go through the positions in chunks; return the sums of the losses and of the gates `(losses,)`."""
    device, count = losses.labels.device, len(losses.labels)
    largest = max(part.vocabulary for part in parts.values()) * exact.itemsize
    limit = _CPU_CHUNK_BYTES if device.type == "cpu" else _CUDA_CHUNK_BYTES
    size = min(losses.chunk_size or max(32, limit // largest // 32 * 32), max(count, 1))
    block = max(2 * torch.get_num_threads(), _CPU_BLOCK_BYTES // largest) if device.type == "cpu" else size
    block = min(block, size)
    buffers = {name: torch.empty(size, p.vocabulary, dtype=exact, device=device) for name, p in parts.items()}
    scratch = _Scratch(block, exact, device)
    count_values = len(losses.hard_weights) + len(losses.edges) + len(losses.gated)
    values = torch.zeros(count_values, dtype=exact, device=device)
    for part in parts.values():
        if count == 0 and part.grad_weight is not None:
            part.grad_weight.zero_()
    for rows in _slices(count, size):
        chunk = {name: part.outputs(rows, buffers[name][: rows.stop - rows.start]) for name, part in parts.items()}
        labels = losses.labels[rows]
        for inner in _slices(len(labels), block):
            scratch.reset()
            outputs = {name: logits[inner] for name, logits in chunk.items()}
            values += _differentiate(losses, parts, outputs, labels[inner], scratch)
        for name, part in parts.items():
            if part.trained:
                part.add_gradients(rows, chunk[name])
    return values


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _Scratch:
    """Buffers that all blocks use again: allocating them anew would cost more than the work on them."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._new = functools.partial(torch.empty, dtype=dtype, device=device)
        self._rows = rows
        self._buffers: dict[int, list[Tensor]] = defaultdict(list)
        self._used: Counter[int] = Counter()

    def reset(self) -> None:
        """Allow all buffers to be used again."""
        self._used.clear()

    def like(self, tensor: Tensor) -> Tensor:
        """Return a buffer of the shape `(rows, columns)` of a tensor, with undefined content."""
        rows, columns = tensor.shape
        buffers, used = self._buffers[columns], self._used[columns]
        if used == len(buffers):
            buffers.append(self._new(self._rows, columns))
        self._used[columns] += 1
        return buffers[used][:rows]


def _differentiate(
    losses: _Losses, parts: Mapping[str, _Part], outputs: Mapping[str, Tensor], labels: Tensor, scratch: _Scratch
) -> Tensor:
    """Compute the sums `(losses,)` of the losses and of the gates of some positions.

    The outputs of the linear layers `(rows, vocabulary)` of trained learners are overwritten with the gradients of the
    weighted sum of the losses.
    """
    shared = min(part.vocabulary for part in parts.values())
    tanh = {name: _to_logits(parts[name].head, z, scratch) for name, z in outputs.items()}
    if losses.members:
        outputs = {**outputs, ENSEMBLE: _pooled(losses, outputs, shared, scratch)}
    seen = {name for edge in losses.gated for name in (edge.learner, edge.source)}
    hard = {
        name: torch.log_softmax(outputs[name], -1, out=scratch.like(outputs[name]))
        for name in dict.fromkeys([*losses.hard_weights, *sorted(seen)])
    }
    scores = {name: _Scores(hard[name], labels, scratch) for name in seen}
    soft = _predictions(losses, outputs, hard, shared, scratch)

    values = [-hard[name].gather(1, labels.unsqueeze(1)).sum() for name in losses.hard_weights]
    gates = []
    # A learner's soft losses have the gradient `factor * soft probabilities + sum of factor * term`; a gate multiplies
    # each row of it.
    probs_factors: dict[str, dict[_Kind, float]] = {name: defaultdict(float) for name in parts}
    terms: dict[str, list[tuple[float, Tensor, Tensor | None]]] = {name: [] for name in parts}
    for edge, loss, kind in losses.compared:
        outcomes = shared if loss.averaged else 1
        weight = edge.weight * kind.temperature / outcomes
        learner = soft[edge.learner, kind]
        value, term, factor, probs_factor = loss.closed_form(learner, soft[edge.source, kind], scratch.like)
        gate = None
        if edge.gate != OPEN:
            gate = GATES[edge.gate].value(scores[edge.learner], scores[edge.source]).to(value.dtype).unsqueeze(1)
            gates.append(gate.sum())
            value = value * gate.squeeze(1)
        values.append(value.sum() / outcomes * kind.temperature**2)
        terms[edge.learner].append((factor * weight, term, gate))
        if gate is None:
            probs_factors[edge.learner][kind] += probs_factor * weight
        elif probs_factor:
            terms[edge.learner].append((probs_factor * weight, learner.probs, gate))

    for name, part in parts.items():
        if not part.trained:
            continue
        grad, log_probs, factors = outputs[name], hard.get(name), probs_factors[name]
        hard_weight, plain = losses.hard_weights.get(name, 0.0), _Kind(False, 1.0)
        if hard_weight and (name, plain) in soft and soft[name, plain].outcomes is log_probs:
            torch.mul(soft[name, plain].probs, hard_weight + factors.pop(plain, 0.0), out=grad)
        elif hard_weight:
            torch.mul(log_probs.exp_(), hard_weight, out=grad)
        else:
            grad.zero_()
        for kind, factor in factors.items():
            if factor:
                grad[:, :shared].add_(soft[name, kind].probs, alpha=factor)
        for factor, term, gate in terms[name]:
            if gate is None:
                grad[:, :shared].add_(term, alpha=factor)
            else:
                grad[:, :shared].addcmul_(term, gate, value=factor)
        if hard_weight:  # the one-hot part of the labels
            grad.scatter_add_(1, labels.unsqueeze(1), grad.new_full((len(labels), 1), -hard_weight))
        if tanh[name] is not None:
            grad.mul_(tanh[name].square_().neg_().add_(1.0))
        if part.head.scale != 1.0:
            grad.mul_(part.head.scale)
    return torch.stack([*values, *gates])


class _Scores:
    """The predictions of one model at some positions, as gates see them; see `edges.Scores`."""

    def __init__(self, log_probs: Tensor, labels: Tensor, scratch: _Scratch) -> None:
        self._log_probs, self._labels, self._scratch = log_probs, labels, scratch

    @functools.cached_property
    def nll(self) -> Tensor:
        return -self._log_probs.gather(1, self._labels.unsqueeze(1)).squeeze(1)

    @functools.cached_property
    def right(self) -> Tensor:
        return self._log_probs.argmax(-1) == self._labels

    @functools.cached_property
    def confidence(self) -> Tensor:
        probs = torch.exp(self._log_probs, out=self._scratch.like(self._log_probs))
        return 1.0 + vecdot(probs, self._log_probs) / math.log(self._log_probs.shape[1])


def _to_logits(head: LinearHead, outputs: Tensor, scratch: _Scratch) -> Tensor | None:
    """Turn a linear layer's outputs into logits, in place; return the tanh of a softcap, for its derivative."""
    if head.scale != 1.0:
        outputs.mul_(head.scale)
    if head.softcap is None:
        return None
    tanh = torch.tanh(torch.div(outputs, head.softcap, out=scratch.like(outputs)), out=scratch.like(outputs))
    torch.mul(tanh, head.softcap, out=outputs)
    return tanh


def _pooled(losses: _Losses, logits: Mapping[str, Tensor], shared: int, scratch: _Scratch) -> Tensor:
    """Return logits `(rows, shared)` of the mean prediction of the ensemble; see `Family.pooled`."""
    mean = scratch.like(next(iter(logits.values()))[:, :shared]).zero_()
    for name, weight in losses.members.items():
        z = logits[name][:, :shared]
        if losses.pool == "probabilities":
            z = torch.log_softmax(z, -1, out=scratch.like(z)).exp_()
        mean.add_(z, alpha=weight)
    return mean.clamp_(min=torch.finfo(mean.dtype).tiny).log_() if losses.pool == "probabilities" else mean


def _predictions(
    losses: _Losses, logits: Mapping[str, Tensor], hard: Mapping[str, Tensor], shared: int, scratch: _Scratch
) -> dict[tuple[str, _Kind], Prediction]:
    """Predict over the shared ids, by name of the model; log-probabilities of the hard loss are used where equal."""
    predictions = {}
    for name, kind in sorted({(name, k) for edge, _, k in losses.compared for name in (edge.learner, edge.source)}):
        z = logits[name][:, :shared]
        if kind.of_logits:
            predictions[name, kind] = Prediction(z)
            continue
        if kind.temperature == 1.0 and name in hard and z.shape == logits[name].shape:
            log_probs = hard[name]
        else:
            if kind.temperature != 1.0:
                z = torch.div(z, kind.temperature, out=scratch.like(z))
            log_probs = torch.log_softmax(z, -1, out=scratch.like(z))
        predictions[name, kind] = Prediction(log_probs, torch.exp(log_probs, out=scratch.like(log_probs)))
    return predictions
