"""Facts about any model: its PEFT wrapper, quantisation, layers, inputs and size."""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel

#: Attributes of a config that count the layers of each stack: the encoder's (or the only stack's), the decoder's.
_DEPTHS = (("num_hidden_layers", "num_decoder_layers"), ("encoder_layers", "decoder_layers"))
#: Names of the projections to queries, keys and values in an attention, where each is a module of its own.
_PROJECTIONS = (
    *(("query", "key", "value"), ("query_proj", "key_proj", "value_proj"), ("q_proj", "k_proj", "v_proj")),
    *(("q_lin", "k_lin", "v_lin"), ("q", "k", "v")),
)
#: Names of one projection to all three: one after the other, or for each head.
_JOINT, _BY_HEAD = ("c_attn", "Wqkv"), "query_key_value"


# ---- Wrappers and modes ----


def is_peft_model(model: nn.Module) -> bool:
    """Tell whether PEFT wraps a model, without importing PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def config_of(model: nn.Module) -> PreTrainedConfig | None:
    """Return the config of a model, PEFT-wrapped or not; `None` for a plain module."""
    return getattr(base_model(model), "config", None)


def main_input_of(model: nn.Module) -> str:
    """Return the name of the main input of a model, PEFT-wrapped or not; a plain module is taken for one of texts."""
    return getattr(base_model(model), "main_input_name", "input_ids")


def is_quantised(model: nn.Module) -> bool:
    """Tell whether `from_pretrained` has quantised the weights of a model (`quantization_config`)."""
    return getattr(model, "quantization_method", None) is not None


@contextmanager
def hidden_quantisation(model: nn.Module) -> Iterator[None]:
    """Hide from Trainer that a frozen model is quantised; Trainer refuses such models without adapters."""
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


@contextmanager
def restored(models: Iterable[nn.Module]) -> Iterator[None]:
    """Give every module its former mode, and every parameter its `requires_grad`, when the block ends."""
    models = list(models)
    modes = {module: module.training for model in models for module in model.modules()}
    trained = {parameter: parameter.requires_grad for model in models for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def in_evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Switch models to evaluation mode for a while; afterwards every module is in its former mode."""
    models = list(models)
    with restored(models):
        for model in models:
            model.eval()
        yield


# ---- Parameters ----


