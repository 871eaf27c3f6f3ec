"""The output of a pair, and the loss in the output of any model."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass(init=False)
class CoDistillationOutput(ModelOutput):
    """The loss of the pair, the fields of its primary learner, and the outputs of all learners.

    Fields that the primary learner returns (`logits`, `start_logits`, `hidden_states`, ...) stand at the top level, as
    attributes and as keys. Only `loss` is the pair's: the primary learner's is `losses["teacher_hard_loss"]`.

    Attributes:
        loss: The weighted sum of all terms, 0-dimensional; `None` without labels.
        losses: Each term without its weight, 0-dimensional, under the name by which it is logged.
        outputs: The output of each learner by name; empty where the losses were computed without logits.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    outputs: dict[str, Any] | None = None

    # ModelOutput knows fixed fields only. The fields here are those of another model, and functions that rebuild an
    # output (DDP, FSDP, accelerate) pass all of them, as keywords or as one mapping.
    def __init__(self, fields: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        OrderedDict.__init__(self)
        for name, value in {**(fields or {}), **more}.items():
            if value is not None:
                self[name] = value

    def __getattr__(self, name: str) -> Any:
        """Return a field that the primary learner has and has not filled, such as `hidden_states`: `None`."""
        primary = next(iter((self.__dict__.get("outputs") or {}).values()), None)
        if name.startswith("_") or not hasattr(primary, name):
            hint = (
                ""
                if primary is not None
                else (
                    ": the losses were computed without the models' whole outputs. Call the pair with "
                    "`return_logits=True`, or in evaluation mode"
                )
            )
            raise AttributeError(f"The output of the pair has no {name!r}, only {list(self)}{hint}.")
        return getattr(primary, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and pickles be made of all fields."""
        return type(self), (dict(self),)


def loss_of(output: Any) -> Tensor | None:
    """Return the loss of an output: the field `loss`, or the first part of a tuple; `None` without a loss."""
    if isinstance(output, Mapping):
        return output.get("loss")
    return output[0] if isinstance(output, (tuple, list)) and _is_loss(output[0]) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return an output with another loss, in the form in which the model returned it."""
    if isinstance(output, Mapping):
        output["loss"] = loss
        return output
    parts = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    return (loss, *parts[_is_loss(parts[0]) :])


def _is_loss(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 0
