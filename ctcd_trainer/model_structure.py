"""Models inside of PEFT, with quantised weights, or in evaluation mode for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT (told by what it has, so that PEFT need not be imported)."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, or the one inside a PEFT wrapper."""
    return model.get_base_model() if is_peft_model(model) else model


def is_quantised(model: nn.Module) -> bool:
    """Whether the weights of a model are quantised, as `from_pretrained` does it with a `quantization_config`."""
    return getattr(model, "quantization_method", None) is not None


@contextmanager
def as_if_whole(model: nn.Module) -> Iterator[None]:
    """Let Trainer take a quantised model without adapters, which it refuses to train, and which is frozen here."""
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


@contextmanager
def in_evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Run models without dropout for a while; each part is in its own mode afterwards."""
    models = list(models)
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def memory_of(tensor: Tensor) -> int:
    """Address of the memory that a tensor lies in; of its first part if it is made of others (quantised ones)."""
    if is_traceable_wrapper_subclass(tensor):
        return memory_of(getattr(tensor, tensor.__tensor_flatten__()[0][0]))
    return tensor.untyped_storage().data_ptr()
