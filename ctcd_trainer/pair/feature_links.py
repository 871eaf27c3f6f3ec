"""The feature losses of a pair: which layers are compared, the hooks that read them, and projections of widths."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..arguments import DistillationArguments
from ..checks import argument_of
from ..feature_losses import FEATURE_LOSSES, Vectors, parse_layers
from ..graph import FeatureEdge
from ..model_structure import Projections, attention_projections, base_model, layers_of
from ..tasks.labels import IGNORE_INDEX

#: The tensors that attentions compute.
_OF_ATTENTION = ("queries", "keys", "values")


class _Record:
    """Outputs of some modules of one model, by name in the order of their calls, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.outputs: dict[str, list[Any]] = {}


def _record(record: _Record, name: str, _module: nn.Module, _arguments: Any, output: Any) -> None:
    """Keep an output. A copy of the model has a copy of the record, which nobody sets on."""
    if record.on:
        record.outputs[name].append(output)


@dataclass(frozen=True)
class _Layer:
    """The modules of a layer whose outputs are compared.

    Attributes:
        names: The names of the modules in the model.
        call: The number of the call, from 0, where one module is several layers (ALBERT).
        attention: How the outputs of the modules are queries, keys and values; `None` for hidden states.
    """

    names: tuple[str, ...]
    call: int
    attention: Projections | None = None