def memory_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; for a quantised tensor, the address of its first part."""
    if is_traceable_wrapper_subclass(tensor):
        return memory_of(getattr(tensor, tensor.__tensor_flatten__()[0][0]))
    return tensor.untyped_storage().data_ptr()


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, also where DeepSpeed ZeRO-3 leaves stubs on this process."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def is_divided(model: nn.Module) -> bool:
    """Tell whether DeepSpeed ZeRO-3 has divided the parameters of a model among the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole_parameters(model: nn.Module) -> AbstractContextManager:
    """Gather all parameters of a model on every process for a while, to read them.

    With ZeRO-3, `from_pretrained` divides a model among the processes as soon as the training arguments exist.
    """
    if not is_divided(model):
        return nullcontext()
    from deepspeed import zero  # installed, since it has divided the parameters

    return zero.GatheredParameters([parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")])


def parameter_uses(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter directly, by the parameter's `id`; tied parameters have several."""
    held = (module._parameters.values() for module in model.modules())
    return Counter(id(parameter) for parameters in held for parameter in parameters if parameter is not None)


def is_tied(layer: nn.Module, uses: Counter[int]) -> bool:
    """Tell whether a parameter of a layer is also held outside of it.

    Args:
        layer: A part of a model.
        uses: `parameter_uses` of the whole model.
    """
    return any(count < uses[key] for key, count in parameter_uses(layer).items())


# ---- Inputs and layers ----


def most_positions(model: nn.Module) -> int | None:
    """Return the number of tokens for which a model has position embeddings; `None` without a table of them."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's first positions
            return module.num_embeddings - unused
    return None


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the inputs that `forward` declares (of the model inside a PEFT wrapper)."""
    parameters = inspect.signature(type(base_model(model)).forward).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)) - {"self"}


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Tell whether a model takes `num_items_in_batch`, by the rule of Trainer (which knows it of one model only)."""
    model = base_model(model)
    if hasattr(model, "accepts_loss_kwargs"):
        return model.accepts_loss_kwargs
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def embeddings_of(model: nn.Module, getter: str) -> nn.Module | None:
    """Return the layer of `get_input_embeddings` or `get_output_embeddings`, `None` if the model has none.

    Args:
        model: The model.
        getter: Name of the method.
    """
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def layer_classes(models: Iterable[nn.Module]) -> list[str]:
    """Return the class names of the layers that FSDP may shard one by one.

    These are the layers that a model wants to keep whole (`_no_split_modules`) or, where it does not say (DistilBERT),
    the modules in its outermost lists. Layers that hold a tied parameter are left out (BERT's embeddings, if its head
    is tied to them), as is the layer with the input embeddings, which accelerate shards by itself.
    """
    found: set[str] = set()
    for model in models:
        names = set(getattr(base_model(model), "_no_split_modules", None) or _listed(model))
        layers = [module for module in model.modules() if type(module).__name__ in names]
        uses, embeddings = parameter_uses(model), embeddings_of(base_model(model), "get_input_embeddings")
        left_out = {type(layer).__name__ for layer in layers if embeddings in layer.modules() or is_tied(layer, uses)}
        found |= {type(layer).__name__ for layer in layers} - left_out
    return sorted(found)


def _listed(model: nn.Module) -> Iterator[str]:
    """Yield the class names of the modules in the outermost `ModuleList`s of a model."""
    for child in model.children():
        yield from (type(layer).__name__ for layer in child) if isinstance(child, nn.ModuleList) else _listed(child)


def depth_attributes(config: PreTrainedConfig) -> list[str]:
    """Return the attributes of a config that count the layers of each stack.

    Raises:
        ValueError: The config has none.
    """
    for encoder, decoder in _DEPTHS:
        if getattr(config, decoder, None) is not None and hasattr(config, encoder):
            return [encoder, decoder]
    if not hasattr(config, "num_hidden_layers"):
        raise ValueError(
            f"The config of a {config.model_type} has no `num_hidden_layers`, so layers cannot be left out. Build the "
            "student from a smaller config instead."
        )
    return ["num_hidden_layers"]


def layer_stacks(model: PreTrainedModel) -> list[str]:
    """Return the names of the stacks of layers, the encoder's first; none if one layer runs several times (ALBERT).

    Raises:
        ValueError: The stacks cannot be told from other lists of modules.
    """
    if getattr(model.config, "num_hidden_groups", None) == 1:
        return []
    sizes = [getattr(model.config, attribute) for attribute in depth_attributes(model.config)]
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) in sizes
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{outer}.") for outer in stacks)]
    if len(stacks) > len(sizes):  # a stack of convolutions, say, with as many layers
        stacks = [
            name for name in stacks if any("att" in part for part, _ in model.get_submodule(name).named_modules())
        ]
    if len(stacks) > 1:
        stacks.sort(key=lambda name: "decoder" in name.split("."))
    if [len(model.get_submodule(name)) for name in stacks] != sizes:
        raise ValueError(
            f"A {type(model).__name__} has {len(stacks)} stacks of layers {stacks} where {sizes} layers are expected, "
            "and cutting needs exactly one for each. Build the student from a smaller config instead."
        )
    return stacks


def layers_of(model: PreTrainedModel) -> list[list[tuple[str, int]]]:
    """Return the layers of each stack, the encoder's first: the name of the module, and the number of its call from 0.

    Raises:
        ValueError: See `layer_stacks`.
    """
    stacks = layer_stacks(model)
    if stacks:
        return [[(f"{stack}.{index}", 0) for index in range(len(model.get_submodule(stack)))] for stack in stacks]
    group = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [[(f"{group}.0", index) for index in range(model.config.num_hidden_layers)]]


@dataclass(frozen=True)
class Projections:
    """The modules of an attention that compute its queries, keys and values.

    Attributes:
        names: The names of the modules in the layer, one for each or one for all.
        causal: Whether a position attends to earlier positions only.
    """

    names: tuple[str, ...]
    causal: bool

    def split(self, outputs: list[Tensor], heads: int) -> list[Tensor]:
        """Return queries, keys and values `(rows, positions, width)` from the outputs of the modules."""
        if len(outputs) == 3:
            return outputs
        if self.names[0].rpartition(".")[2] != _BY_HEAD:
            return list(outputs[0].chunk(3, -1))
        return [part.flatten(-2) for part in outputs[0].unflatten(-1, (heads, 3, -1)).unbind(-2)]


def attention_projections(layer: nn.Module) -> Projections | None:
    """Find the projections of the self-attention of a layer, which comes before one to an encoder; `None` if unknown.

    One projection to all three is taken only where the three are equally wide.
    """
    for name, module in layer.named_modules():
        for names in (*_PROJECTIONS, *((joint,) for joint in (*_JOINT, _BY_HEAD))):
            parts = [getattr(module, part, None) for part in names]
            if all(isinstance(part, nn.Module) for part in parts) and (len(parts) == 3 or _is_threefold(parts[0])):
                causal = getattr(module, "is_causal", names == (_BY_HEAD,))
                return Projections(tuple(f"{name}.{part}".lstrip(".") for part in names), causal)
    return None


def _is_threefold(module: nn.Module) -> bool:
    """Tell whether a linear layer has three outputs for each input."""
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return weight is not None and 3 * min(weight.shape) == max(weight.shape)
