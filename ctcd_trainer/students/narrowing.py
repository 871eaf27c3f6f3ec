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
_KEYS = {"key", "key_proj", "pos_key_proj", "k_proj", "k_lin", "k", "k_norm"}
_VALUES = {"value", "value_proj", "v_proj", "v_lin", "v"}
_OUT = {"dense", "out_proj", "o_proj", "out_lin", "o", "c_proj", "Wo"}
_BIAS = "relative_attention_bias"


@dataclass(frozen=True)
class Widths:
    """Sizes of a narrower model; `None` for a size that stays. True if any size is given.

    Attributes:
        hidden_size: Width of the hidden states.
        intermediate_size: Width of the feed-forward layers.
        num_attention_heads: Number of heads.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None

    def __bool__(self) -> bool:
        return any(size is not None for size in vars(self).values())

    def apply(self, config: PreTrainedConfig) -> None:
        """Set the sizes in a config, under the names that its family has for them.

        Raises:
            ValueError: A size is below 1, the sizes do not fit together, or the family has no such size.
        """
        for argument, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"`{argument}={size}` is not valid: it must be at least 1.")
        self._apply_intermediate_size(config)
        hidden, heads, width = config.hidden_size, config.num_attention_heads, head_width(config)
        free = any(getattr(config, name, None) is not None for name in _HEAD_WIDTHS)
        new_hidden = hidden if self.hidden_size is None else self.hidden_size
        new_heads = self.num_attention_heads
        if new_heads is None:
            new_heads = heads if free or self.hidden_size is None else max(1, new_hidden // width)
        if not free and new_hidden != new_heads * width:
            raise ValueError(
                f"`hidden_size={new_hidden}` and `num_attention_heads={new_heads}` do not fit: the heads of a "
                f"{config.model_type} are hidden_size / num_attention_heads wide, here {hidden} / {heads} = {width}, "
                f"which is kept. Give `hidden_size={new_heads * width}`, or `num_attention_heads` = hidden_size / "
                f"{width}."
            )
        key_heads = getattr(config, "num_key_value_heads", None)
        if key_heads is not None:
            config.num_key_value_heads = _key_heads(heads, key_heads, new_heads)
        for name in _HEAD_WIDTHS:
            if getattr(config, name, None) is not None:
                setattr(config, name, width)
        for name in _HEADS:
            if hasattr(config, name):
                setattr(config, name, new_heads)
        config.hidden_size = new_hidden

    def _apply_intermediate_size(self, config: PreTrainedConfig) -> None:
        names = [name for name in _INTERMEDIATE_SIZES if hasattr(config, name)]
        if self.intermediate_size is not None and not names:
            raise ValueError(
                f"`intermediate_size={self.intermediate_size}`: the config of a {config.model_type} has none of "
                f"{_INTERMEDIATE_SIZES}. Build the student from a smaller config instead."
            )
        for name in names:
            if self.intermediate_size is not None:
                setattr(config, name, self.intermediate_size)
            elif getattr(config, name) is None:  # GPT-2: four times the hidden size, which may change
                setattr(config, name, 4 * config.hidden_size)


def _key_heads(heads: int, key_heads: int, new_heads: int) -> int:
    """Number of key-value heads for fewer heads: the same number of heads share one as before, if that divides.

    Raises:
        ValueError: Neither the sharing nor the key-value heads can stay.
    """
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
    """A model of the same class, whose weights the caller overwrites. The user's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        return type(like)(config)