class _Tap:
    """Reads layers of one model by forward hooks.

    Args:
        argument: Name of the trainer's argument that gave the model.
        model: The model.
        reads: The tensors to read; see `FeatureLoss`.
        layers: The stack and the index of each layer that is read.

    Raises:
        ValueError: The model has no such layers or projections.
    """

    def __init__(self, argument: str, model: nn.Module, reads: tuple[str, ...], layers: set[tuple[int, int]]) -> None:
        self.argument, self.model, self.reads = argument, base_model(model), reads
        self.record = _Record()
        self.layers: dict[tuple[int, int], _Layer] = {}
        self.heads = getattr(self.model.config, "num_attention_heads", 1)
        stacks = layers_of(self.model)
        for stack, index in sorted(layers):
            name, call = stacks[stack][index]
            if reads == ("hidden",):
                self.layers[stack, index] = _Layer((name,), call)
                continue
            found = attention_projections(self.model.get_submodule(name))
            if found is None:
                raise ValueError(
                    f"`feature_loss` compares {', '.join(reads)}, and in the layers of `{argument}`, a "
                    f"{type(self.model).__name__}, their projections are not found. Use `feature_loss='hidden'`."
                )
            self.layers[stack, index] = _Layer(tuple(f"{name}.{part}" for part in found.names), call, found)
        self.handles: list[RemovableHandle] = []

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that are read, by name."""
        return {name: self.model.get_submodule(name) for layer in self.layers.values() for name in layer.names}

    def install(self) -> None:
        """Register the hooks."""
        for name, module in self.modules.items():
            self.record.outputs[name] = []
            self.handles.append(module.register_forward_hook(partial(_record, self.record, name)))

    def vectors(self, stack: int, index: int, length: int | None) -> Vectors:
        """Return what the last forward of the model has computed in a layer.

        Args:
            stack: Number of the stack.
            index: Number of the layer in it.
            length: Number of tokens, after the virtual ones of prompt tuning; `None` for all positions.

        Raises:
            ValueError: The layer did not run, or has no tensors `(rows, positions, width)`.
        """
        layer = self.layers[stack, index]
        calls = [self.record.outputs[name] for name in layer.names]
        kind = f"`{self.argument}`, a {type(self.model).__name__},"
        if any(len(each) <= layer.call for each in calls):
            raise ValueError(
                f"{kind} has not run its layer {index}, which the feature loss reads. Set `layerdrop` in its config "
                "to 0, or choose other `feature_layers`."
            )
        outputs = [each[layer.call] for each in calls]
        outputs = [each if isinstance(each, Tensor) else each[0] for each in outputs]
        if layer.attention is not None:
            outputs = layer.attention.split(outputs, self.heads)
        shapes = [tuple(each.shape) for each in outputs]
        if any(each.ndim != 3 for each in outputs):
            raise ValueError(
                f"The layers of {kind} give tensors of the shapes {shapes}, and the feature loss needs (rows, "
                "positions, width). Set `student_feature_weight=0`."
            )
        names = ("hidden",) if layer.attention is None else _OF_ATTENTION
        kept = {name: output for name, output in zip(names, outputs, strict=True) if name in self.reads}
        start = 0 if length is None else max(0, outputs[0].shape[1] - length)
        return Vectors(
            {name: each[:, start:].to(torch.promote_types(each.dtype, torch.float32)) for name, each in kept.items()},
            self.heads,
        )


class FeatureLinks(nn.Module):
    """One feature loss: the layers of two models that are compared, and projections where their widths differ.

    The projections are trained with the learner, and are no part of it. The hooks stay until `remove`; outside of
    `recording` they keep nothing.

    Args:
        edge: The models and the weight.
        models: All models by name.
        arguments: The arguments of the feature loss.

    Raises:
        ValueError: The models have no layers or projections that can be compared, or `feature_layers` does not fit.
    """

    def __init__(self, edge: FeatureEdge, models: Mapping[str, nn.Module], arguments: DistillationArguments) -> None:
        super().__init__()
        self.edge = edge
        self.comparison = FEATURE_LOSSES[arguments.feature_loss]
        pair = {name: base_model(models[name]) for name in (edge.learner, edge.source)}
        stacks = {name: _stacks_of(argument_of(name), model) for name, model in pair.items()}
        ours, theirs = ([len(stack) for stack in each] for each in stacks.values())
        if len(ours) != len(theirs):
            raise ValueError(
                f"`student_feature_weight={edge.weight}` compares layers, and `{argument_of(edge.learner)}` has "
                f"{len(ours)} stacks of layers, `{argument_of(edge.source)}` has {len(theirs)}. Choose two models "
                "with the same parts, or set the weight to 0."
            )
        #: The number of the stack, the learner's layer and the source's layer of each comparison.
        self.links: list[tuple[int, int, int]] = []
        kept, of = (getattr(pair[edge.learner], name, None) for name in ("cut_layers", "cut_depth"))
        for stack, depths in enumerate(zip(ours, theirs, strict=True)):
            cut = kept if depths == (len(kept or ()), of) else None
            for layer, target in self._map(arguments.feature_layers, *depths, cut):
                self.links.append((stack, layer, target))
        self.taps: dict[str, _Tap] = {}
        for at, (name, model) in enumerate(pair.items(), 1):
            wanted = {(link[0], link[at]) for link in self.links}
            self.taps[name] = _Tap(argument_of(name), model, self.comparison.reads, wanted)
        first, second = ({*tap.modules.values()} for tap in self.taps.values())
        if first & second:
            raise ValueError(
                f"`student_feature_weight={edge.weight}`: `{argument_of(edge.learner)}` and "
                f"`{argument_of(edge.source)}` have the same modules in the layers that are compared. Make the "
                "student with `create_student(..., init='copy')`, or set the weight to 0."
            )
        self.projections = nn.ModuleDict()
        widths = [model.config.hidden_size for model in pair.values()]
        if self.comparison.same_width and widths[0] != widths[1]:
            with torch.random.fork_rng(devices=[]):  # the rest of the training draws what it would draw without
                for stack, layer, target in self.links:
                    self.projections[f"{stack}_{layer}_{target}"] = nn.Linear(*widths)
        for tap in self.taps.values():
            tap.install()

    def _map(self, given: str | None, depth: int, of: int, kept: list[int] | None) -> list[tuple[int, int]]:
        """Return the pairs of layers of one stack; see `default_layers`."""
        if given is None:
            pairs = list(enumerate(default_layers(depth, of, kept)))
            return pairs[-1:] if self.comparison.last_only else pairs
        for layer, target in parse_layers(given):
            if layer >= depth or target >= of:
                raise ValueError(
                    f"`feature_layers={given!r}` has the pair {layer}:{target}, and the {self.edge.learner} has "
                    f"layers 0 to {depth - 1}, the {self.edge.source} 0 to {of - 1}. Correct the pair."
                )
        return parse_layers(given)

    def remove(self) -> None:
        """Remove the hooks."""
        for tap in self.taps.values():
            while tap.handles:
                tap.handles.pop().remove()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the layers compute while the block runs."""
        records = [tap.record for tap in self.taps.values()]
        for record in records:
            record.on = True
        try:
            yield
        finally:
            for record in records:
                record.on = False
                for outputs in record.outputs.values():
                    outputs.clear()

    @torch.compiler.disable  # many small graphs, which would take longer to compile than they save
    def loss(self, inputs: Mapping[str, Mapping[str, Any]]) -> Tensor:
        """Compute the mean over the rows of a batch, each the mean over its positions, from what was recorded.

        Args:
            inputs: The inputs of each of the two models by name, with labels if there are any.

        Returns:
            0-dimensional, in fp32. The source's layers are detached.

        Raises:
            ValueError: The positions of the models differ, or no gradient reaches the learner's layers.
        """
        learner, source = self.edge.learner, self.edge.source
        losses = []
        for stack, layer, target in self.links:
            masks = {name: _mask_of(stack, inputs[name]) for name in (learner, source)}
            lengths = {name: None if mask is None else mask.shape[-1] for name, mask in masks.items()}
            ours = self.taps[learner].vectors(stack, layer, lengths[learner])
            theirs = self.taps[source].vectors(stack, target, lengths[source])
            theirs = Vectors({name: each.detach() for name, each in theirs.tensors.items()}, theirs.heads)
            self._check(ours, theirs)
            projection = f"{stack}_{layer}_{target}"
            if projection in self.projections:
                ours = Vectors({name: self.projections[projection](each) for name, each in ours.tensors.items()})
            first = next(iter(ours.tensors.values()))
            counted = first.new_ones(first.shape[:2], dtype=torch.bool)
            for name, mask in masks.items():
                if mask is not None:
                    counted = counted & self._fitted(name, mask, counted)
            values = self.comparison.values(ours, theirs, counted, self._causal(stack, layer))
            values = torch.where(counted, values, 0.0).sum(1) / counted.sum(1).clamp(min=1)
            losses.append(values.mean())
        return torch.stack(losses).mean()

    def _causal(self, stack: int, layer: int) -> bool:
        attention = self.taps[self.edge.learner].layers[stack, layer].attention
        return attention is not None and attention.causal

    def _check(self, ours: Vectors, theirs: Vectors) -> None:
        """Refuse layers that cannot be compared, or that nothing trains."""
        shapes = [tuple(next(iter(each.tensors.values())).shape[:2]) for each in (ours, theirs)]
        learner, source = (argument_of(name) for name in self.taps)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The layers of `{learner}` and `{source}` have {shapes[0]} and {shapes[1]} rows and positions, which "
                "cannot be compared. Give both models the same positions, or set `student_feature_weight=0`."
            )
        if torch.is_grad_enabled() and not any(each.requires_grad for each in ours.tensors.values()):
            raise ValueError(
                f"No gradient reaches the layers of `{learner}` that the feature loss reads: their parameters are "
                "frozen. Choose higher `feature_layers`, train these parameters, or set `student_feature_weight=0`."
            )

    def _fitted(self, name: str, mask: Tensor, like: Tensor) -> Tensor:
        """Return the mask of a model's inputs for the positions of its layers, bool `(rows, positions)`."""
        model = self.taps[name].model
        if mask.shape[-1] != like.shape[-1] and hasattr(model, "_get_feature_vector_attention_mask"):
            mask = model._get_feature_vector_attention_mask(like.shape[-1], mask)  # a position is many samples
        if mask.shape != like.shape:
            raise ValueError(
                f"The mask of `{argument_of(name)}` has the shape {tuple(mask.shape)}, and its layers have "
                f"{tuple(like.shape)} rows and positions, so that padding cannot be told. Pass a mask of one value a "
                "position, or set `student_feature_weight=0`."
            )
        return mask.bool()


