"""Size and speed of models: parameters, bytes on disk, and the time of one sequence on the CPU."""

import copy
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model_structure import base_model, count_parameters, in_evaluation_mode, is_quantised

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_WARMUPS = 3
_SEQUENCE_LENGTH, _REPEATS = 128, 30
#: Models of more parameters, all together, are not timed: copying and running them would take too long.
_MAX_PARAMETERS = 500_000_000


def weight_bytes(folder: Path) -> int:
    """Size of the weight files of a model's folder; 0 if there are none."""
    return sum(file.stat().st_size for pattern in _WEIGHT_FILES for file in folder.glob(pattern))


def measure_latencies(models: Sequence[nn.Module], sequence_length: int, repeats: int) -> list[float]:
    """Median time in milliseconds of each model for one sequence.

    The models take turns, so that whatever else the machine does meanwhile slows all of them alike.

    Args:
        models: The models, in evaluation mode.
        sequence_length: Length of the sequence in tokens, which are random.
        repeats: Number of timed calls of each model, after three that are not timed.
    """
    return [statistics.median(own) for own in _times(models, sequence_length, repeats)]


@torch.no_grad()  # `inference_mode` would leave tensors in the models that cannot be trained on
def _times(
    models: Sequence[nn.Module], sequence_length: int, repeats: int, seconds: float = math.inf
) -> list[list[float]]:
    """Milliseconds of the calls of each model; no more begin after some seconds, but each is timed once."""
    generator = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(-_WARMUPS, repeats):
        late = time.perf_counter() - begin > seconds
        if late and times[0]:
            break
        for model, own in zip(models, times, strict=True):
            size = model.config.get_text_config().vocab_size
            input_ids = torch.randint(size, (1, sequence_length), generator=generator)
            start = time.perf_counter()
            model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
            if repeat >= 0 or late:
                own.append(1000 * (time.perf_counter() - start))
    return times


@dataclass(frozen=True)
class Latencies:
    """Measured times.

    Attributes:
        milliseconds: By name of the model; empty if they were not measured.
        conditions: How they were measured, or why they were not, as a sentence.
    """

    milliseconds: Mapping[str, float]
    conditions: str


def latencies_of(models: Mapping[str, nn.Module], seconds: float = 1.0) -> Latencies:
    """Time models on the CPU, wherever they are, one sequence at a time and in about some seconds.

    The models are as they were afterwards, and so is the random state.

    Args:
        models: Models of token sequences by name; others are not timed.
        seconds: After this time no more calls begin.
    """
    reason = _why_not_timed(models.values())
    if reason is not None:
        return Latencies({}, f"The latency was not measured: {reason}.")
    sequence_length = min(length_for(model, _SEQUENCE_LENGTH) for model in models.values())
    try:
        with in_evaluation_mode(models.values()):
            timed = [_on_cpu(model) for model in models.values()]
            times = _times(timed, sequence_length, _REPEATS, seconds)
    except Exception as error:  # a card is no reason to fail after a training
        return Latencies({}, f"The latency was not measured: a call failed with {type(error).__name__}.")
    dtypes = " and ".join(sorted({str(model.dtype).removeprefix("torch.") for model in timed}))
    return Latencies(
        {name: statistics.median(own) for name, own in zip(models, times, strict=True)},
        f"Latency: one sequence of {sequence_length} random tokens on the CPU ({cpu_name()}, "
        f"{torch.get_num_threads()} torch thread(s), {dtypes}, PyTorch {torch.__version__}), median of "
        f"{len(times[0])} call(s) of each model in turn. Size on disk: the weight files.",
    )


def length_for(model: nn.Module, wanted: int) -> int:
    """The length of a sequence in tokens, or what the model allows if that is less."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return wanted if longest is None else min(wanted, longest - 2)  # some families number their positions from 2


def _why_not_timed(models: Sequence[nn.Module]) -> str | None:
    """Why models are not timed with one sequence of tokens; `None` if they can be."""
    for model in map(base_model, models):
        name = type(model).__name__
        if getattr(model, "main_input_name", None) != "input_ids" or "MultipleChoice" in name:
            return f"a {name} does not take one sequence of tokens"
        if getattr(model.config, "is_encoder_decoder", False):
            return f"a {name} generates, and its time depends on what"
        if is_quantised(model):
            return "quantised models were not moved to the CPU"
    if sum(map(count_parameters, models)) > _MAX_PARAMETERS:
        return f"the models have more than {_MAX_PARAMETERS / 1e6:.0f} M parameters together"
    return None


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model itself if it is on the CPU, or else a copy there."""
    tensors = [*model.parameters(), *model.buffers()]
    return model if all(tensor.device.type == "cpu" for tensor in tensors) else _copy_on(model, "cpu")


def _copy_on(model: nn.Module, device: str) -> nn.Module:
    """A copy of a model on another device, without one more copy on its own."""
    memo: dict[int, Tensor] = {id(buffer): buffer.detach().to(device) for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
    return copy.deepcopy(model, memo)


def cpu_name() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
