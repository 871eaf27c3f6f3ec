"""Running a language model up to its last layer, so that the losses can be computed without the logits.

No model is copied or changed. While it runs, a hook lets only the scored positions into its head. Another hook takes
the input of the output layer and passes on no position, so the model finishes with empty logits. `find_tap` checks on
one row that the logits are `scale * linear(input)`, against the model's own logits and loss.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model_structure import base_model, in_evaluation_mode
from ..tasks.base import Task
from ..tasks.labels import IGNORE_INDEX
from .fused_linear import LinearHead, ScoredPositions


class NoLinearHeadError(Exception):
    """The losses of a model cannot be computed from the input of its last layer; the message gives the reason."""


@dataclass(frozen=True)
class HeadTap:
    """The output layer of a model, and how its outputs become logits (`scale` and `softcap` as in `LinearHead`).

    Attributes:
        layer: The layer.
        entry: The first module of the head, if the head is more than the layer (BERT's has a dense layer before).
        extra_bias: A bias `(1, vocabulary)` that the model adds to the layer's outputs (BART's `final_logits_bias`).
    """

    layer: nn.Linear
    entry: nn.Module | None = None
    extra_bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def run(self, model: nn.Module, inputs: Mapping[str, Any], scored: ScoredPositions) -> LinearHead:
        """Run a model on inputs without labels up to the output layer.

        Returns:
            The head, with the hidden states that go into the layer at the scored positions.

        Raises:
            NoLinearHeadError: The model does not call the layer exactly once, or for other positions.
        """
        taken: list[Tensor] = []

        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (scored.select(args[0]).unsqueeze(0), *args[1:])

        def take(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            taken.append(args[0])
            return (args[0][:, :0],)

        with _pre_hooks({self.layer: take} if self.entry is None else {self.entry: select, self.layer: take}):
            model(**inputs)
        if len(taken) != 1:
            raise NoLinearHeadError(f"its output layer is called {len(taken)} times")
        hidden = taken[0]
        expected = scored.shape if self.entry is None else (1, len(scored.index))
        if hidden.shape[:-1] != expected:
            raise NoLinearHeadError(f"{tuple(hidden.shape[:-1])} positions go into it, not {tuple(expected)}")
        return self.head(scored.select(hidden) if self.entry is None else hidden.squeeze(0))

    def head(self, hidden: Tensor) -> LinearHead:
        """Return the head for hidden states `(positions, width)` that go into the layer."""
        weight, bias = self.layer.weight, self.layer.bias
        if self.extra_bias is not None:
            bias = self.extra_bias.reshape(-1) if bias is None else bias + self.extra_bias.reshape(-1)
        return LinearHead(hidden, weight, bias, self.scale, self.softcap)


def find_tap(model: nn.Module, task: Task, inputs: Mapping[str, Any], loss_matters: bool = True) -> HeadTap:
    """Find the output layer of a language model, and check on one row that it gives the logits and the loss.

    Args:
        model: The model, which is run on one row in evaluation mode.
        task: Its task.
        inputs: A batch as the model takes it, with at least one scored label.
        loss_matters: Whether the loss of the model must be the mean cross-entropy.

    Raises:
        NoLinearHeadError: The layer does not give them, or the model has no such layer.
    """
    inner = base_model(model)
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        raise NoLinearHeadError("its loss has a term for the balance of its experts")
    layer = inner.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise NoLinearHeadError(f"its output layer is {'none' if layer is None else type(layer).__name__}")
    targets = task.targets(inputs)
    best = int(targets.ne(IGNORE_INDEX).sum(-1).argmax())  # the row with the most scored positions
    row = {
        name: value[best : best + 1] if isinstance(value, Tensor) and value.shape[:1] == targets.shape[:1] else value
        for name, value in inputs.items()
    }
    targets = task.targets(row)
    with in_evaluation_mode([model]), torch.no_grad():
        try:
            unlabelled = task.unlabelled(inner, row)
        except ValueError as error:
            raise NoLinearHeadError(str(error)) from error
        outputs, entry = _run_and_watch(model, inner, row, targets.shape)
        expected = task.compared(outputs, row).float()
        scored = ScoredPositions(targets)
        if loss_matters:
            _check_loss(task, row, outputs, F.cross_entropy(expected, scored.labels))
        tap = HeadTap(layer, extra_bias=getattr(inner, "final_logits_bias", None))
        tap = _fitted(tap, model, unlabelled, scored, expected)
        if entry in (None, layer):
            return tap
        # A head that mixes positions gives other logits when every other position is missing.
        half = targets.flatten().index_fill(0, scored.index[1::2], IGNORE_INDEX).view_as(targets)
        try:
            return _fitted(replace(tap, entry=entry), model, unlabelled, ScoredPositions(half), expected[::2])
        except torch.OutOfMemoryError:
            raise
        except (NoLinearHeadError, RuntimeError):  # the error of a module that needs all positions
            return tap


def _check_loss(task: Task, row: Mapping[str, Any], outputs: Any, expected: Tensor) -> None:
    """Raise `NoLinearHeadError` if the loss of a model is not the mean cross-entropy."""
    loss, logits = outputs["loss"].float().reshape(1), outputs["logits"].float()
    tolerance = 1e-5 if outputs["loss"].dtype == torch.float32 else 1e-2  # a loss in half precision is rounded
    if _error(expected[None], loss) <= tolerance:
        return
    if task.shifts_labels and logits.shape[:-1] == row["labels"].shape:
        unshifted = F.cross_entropy(logits.flatten(0, 1), row["labels"].flatten())
        if _error(unshifted[None], loss) <= tolerance:
            raise NoLinearHeadError("its labels are not shifted by the model (if intended, pass `task='masked-lm'`)")
    raise NoLinearHeadError("its loss is not the mean cross-entropy")


def _fitted(
    tap: HeadTap, model: nn.Module, inputs: Mapping[str, Any], scored: ScoredPositions, expected: Tensor
) -> HeadTap:
    """Choose the factor and the bound that give the expected logits `(positions, vocabulary)`."""
    head = tap.run(model, inputs, scored)
    taps = [replace(tap, scale=scale, softcap=softcap) for scale, softcap in _candidates(model)]
    logits = [choice.head(head.hidden).logits().float() for choice in taps]
    if logits[0].shape != expected.shape:
        raise NoLinearHeadError(f"its logits are {tuple(expected.shape)}, not {tuple(logits[0].shape)}")
    errors = [_error(actual, expected) for actual in logits]
    best = errors.index(min(errors))
    if errors[best] > (1e-4 if head.hidden.dtype == torch.float32 else 2e-2):
        raise NoLinearHeadError("its logits are not those of its output layer")
    return taps[best]


def _run_and_watch(
    model: nn.Module, inner: nn.Module, inputs: Mapping[str, Any], positions: torch.Size
) -> tuple[Any, nn.Module | None]:
    """Run a model; return its outputs and the first module after its base that gets hidden states of all positions."""
    entries: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].shape[:-1] == positions:
            entries.append(module)

    backbone = getattr(inner, inner.base_model_prefix, None)
    with _pre_hooks({module: note for module in inner.children() if module is not backbone}):
        outputs = model(**inputs)
    return outputs, entries[0] if entries else None


@contextmanager
def _pre_hooks(hooks: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Put forward pre-hooks on some modules while the block runs."""
    with ExitStack() as handles:
        for module, hook in hooks.items():
            handles.enter_context(module.register_forward_pre_hook(hook))
        yield


def _candidates(model: nn.Module) -> list[tuple[float, float | None]]:
    """List the pairs of a factor and a bound of the logits that a model's config allows."""
    configs = [model.config, model.config.get_text_config(decoder=True)]

    def settings(name: str) -> set[float]:
        values = {getattr(config, name, None) for config in configs}
        return {float(value) for value in values if isinstance(value, (int, float)) and value}

    scales = {1.0, *settings("logit_scale"), *settings("lm_head_multiplier")}
    for value in settings("logits_scaling"):
        scales |= {value, 1.0 / value}
    return [(scale, softcap) for softcap in (None, *settings("final_logit_softcapping")) for scale in sorted(scales)]


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest value of its row."""
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    return ((actual - expected).abs() / scale).max().item()
