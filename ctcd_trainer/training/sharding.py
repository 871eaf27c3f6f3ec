"""FSDP: clip, wrap and place models that are divided among processes."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

from ..model_structure import embeddings_of, is_tied, layer_classes, parameter_uses


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float, wrapper: nn.Module | None = None) -> Tensor:
    """Clip the gradients of one model to their own norm, wherever the processes hold them.

    Args:
        parameters: The parameters of the model.
        max_norm: The norm; infinity only measures.
        wrapper: The `FullyShardedDataParallel` (FSDP1) around the model, whose processes hold parts of the gradients
            as plain tensors.

    Returns:
        The norm before clipping, over all processes, 0-dimensional.
    """
    parameters = list(parameters)
    if wrapper is None or wrapper.sharding_strategy == ShardingStrategy.NO_SHARD:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 gives a DTensor
    part = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    squares = part.to(wrapper.compute_device).float().square()
    dist.all_reduce(squares, group=wrapper.process_group)
    norm = squares.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def shard_frozen(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model that is only run, in place, as FSDP2 shards the trained models.

    Args:
        model: The model; nothing happens if it is sharded already.
        accelerator: The accelerator of a training with FSDP2.
    """
    plugin = accelerator.state.fsdp_plugin
    changed = copy.copy(plugin)  # accelerate would keep the class names of this model's layers in the plugin
    changed.transformer_cls_names_to_wrap = layer_classes([model])
    accelerator.state.fsdp_plugin = changed
    try:
        with heads_in_root(model, all_heads=True):
            # The fused pass reads the weights of its output layer after its forward, so the root stays gathered.
            fsdp2_prepare_model(accelerator, model).set_reshard_after_forward(False, recurse=False)
    finally:
        accelerator.state.fsdp_plugin = plugin


@contextmanager
def heads_in_root(model: nn.Module, all_heads: bool = False) -> Iterator[None]:
    """Hide from accelerate the embeddings and output layers that must not become FSDP2 units.

    accelerate makes a unit of the input embeddings and of the output layer. FSDP2 refuses a parameter in two units,
    and BERT's output layer shares its bias with its parent. A layer in no unit is sharded with the root, where
    parameters may be shared.

    Args:
        model: The model that is about to be sharded.
        all_heads: Whether to keep every output layer in the root, whose parameters are whole while it runs: the fused
            pass reads the weights of the output layers.
    """
    uses = parameter_uses(model)
    hidden = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        layer = embeddings_of(model, name)
        if layer is not None and (is_tied(layer, uses) or (all_heads and name == "get_output_embeddings")):
            hidden.append(name)
    for name in hidden:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in hidden:
            delattr(model, name)
