"""The output of a pair: its loss, and the outputs of its learners."""

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
