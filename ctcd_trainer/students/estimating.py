"""What a model costs to keep and to run: parameters, bytes, FLOPs per token, measured latency."""

import inspect
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..model_structure import base_model, count_parameters, in_evaluation_mode, is_quantised, whole_parameters
from .measuring import latencies_of, length_for


@dataclass(frozen=True)
class Estimate:
    """What a model costs.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        bytes: Size of the parameters in memory, and about of the files that are saved.
        flops_per_token: Floating-point operations of a forward pass for one token of a sequence (a multiplication and
            an addition are two); for a model that generates with a decoder, for one token that it reads and one that
            it writes. `None` if they cannot be counted.
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
        sequence_length: Length in tokens of the sequence whose operations are counted, which matters for attention;
            less if the model allows less.
        seconds: Time in which calls are timed.

    Returns:
        The figures. Operations and latency are given for models of one sequence of tokens only, operations not for
        quantised ones, and latency not for those that generate with a decoder. Adapters count in all of them.

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
    """Operations of a forward pass on one sequence; `None` where the counter does not know them."""
    inner = base_model(model)
    if is_quantised(inner):  # its products are operations of its own
        return None
    length = length_for(inner, sequence_length)
    ids = torch.zeros(1, length, dtype=torch.long, device=inner.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"decoder_input_ids": ids} if _has_decoder(inner) else {}
    implementations = inner.config._attn_implementation, getattr(inner.config, "_experts_implementation", None)
    try:
        _set_implementations(inner, "eager", "eager")  # others are single operations, not all of them known
        # The counter's hooks fail on some families without gradients.
        with in_evaluation_mode([inner]), torch.enable_grad(), FlopCounterMode(display=False) as counter:
            inner(**inputs)
    except Exception:  # a model of no sequence of tokens
        return None
    finally:
        _set_implementations(inner, *implementations)
    return counter.get_total_flops() / length


def _has_decoder(model: PreTrainedModel) -> bool:
    """Whether a model is given the tokens of its decoder besides those of its encoder."""
    names = inspect.signature(model.forward).parameters
    return model.config.is_encoder_decoder and "decoder_input_ids" in names and model.can_generate()


def _set_implementations(model: PreTrainedModel, attention: str, experts: str | None) -> None:
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    if experts is not None and getattr(model.config, "_experts_implementation", experts) != experts:
        model.set_experts_implementation(experts)
