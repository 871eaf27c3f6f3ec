"""The model inside of a PEFT wrapper."""

from torch import nn


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT (told by what it has, so that PEFT need not be imported)."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, or the one inside a PEFT wrapper."""
    return model.get_base_model() if is_peft_model(model) else model
