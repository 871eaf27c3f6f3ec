"""One learner of a pair as a model: called through whatever wraps the pair, or while the pair runs."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn


class LearnerView:
    """A learner whose calls go through whatever wraps the pair: DDP and FSDP need their own forward.

    Everything but the call is the learner's: its attributes, its parameters, its class (`isinstance`).

    Args:
        model: The pair, wrapped or not.
        name: Name of the learner.
        learner: The learner.

    Attributes:
        last_outputs: The output of the last call, `None` before it.
    """

    def __init__(self, model: nn.Module, name: str, learner: nn.Module) -> None:
        # In `__dict__`, since attributes are set on the learner; under names that no model has.
        self.__dict__.update(pair_model=model, learner_name=name, learner_model=learner, last_outputs=None)

    @property
    def __class__(self) -> type:
        """The class of the learner, for `isinstance`."""
        return type(self.learner_model)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the learner."""
        return getattr(self.learner_model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the learner."""
        setattr(self.learner_model, name, value)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the output of the learner on the inputs, with its hard loss as the `loss`."""
        self.__dict__["last_outputs"] = self.pair_model(*inputs, learner=self.learner_name, **named)
        return self.last_outputs


@contextmanager
def recorded_calls(model: nn.Module, device: str) -> Iterator[list[Any]]:
    """Run a user's code that calls a model, outside of autocast except for these calls, as accelerate does it.

    Args:
        model: The model.
        device: Type of its device.

    Yields:
        The outputs of all calls, in fp32.
    """
    outputs: list[Any] = []
    forward, set_before = model.forward, "forward" in vars(model)
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)

    @functools.wraps(forward)
    def recording(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            output = forward(*args, **kwargs)
        torch.clear_autocast_cache()  # the end of autocast does it: the weights may change between two calls
        outputs.append(convert_to_fp32(output) if autocast else output)
        return outputs[-1]

    model.forward = recording
    try:
        with torch.autocast(device, enabled=False):
            yield outputs
    finally:
        if set_before:
            model.forward = forward
        else:
            del model.forward
