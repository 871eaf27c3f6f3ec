"""One learner of a pair as a model: called through whatever wraps the pair, or while the pair runs."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
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

    def __reduce_ex__(self, protocol: int) -> Any:
        """Let copies and pickles be made of the learner."""
        return self.learner_model.__reduce_ex__(protocol)

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
    before = vars(model).get("forward")
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    model._recorded_forward = forward = model.forward

    @functools.wraps(getattr(forward, "__func__", forward))
    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            output = self._recorded_forward(*args, **kwargs)
        torch.clear_autocast_cache()  # the end of autocast does it: the weights may change between two calls
        output = convert_to_fp32(output) if autocast else output
        if self is model:
            outputs.append(output)
        return output

    model.forward = MethodType(recording, model)  # copies of methods are methods of the copied model
    try:
        with torch.autocast(device, enabled=False):
            yield outputs
    finally:
        outputs.clear()  # a copy of the model keeps this function
        del model.forward, model._recorded_forward
        if before is not None:
            model.forward = before
