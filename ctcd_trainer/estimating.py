"""What a model costs to keep and to run: parameters, bytes, FLOPs per token, measured latency."""

import copy
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .measuring import count_parameters, latencies_of
from .sharding import whole_parameters
from .wrapping import base_model


@dataclass(frozen=True)
class Estimate:
    """What a model costs.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        bytes: Size of the parameters in memory, and about of the files that are saved.
        flops_per_token: Floating-point operations of a forward pass for one token of a sequence (a multiplication and
            an addition are two); `None` if they cannot be counted.
        milliseconds: Median time of one sequence on the CPU; `None` if it was not measured.
        conditions: How the time was measured, or why it was not.
    """

    parameters: int
    bytes: int
    flops_per_token: float | None
    milliseconds: float | None
    conditions: str

    def __str__(self) -> str:
        flops = "?" if self.flops_per_token is None else f"{self.flops_per_token / 1e6:.2f} MFLOPs"
        time = "?" if self.milliseconds is None else f"{self.milliseconds:.2f} ms"
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.bytes / 1e6:.1f} MB, {flops} a token, {time} a "
            f"sequence. {self.conditions}"
        )


def estimate(model: PreTrainedModel, sequence_length: int = 128, seconds: float = 1.0) -> Estimate:
    """What a model costs to keep and to run.

    Args:
        model: The model, wherever it is. It is as it was afterwards, and so is the random state.
        sequence_length: Length in tokens of the sequence whose operations are counted, which matters for attention.
        seconds: Time in which calls are timed.

    Returns:
        The figures. Operations and latency are given for models of one sequence of tokens only.

    Example:
        ```python
        print(estimate(create_student(teacher, num_hidden_layers=3)))
        ```
    """
    with whole_parameters(model):
        latencies = latencies_of({"model": model}, seconds)
        return Estimate(
            parameters=count_parameters(model),
            bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            flops_per_token=_flops_per_token(model, sequence_length),
            milliseconds=latencies.milliseconds.get("model"),
            conditions=latencies.conditions,
        )


def _flops_per_token(model: PreTrainedModel, sequence_length: int) -> float | None:
    """Operations of a forward pass without computing it; `None` where the sizes depend on the values."""
    inner = base_model(model)
    config = copy.deepcopy(inner.config)
    config._attn_implementation = "eager"  # the others are single operations that are not all known to the counter
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            empty = type(inner)(config).eval()
            empty(input_ids=torch.zeros(1, sequence_length, dtype=torch.long))
    except Exception:  # families whose forward pass looks at values, or takes no sequence of tokens
        return None
    return counter.get_total_flops() / sequence_length