@dataclass(frozen=True)
class Axis:
    """The units that a dimension of a parameter counts.

    Attributes:
        kind: Kind of the units.
        scope: The layer or the attention within which units are chosen; empty for the whole model.
        units: Number of units.
        width: Number of consecutive indices of a unit; it can differ between parameters with the same units.
        groups: Units come in this many equal groups; the same number is kept in each.
        kept: Number of units that are kept.
    """

    kind: str
    scope: str
    units: int
    width: int = field(default=1, compare=False)
    groups: int = 1
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

    Args:
        model: The model. It is not changed.
        widths: The sizes.
        calibration: Batches of inputs. With them the importance of a unit is the mean size of what it passes on,
            otherwise the size of its weights.

    Raises:
        ValueError: A size is larger than the model's or does not divide, or something in the model cannot be cut.
    """
    config = copy.deepcopy(model.config)
    widths.apply(config)
    student = new_model(model, config)
    axes = _axes(model, student)
    state = model.state_dict()
    scores = _importance_of_weights(state, axes)
    if calibration is not None:
        scores |= _importance_of_activations(model, axes, calibration)
    kept = _choose(scores)
    for name, dims in axes.items():
        for dim, axis in dims.items():
            state[name] = axis.keep(state[name], dim, kept[axis].to(state[name].device))
    student.load_state_dict(state)
    return student.to(device=model.device, dtype=model.dtype)


def _axes(model: PreTrainedModel, student: PreTrainedModel) -> dict[str, dict[int, Axis]]:
    """The axis of each dimension whose size differs, by name of the parameter and dimension.

    Raises:
        ValueError: A dimension belongs to no axis, is larger than the model's, or could belong to two axes.
    """
    config = model.config
    intermediates = {value for name in _INTERMEDIATE_SIZES if (value := getattr(config, name, None)) is not None}
    if config.hidden_size in intermediates and config.hidden_size != student.config.hidden_size:
        raise ValueError(
            f"The hidden states and the feed-forward layers of this {type(model).__name__} are both "
            f"{config.hidden_size} wide, so they cannot be told from each other. Keep the hidden size."
        )
    smaller = student.state_dict()
    axes: dict[str, dict[int, Axis]] = {}
    gone = [name for name in model.state_dict() if name not in smaller]
    if gone:
        raise ValueError(
            f"A {type(model).__name__} of these sizes has no {gone}, so it would not be the teacher's. Choose another "
            "`hidden_size`, or `init='random'`."
        )
    biased = {_unnumbered(name).partition(f".{_BIAS}")[0] for name in smaller if _BIAS in name}
    for name, tensor in model.state_dict().items():
        for dim, (old, new) in enumerate(zip(tensor.shape, smaller[name].shape, strict=True)):
            if old == new:
                continue
            axis = _head_axis(model, name, dim, biased)
            if axis is None and old == config.hidden_size:
                axis = Axis(HIDDEN, "", old)
            if axis is None and old in intermediates | {2 * size for size in intermediates if _gated(name, dim)}:
                axis = Axis(INTERMEDIATE, _layer(name), old if old in intermediates else old // 2)
            if axis is None or old % (axis.units * axis.width):
                raise ValueError(
                    f"A {type(model).__name__} cannot be narrowed like this: `{name}` is {tuple(tensor.shape)}, would "
                    f"be {tuple(smaller[name].shape)}, and counts neither heads nor feed-forward nor hidden units. "
                    "Make the student from a config alone (`init='random'`), or keep these sizes."
                )
            if old < new:
                raise ValueError(
                    f"The student cannot be wider than its teacher: `{name}` is {tuple(tensor.shape)}, and would be "
                    f"{tuple(smaller[name].shape)}. Give smaller sizes, or `init='random'`."
                )
            axes.setdefault(name, {})[dim] = replace(axis, kept=axis.units * new // old)
    return axes


def _layer(name: str) -> str:
    """Name of the innermost layer that a parameter is in."""
    match = re.match(r"(.*\.\d+)\.", name)
    return match[1] if match else ""


def _gated(name: str, dim: int) -> bool:
    """Tell whether a dimension holds the gates and then the values of a feed-forward layer."""
    return re.search(r"\.(Wi|gate_up_proj)(\.|$)", name) is not None and dim == ("experts" in name)


def _head_axis(model: PreTrainedModel, name: str, dim: int, biased: Container[str]) -> Axis | None:
    """The axis of a dimension that counts heads; `None` for another dimension.

    Args:
        model: The model.
        name: Name of the parameter.
        dim: The dimension.
        biased: Attentions, without layer numbers, that use one position bias in all layers (T5). Their layers must
            keep the same heads.
    """
    match = _ATTENTION.fullmatch(name)
    if match is None:
        return None
    config, scope, module = model.config, match["scope"], match["module"]
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    groups = 1 if key_heads in (None, heads) else key_heads
    scope = _unnumbered(scope) if _unnumbered(scope) in biased else scope
    if module == _BIAS:
        return Axis(HEADS, scope, heads) if dim == 1 else None
    out = int(isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and name.endswith("weight"))
    if module in _QUERIES and dim == out:
        return Axis(HEADS, scope, heads, head_width(config), groups)
    if module in _KEYS | _VALUES and dim == out:
        if groups > 1:
            return Axis(KEY_HEADS, scope, key_heads, head_width(config))
        return Axis(HEADS, scope, heads, head_width(config))
    if module in _OUT and name.endswith("weight") and dim == 1 - out:
        return Axis(HEADS, scope, heads, head_width(config), groups)
    return None


def _unnumbered(name: str) -> str:
    """The name without layer numbers."""
    return re.sub(r"\.\d+", "", name)


def _importance_of_weights(state: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, Axis]]) -> dict[Axis, Tensor]:
    """Sum of the squared weights of each unit, each parameter normalised to count the same."""
    scores: dict[Axis, Tensor] = {}
    for name, dims in axes.items():
        for dim, axis in dims.items():
            squares = axis.split(state[name].float().cpu(), dim).square().flatten(1).sum(1)
            scores[axis] = scores.get(axis, 0.0) + squares / squares.mean().clamp(min=1e-30)
    return scores


@torch.no_grad()
def _importance_of_activations(
    model: PreTrainedModel, axes: Mapping[str, Mapping[int, Axis]], batches: Iterable[Mapping[str, Any]]
) -> dict[Axis, Tensor]:
    """Mean size of what each unit passes on to the projections that read it, over all positions of some batches.

    Raises:
        ValueError: No batch reached a projection.
    """
    sums: dict[tuple[str, Axis], Tensor] = {}

    def add(module: nn.Module, arguments: tuple[Tensor, ...], key: tuple[str, Axis]) -> None:
        axis = key[1]
        sizes = axis.split(arguments[0].float().flatten(0, -2), 1).square().sum((1, 2)).sqrt()  # (units, positions)
        sums[key] = sums.get(key, 0.0) + sizes.sum(1).cpu()

    with in_evaluation_mode([model]), ExitStack() as hooks:
        for name, dims in axes.items():
            owner = name.rpartition(".")[0]
            module = model.get_submodule(owner)
            read = 0 if isinstance(module, Conv1D) else 1
            if isinstance(module, (nn.Linear, Conv1D)) and name.endswith(".weight") and read in dims:
                hook = module.register_forward_pre_hook(partial(add, key=(owner, dims[read])))
                hooks.callback(hook.remove)
        for batch in batches:
            model(**{key: value.to(model.device) for key, value in batch.items() if isinstance(value, Tensor)})
    scores: dict[Axis, Tensor] = {}
    for (_, axis), total in sums.items():
        scores[axis] = scores.get(axis, 0.0) + total / total.mean().clamp(min=1e-30)
    if not scores:
        raise ValueError("`calibration` has no batch, or the model ran none of the layers that are cut with it.")
    return scores


def _choose(scores: Mapping[Axis, Tensor]) -> dict[Axis, Tensor]:
    """Choose the units that each axis keeps; indices in ascending order.

    If key-value heads are cut, the heads that share them stay or go with them. Otherwise each of these groups keeps
    the same number of heads.
    """
    by_place = {(axis.kind, axis.scope): axis for axis in scores}
    kept = {}
    for axis, score in scores.items():
        keys = by_place.get((KEY_HEADS, axis.scope)) if axis.kind == HEADS else None
        if axis.kind == KEY_HEADS and (heads := by_place.get((HEADS, axis.scope))) is not None:
            kept[axis] = _largest(score + scores[heads].reshape(axis.units, -1).sum(1), axis.kept)
        elif keys is not None:
            size = axis.units // keys.units
            groups = _largest(scores[keys] + score.reshape(keys.units, size).sum(1), keys.kept)
            kept[axis] = (groups[:, None] * size + torch.arange(size)).flatten()
        elif axis.groups > 1:
            chosen = [_largest(part, axis.kept // axis.groups) for part in score.chunk(axis.groups)]
            kept[axis] = torch.cat([part + index * (axis.units // axis.groups) for index, part in enumerate(chosen)])
        else:
            kept[axis] = _largest(score, axis.kept)
    return kept


def _largest(scores: Tensor, number: int) -> Tensor:
    return scores.topk(number).indices.sort().values
