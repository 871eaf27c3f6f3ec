"""Make a narrower copy of a model, which keeps the most important heads, feed-forward units and hidden units.

The code knows no model family. The narrower model is made from its config. Every dimension of a parameter whose size
differs then belongs to one of three axes: hidden units, which are the same in the whole model; feed-forward units of a
layer; heads of an attention. Only the projections into and out of heads are recognised by their names, because many
families make them as wide as the hidden states.
"""

import copy
import re
from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model_structure import in_evaluation_mode

_INTERMEDIATE_SIZES = ("intermediate_size", "n_inner", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
_HEAD_WIDTHS = ("head_dim", "d_kv")

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS = "hidden units", "feed-forward units", "heads", "key-value heads"

_ATTENTION = re.compile(
    r"(?P<scope>.*?\b\w*att(?:n|ention)\w*)\.(?:.*\.)?(?P<module>\w+)\.(?:weight|bias)", re.IGNORECASE
)
_QUERIES = {"query", "query_proj", "pos_query_proj", "q_proj", "q_lin", "q", "q_norm", "c_attn", "Wqkv"}
_KEYS_AND_VALUES = {
    *("key", "key_proj", "pos_key_proj", "k_proj", "k_lin", "k", "k_norm"),
    *("value", "value_proj", "v_proj", "v_lin", "v"),
}
_OUT = {"dense", "out_proj", "o_proj", "out_lin", "o", "c_proj", "Wo"}
_BIAS = "relative_attention_bias"


@dataclass(frozen=True)
class Widths:
    """Sizes of a narrower model; `None` for a size that stays. True if any size is given."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None

    def __bool__(self) -> bool:
        return any(size is not None for size in vars(self).values())

    def apply(self, config: PreTrainedConfig) -> None:
        """Set the sizes in a config, under the names of its family, or raise `ValueError` if they do not fit."""
        for argument, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"`{argument}={size}` is not valid: it must be at least 1.")
        intermediates = [name for name in _INTERMEDIATE_SIZES if hasattr(config, name)]
        if self.intermediate_size is not None and not intermediates:
            raise ValueError(
                f"`intermediate_size={self.intermediate_size}`: the config of a {config.model_type} has none of "
                f"{_INTERMEDIATE_SIZES}. Build the student from a smaller config instead."
            )
        for name in intermediates:  # GPT-2's is `None`: four times the hidden size, which may change
            setattr(config, name, self.intermediate_size or getattr(config, name) or 4 * config.hidden_size)
        hidden, heads, width = config.hidden_size, config.num_attention_heads, head_width(config)
        head_widths = [name for name in _HEAD_WIDTHS if getattr(config, name, None) is not None]
        new_hidden, new_heads = self.hidden_size or hidden, self.num_attention_heads
        if new_heads is None:
            new_heads = heads if head_widths or self.hidden_size is None else max(1, new_hidden // width)
        if not head_widths and new_hidden != new_heads * width:
            raise ValueError(
                f"`hidden_size={new_hidden}` and `num_attention_heads={new_heads}` do not fit: the heads of a "
                f"{config.model_type} are hidden_size / num_attention_heads wide, here {hidden} / {heads} = {width}, "
                f"and stay so. Give `hidden_size={new_heads * width}`, or hidden_size / {width} heads."
            )
        key_heads = getattr(config, "num_key_value_heads", None)
        if key_heads is not None:
            config.num_key_value_heads = _key_heads(heads, key_heads, new_heads)
        for name in head_widths:
            setattr(config, name, width)
        for name in _HEADS:
            if hasattr(config, name):
                setattr(config, name, new_heads)
        config.hidden_size = new_hidden


def _key_heads(heads: int, key_heads: int, new_heads: int) -> int:
    """Number of key-value heads for fewer heads: as many heads share one as before, if that divides."""
    shared = heads // key_heads
    if new_heads % shared == 0:
        return new_heads // shared
    if new_heads % key_heads == 0:
        return key_heads
    raise ValueError(
        f"`num_attention_heads={new_heads}` does not fit: {shared} of the teacher's {heads} heads share one of "
        f"{key_heads} key-value heads. Give a multiple of {shared} or of {key_heads}."
    )


def head_width(config: PreTrainedConfig) -> int:
    """Width of one head."""
    widths = (getattr(config, name, None) for name in _HEAD_WIDTHS)
    return next((width for width in widths if width is not None), config.hidden_size // config.num_attention_heads)


def new_model(like: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class, whose weights the caller overwrites. The random state does not change."""
    with torch.random.fork_rng(devices=[]):
        return type(like)(config)


@dataclass(frozen=True)
class Axis:
    """The units that a dimension of a parameter counts."""

    kind: str
    scope: str  # the layer or the attention within which units are chosen; empty for the whole model
    units: int
    width: int = field(default=1, compare=False)  # indices of a unit; differs between parameters with the same units
    groups: int = 1  # of units; the same number is kept in each
    kept: int = 0

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """The slices of each unit, `(units, blocks, width, ...)`; a dimension can hold several blocks of all units."""
        moved = tensor.movedim(dim, 0)
        return moved.reshape(-1, self.units, self.width, *moved.shape[1:]).movedim(1, 0)

    def keep(self, tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
        """The tensor with some of the units only."""
        return self.split(tensor, dim)[kept].movedim(0, 1).flatten(0, 2).movedim(0, dim)


def narrow(
    model: PreTrainedModel, widths: Widths, calibration: Iterable[Mapping[str, Any]] | None = None
) -> PreTrainedModel:
    """Copy a model with fewer heads, feed-forward units and hidden units: the most important ones.

    With batches of inputs (`calibration`) the importance of a unit is the mean size of what it passes on, otherwise
    the size of its weights.

    Raises:
        ValueError: A size is larger than the model's or does not divide, or something in the model cannot be cut.
    """
    config = copy.deepcopy(model.config)
    widths.apply(config)
    student = new_model(model, config)
    axes = _axes(model, student)
    state = model.state_dict()
    scores = _sums(
        (axis, axis.split(state[name].float().cpu(), dim).square().flatten(1).sum(1)) for name, dim, axis in axes
    )
    if calibration is not None:
        scores |= _importance_of_activations(model, axes, calibration)
    kept = _choose(scores)
    for name, dim, axis in axes:
        state[name] = axis.keep(state[name], dim, kept[axis].to(state[name].device))
    student.load_state_dict(state)
    return student.to(device=model.device, dtype=model.dtype)


def _axes(model: PreTrainedModel, student: PreTrainedModel) -> list[tuple[str, int, Axis]]:
    """Name of the parameter, dimension and axis of each dimension whose size differs."""
    config, kind = model.config, type(model).__name__
    intermediates = {value for name in _INTERMEDIATE_SIZES if (value := getattr(config, name, None)) is not None}
    if config.hidden_size in intermediates and config.hidden_size != student.config.hidden_size:
        raise ValueError(
            f"The hidden states and the feed-forward layers of this {kind} are both {config.hidden_size} wide and so "
            "cannot be told from each other. Keep the hidden size."
        )
    smaller = student.state_dict()
    gone = [name for name in model.state_dict() if name not in smaller]
    if gone:
        raise ValueError(
            f"A {kind} of these sizes has no {gone}, so it would not be the teacher's. Choose another `hidden_size`, "
            "or `init='random'`."
        )
    biased = {_unnumbered(name).partition(f".{_BIAS}")[0] for name in smaller if _BIAS in name}
    axes = []
    for name, tensor in model.state_dict().items():
        sizes = f"`{name}` is {tuple(tensor.shape)}, and would be {tuple(smaller[name].shape)}"
        layer = re.match(r"(?:(.*\.\d+)\.)?", name)[1] or ""
        gated = re.search(r"\.(Wi|gate_up_proj)(\.|$)", name) is not None  # holds the gates and then the values
        for dim, (old, new) in enumerate(zip(tensor.shape, smaller[name].shape, strict=True)):
            if old == new:
                continue
            axis = _head_axis(model, name, dim, biased)
            if axis is None and old == config.hidden_size:
                axis = Axis(HIDDEN, "", old)
            if axis is None and old in intermediates:
                axis = Axis(INTERMEDIATE, layer, old)
            if axis is None and gated and dim == ("experts" in name) and old / 2 in intermediates:
                axis = Axis(INTERMEDIATE, layer, old // 2)
            if axis is None or old % (axis.units * axis.width):
                raise ValueError(
                    f"A {kind} cannot be narrowed like this: {sizes}, which counts neither heads nor feed-forward nor "
                    "hidden units. Make the student from a config alone (`init='random'`), or keep these sizes."
                )
            if old < new:
                raise ValueError(
                    f"The student cannot be wider than its teacher: {sizes}. Give smaller sizes, or `init='random'`."
                )
            axes.append((name, dim, replace(axis, kept=axis.units * new // old)))
    return axes


def _head_axis(model: PreTrainedModel, name: str, dim: int, biased: Container[str]) -> Axis | None:
    """The axis of a dimension that counts heads; `None` for another dimension."""
    match = _ATTENTION.fullmatch(name)
    if match is None:
        return None
    config, scope, module = model.config, match["scope"], match["module"]
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    groups = 1 if key_heads in (None, heads) else key_heads
    if _unnumbered(scope) in biased:  # one position bias for all layers (T5), which must keep the same heads
        scope = _unnumbered(scope)
    if module == _BIAS:
        return Axis(HEADS, scope, heads) if dim == 1 else None
    out = int(isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and name.endswith("weight"))
    if module in _KEYS_AND_VALUES and dim == out and groups > 1:
        return Axis(KEY_HEADS, scope, key_heads, head_width(config))
    written = module in _QUERIES | _KEYS_AND_VALUES and dim == out
    read = module in _OUT and name.endswith("weight") and dim == 1 - out
    return Axis(HEADS, scope, heads, head_width(config), groups) if written or read else None


def _unnumbered(name: str) -> str:
    """The name without layer numbers."""
    return re.sub(r"\.\d+", "", name)


def _sums(sizes: Iterable[tuple[Axis, Tensor]]) -> dict[Axis, Tensor]:
    """Sum of the sizes of the units of each axis, those of each parameter normalised to count the same."""
    scores: dict[Axis, Tensor] = {}
    for axis, size in sizes:
        scores[axis] = scores.get(axis, 0.0) + size / size.mean().clamp(min=1e-30)
    return scores


@torch.no_grad()
def _importance_of_activations(
    model: PreTrainedModel, axes: Iterable[tuple[str, int, Axis]], batches: Iterable[Mapping[str, Any]]
) -> dict[Axis, Tensor]:
    """Mean size of what each unit passes on to the projections that read it, over all positions of some batches."""
    sums: dict[tuple[str, Axis], Tensor] = {}

    def add(module: nn.Module, arguments: tuple[Tensor, ...], name: str, axis: Axis) -> None:
        sizes = axis.split(arguments[0].float().flatten(0, -2), 1).square().sum((1, 2)).sqrt()  # (units, positions)
        sums[name, axis] = sums.get((name, axis), 0.0) + sizes.sum(1).cpu()

    with in_evaluation_mode([model]), ExitStack() as hooks:
        for name, dim, axis in axes:
            module = model.get_submodule(name.rpartition(".")[0])
            reads = isinstance(module, (nn.Linear, Conv1D)) and dim == (0 if isinstance(module, Conv1D) else 1)
            if reads and name.endswith(".weight"):
                hook = module.register_forward_pre_hook(partial(add, name=name, axis=axis))
                hooks.callback(hook.remove)
        for batch in batches:
            model(**{key: value.to(model.device) for key, value in batch.items() if isinstance(value, Tensor)})
    if not sums:
        raise ValueError("`calibration` has no batch, or the model ran none of the layers that are cut with it.")
    return _sums((axis, total) for (_, axis), total in sums.items())


def _choose(scores: Mapping[Axis, Tensor]) -> dict[Axis, Tensor]:
    """Indices of the units that each axis keeps, in ascending order.

    If key-value heads are cut, the heads that share them stay or go with them. Otherwise each of these groups keeps
    the same number of heads.
    """
    by_place = {(axis.kind, axis.scope): axis for axis in scores}
    kept = {}
    for axis, score in scores.items():
        other = by_place.get(({HEADS: KEY_HEADS, KEY_HEADS: HEADS}.get(axis.kind), axis.scope))
        if axis.kind == KEY_HEADS and other is not None:
            kept[axis] = _largest(score + scores[other].reshape(axis.units, -1).sum(1), axis.kept)
        elif axis.kind == HEADS and other is not None:
            shared = score.reshape(other.units, -1)
            groups = _largest(scores[other] + shared.sum(1), other.kept)
            kept[axis] = torch.arange(axis.units).reshape(shared.shape)[groups].flatten()
        else:
            chosen = [_largest(part, axis.kept // axis.groups) for part in score.chunk(axis.groups)]
            kept[axis] = torch.cat([part + index * axis.units // axis.groups for index, part in enumerate(chosen)])
    return kept


def _largest(scores: Tensor, number: int) -> Tensor:
    return scores.topk(number).indices.sort().values