def default_layers(depth: int, of: int, kept: list[int] | None = None) -> list[int]:
    """Return the source's layer for each layer of the learner: the end of the span that it replaces, from 0.

    A layer that was cut out of the source was trained on the outputs of the layer before it. So the learner's layer
    below it learns to give those: with the layers 0, 2 and 5 of 6, the targets are 1, 4 and 5.

    Args:
        depth: Number of layers of the learner.
        of: Number of layers of the source.
        kept: The source's layers that the learner was made of; `None` if unknown. Then spans are even.
    """
    if kept is None:
        return [-(-(index + 1) * of // depth) - 1 for index in range(depth)]
    return [*(index - 1 for index in kept[1:]), of - 1]


def _stacks_of(argument: str, model: nn.Module) -> list[list[tuple[str, int]]]:
    """Return the layers of a model; see `layers_of`."""
    config = getattr(model, "config", None)
    dropped = [name for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop") if getattr(config, name, 0)]
    if dropped:
        raise ValueError(
            f"`student_feature_weight` compares layers, and `{argument}` leaves some out at random: its config has "
            f"`{dropped[0]}={getattr(config, dropped[0])}`. Set it to 0."
        )
    try:
        return layers_of(model)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"`student_feature_weight` compares layers, and the layers of `{argument}`, a {type(model).__name__}, are "
            f"not found ({error}). Set the weight to 0."
        ) from error


def _mask_of(stack: int, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the mask of one stack, `(rows, positions)`: of the only one, or of the encoder or the decoder."""
    mask = inputs.get("attention_mask" if stack == 0 else "decoder_attention_mask")
    if mask is None and stack == 1 and isinstance(inputs.get("labels"), Tensor):
        mask = inputs["labels"].ne(IGNORE_INDEX)
    return None if mask is None else mask.flatten(0, -2)  # multiple choice: a row for each choice
