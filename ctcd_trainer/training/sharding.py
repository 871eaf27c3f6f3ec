"""What differs where each process holds a part of the parameters (FSDP, ZeRO-3)."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

from ..model_structure import base_model


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float, wrapper: nn.Module | None = None) -> Tensor:
    """Clip the gradients of one model to their own norm, wherever they are.

    Args:
        parameters: The parameters of the model.
        max_norm: The norm; infinity to measure alone.
        wrapper: The `FullyShardedDataParallel` (FSDP1) that the model is in, whose processes hold parts of the
            gradients as plain tensors.

    Returns:
        The norm before, over all processes, 0-dimensional.
    """
    parameters = list(parameters)
    if wrapper is None or wrapper.sharding_strategy == ShardingStrategy.NO_SHARD:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: a DTensor
    part = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    squares = part.to(wrapper.compute_device).float().square()
    dist.all_reduce(squares, group=wrapper.process_group)
    norm = squares.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def shard_frozen(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model that is only run, in place, as FSDP2 shards the ones that are trained.

    Args:
        model: The model; nothing happens if it is sharded already.
        accelerator: Of a training with FSDP2.
    """
    plugin = accelerator.state.fsdp_plugin
    own = copy.copy(plugin)  # the names of its layers would stay in the plugin
    own.transformer_cls_names_to_wrap = layer_classes([model])
    accelerator.state.fsdp_plugin = own
    try:
        with tied_layers_in_root(model):
            fsdp2_prepare_model(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = plugin


def whole_parameters(model: nn.Module) -> AbstractContextManager:
    """Have all of a model's parameters for a while, to read them, on every process.

    With ZeRO-3, `from_pretrained` divides a model among the processes as soon as the training arguments are made.
    """
    divided = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    from deepspeed import zero  # it is there, since it has divided them

    return zero.GatheredParameters(divided)


@contextmanager
def tied_layers_in_root(model: nn.Module) -> Iterator[None]:
    """Let accelerate shard embeddings and output layers by themselves only if they share no parameter.

    FSDP2 refuses a parameter in two units: BERT's output layer shares its bias with the head that it is in. What is in
    no unit of its own is sharded with the root, and there parameters may be shared.
    """
    uses = _uses(model)
    hidden = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        layer = _layer(model, name)
        if layer is not None and any(count < uses[key] for key, count in _uses(layer).items()):
            hidden.append(name)
    for name in hidden:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in hidden:
            delattr(model, name)


def layer_classes(models: Iterable[nn.Module]) -> list[str]:
    """Names of the classes of layers that models want to keep whole, as far as they can be sharded each by itself.

    Where a model does not say (DistilBERT), they are what it has lists of. That leaves out layers with a parameter
    that another part of the model has as well (BERT's embeddings, if its head is tied to them), and with the input
    embeddings, which accelerate shards by themselves.
    """
    found: set[str] = set()
    for model in models:
        names = set(getattr(base_model(model), "_no_split_modules", None) or _listed(model))
        layers = [module for module in model.modules() if type(module).__name__ in names]
        uses, embeddings = _uses(model), _layer(base_model(model), "get_input_embeddings")
        left_out = {
            type(layer).__name__
            for layer in layers
            if embeddings in layer.modules() or any(count < uses[key] for key, count in _uses(layer).items())
        }
        found |= {type(layer).__name__ for layer in layers} - left_out
    return sorted(found)


def _listed(model: nn.Module) -> Iterator[str]:
    """Names of the classes of what is in the outermost lists of a model."""
    for child in model.children():
        yield from (type(layer).__name__ for layer in child) if isinstance(child, nn.ModuleList) else _listed(child)


def _uses(model: nn.Module) -> Counter[int]:
    """How many modules have a parameter as their own, by its `id`."""
    parts = (part._parameters.values() for part in model.modules())
    return Counter(id(parameter) for parameters in parts for parameter in parameters if parameter is not None)


def _layer(model: nn.Module, getter: str) -> nn.Module | None:
    """The embeddings or the output layer of a model, if it has any and knows them."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
