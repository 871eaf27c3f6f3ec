"""What is around a model, or in the place of its tensors: PEFT, and quantised weights."""

from collections.abc import Iterator
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
    return getattr(model, "is_quantized", False)


@contextmanager
def as_if_whole(model: nn.Module) -> Iterator[None]:
    """Let Trainer take a quantised model without adapters, which it refuses to train, and which is frozen here."""
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


def memory_of(tensor: Tensor) -> int:
    """Address of the memory that a tensor lies in; of its first part if it is made of others (quantised ones)."""
    if is_traceable_wrapper_subclass(tensor):
        return memory_of(getattr(tensor, tensor.__tensor_flatten__()[0][0]))
    return tensor.untyped_storage().data_ptr()
