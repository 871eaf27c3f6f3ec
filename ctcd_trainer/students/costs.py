"""The costs of a model (parameters, bytes, operations, latency), and the memory of a co-training."""

import copy
import math
import platform
import re
import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from ..graph import MODES, STUDENT, TEACHER
from ..losses import fused_linear
from ..model_structure import (
    base_model,
    count_parameters,
    embeddings_of,
    forward_parameters,
    in_evaluation_mode,
    is_quantised,
    layer_classes,
    whole_parameters,
)
from ..tasks import find_task

#: Larger sets of models are not timed: copying and running them would take too long.
_MAX_TIMED_PARAMETERS = 500_000_000

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
#: How many of these parts of the training state are divided among the processes: optimizer, gradients, weights.
_DIVIDED_PARTS: Mapping[str, int] = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
#: Bytes of optimizer state for each byte of weights.
_STATES: Mapping[str, int] = {"adamw": 2, "sgd": 0}


@dataclass(frozen=True)
class Estimate:
    """The costs of a model.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        bytes: Size of the parameters in memory, which is about the size of the saved files.
        flops_per_token: Operations of a forward pass for one token (a multiplication and an addition are two), in an
            encoder-decoder for one token read and one written. `None` if quantised, or if it does not read tokens.
        milliseconds: Median time of one sequence on the CPU; `None` if not measured.
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
        size = f"{self.parameters / 1e6:.2f} M parameters, {self.bytes / 1e6:.1f} MB"
        return f"{size}, {flops} a token, {time} a sequence. {self.conditions}"


def estimate(model: PreTrainedModel, sequence_length: int = 128, seconds: float = 1.0) -> Estimate:
    """Measure what a model costs to keep and to run. The call changes neither the model nor the random state.

    Args:
        model: The model, on any device. Adapters count in all figures.
        sequence_length: Number of tokens whose operations are counted together, at most what the model allows.
        seconds: No timed call starts after this time.
    """
    with whole_parameters(model):
        latencies = latencies_of({"model": model}, seconds)
        return Estimate(
            parameters=count_parameters(model),
            bytes=_bytes(model.parameters()),
            flops_per_token=_flops_per_token(model, sequence_length),
            milliseconds=latencies.milliseconds.get("model"),
            conditions=latencies.conditions,
        )


def weight_bytes(folder: Path) -> int:
    """Size of the weight files in a model's folder; 0 if there are none."""
    return sum(file.stat().st_size for file in [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flops_per_token(model: PreTrainedModel, sequence_length: int) -> float | None:
    inner = base_model(model)
    if is_quantised(inner) or inner.main_input_name != "input_ids":  # the counter does not know quantised weights
        return None
    length = _length_for(inner, sequence_length)
    implementations = inner.config._attn_implementation, getattr(inner.config, "_experts_implementation", None)
    try:
        _set_implementations(inner, "eager", "eager")  # the counter does not know all of the fused ones
        # The counter's hooks fail on some families without gradients.
        with in_evaluation_mode([inner]), torch.enable_grad(), FlopCounterMode(display=False) as counter:
            inner(**_dummy_inputs(inner, 1, length))
    except Exception:  # the model needs other inputs
        return None
    finally:
        _set_implementations(inner, *implementations)
    return counter.get_total_flops() / length


def _set_implementations(model: PreTrainedModel, attention: str, experts: str | None) -> None:
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    if experts is not None and getattr(model.config, "_experts_implementation", experts) != experts:
        model.set_experts_implementation(experts)


def _dummy_inputs(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """A batch of zeros: token ids (for the decoder too), images of the size in the config, or recordings."""
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        ids = torch.zeros(rows, length, dtype=torch.long, device=model.device)
        has_decoder = config.is_encoder_decoder and "decoder_input_ids" in forward_parameters(model)
        inputs = {name: ids.unsqueeze(1) if "MultipleChoice" in type(model).__name__ else ids}
        return inputs | ({"decoder_input_ids": ids} if has_decoder else {})
    side = getattr(config, "image_size", 224)
    sides = side if isinstance(side, (list, tuple)) else (side, side)
    shapes = {"pixel_values": (rows, getattr(config, "num_channels", 3), *sides), "input_values": (rows, length)}
    if name not in shapes:
        raise ValueError(
            f"The memory of a {type(model).__name__} cannot be estimated, because it reads `{name}`. Give models that "
            "read `input_ids`, `pixel_values` or `input_values`."
        )
    return {name: torch.zeros(shapes[name], dtype=model.dtype, device=model.device)}


# ---- Latency ----


@dataclass(frozen=True)
class Latencies:
    """Median milliseconds by name of the model (empty if nothing was measured), and how or why not, as a sentence."""

    milliseconds: Mapping[str, float]
    conditions: str


def latencies_of(models: Mapping[str, nn.Module], seconds: float = 1.0) -> Latencies:
    """Time models on the CPU, one sequence at a time. The call changes neither the models nor the random state.

    Args:
        models: Models by name, on any device. Models that do not read one sequence of tokens are not timed.
        seconds: No call starts after this time.
    """
    reason = _why_not_timed(models.values())
    if reason is not None:
        return Latencies({}, f"The latency was not measured: {reason}.")
    length = min(_length_for(model, 128) for model in models.values())
    try:
        with in_evaluation_mode(models.values()):
            timed = [_on_device(model, "cpu") for model in models.values()]
            times = _time_calls(timed, length, 30, seconds)
    except Exception as error:  # a card must not fail after a training
        return Latencies({}, f"The latency was not measured: a call failed with {type(error).__name__}.")
    dtypes = " and ".join(sorted({str(model.dtype).removeprefix("torch.") for model in timed}))
    return Latencies(
        {name: statistics.median(own) for name, own in zip(models, times, strict=True)},
        f"Latency: one sequence of {length} random tokens on the CPU ({cpu_name()}, {torch.get_num_threads()} torch "
        f"thread(s), {dtypes}, PyTorch {torch.__version__}), median of {len(times[0])} call(s) of each model in turn. "
        "Size on disk: the weight files.",
    )


def measure_latencies(models: Sequence[nn.Module], length: int, repeats: int) -> list[float]:
    """Median milliseconds of each model (on the CPU, in evaluation mode) for one sequence of `length` random tokens.

    Each model gets three untimed calls and then `repeats` timed ones.
    """
    return [statistics.median(milliseconds) for milliseconds in _time_calls(models, length, repeats)]


@torch.no_grad()  # `inference_mode` would leave tensors in the models that cannot be trained on
def _time_calls(
    models: Sequence[nn.Module], length: int, repeats: int, seconds: float = math.inf
) -> list[list[float]]:
    """Milliseconds of the calls of each model, at least one; models take turns, so that a busy machine slows all."""
    generator = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(-3, repeats):
        late = time.perf_counter() - begin > seconds
        if late and times[0]:
            break
        for model, milliseconds in zip(models, times, strict=True):
            size = model.config.get_text_config().vocab_size
            input_ids = torch.randint(size, (1, length), generator=generator)
            start = time.perf_counter()
            model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
            if repeat >= 0 or late:
                milliseconds.append(1000 * (time.perf_counter() - start))
    return times


def _length_for(model: nn.Module, wanted: int) -> int:
    """The wanted number of tokens, or the largest number that the model allows."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return wanted if longest is None else min(wanted, longest - 2)  # some families number their positions from 2


def _why_not_timed(models: Collection[nn.Module]) -> str | None:
    """Why models cannot be timed with one sequence of tokens; `None` if they can."""
    for model in map(base_model, models):
        name = type(model).__name__
        if getattr(model, "main_input_name", None) != "input_ids" or "MultipleChoice" in name:
            return f"a {name} does not take one sequence of tokens"
        if getattr(model.config, "is_encoder_decoder", False):
            return f"a {name} generates, and its time depends on what"
        if is_quantised(model):
            return "quantised models were not moved to the CPU"
    if sum(map(count_parameters, models)) > _MAX_TIMED_PARAMETERS:
        return f"the models have more than {_MAX_TIMED_PARAMETERS / 1e6:.0f} M parameters together"
    return None


def _on_device(model: nn.Module, device: str) -> nn.Module:
    """The model if it is on the device, else a copy there, made without a second copy on the present device."""
    if all(tensor.device.type == device for tensor in [*model.parameters(), *model.buffers()]):
        return model
    memo: dict[int, Tensor] = {id(buffer): buffer.detach().to(device) for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
    return copy.deepcopy(model, memo)


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


# ---- Memory ----


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs, each part at its largest.

    Attributes:
        weights: Parameters and buffers of all models, frozen ones too.
        gradients: Gradients of the trained models.
        optimizer: State of the optimizer.
        activations: What the forward passes of one batch keep for the backward pass.
        working: Short-lived tensors: gradients inside a layer, layers that are gathered or computed again, buckets of
            gradients, the logits of a chunk with their scratch buffers, weights in the dtype of autocast.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of the parts. The real peak is close to it, because allocators keep what is freed."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in asdict(self).items())
        return f"{self.total / 1e6:,.0f} MB a process ({listed})"


def estimate_memory(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    batch_size: int,
    sequence_length: int,
    pretrained_teacher: PreTrainedModel | None = None,
    distillation_mode: str = "ctcd",
    strategy: Strategy = "ddp",
    processes: int = 1,
    scored: float = 1.0,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    optimizer: Literal["adamw", "sgd"] = "adamw",
    gradient_checkpointing: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one process of a co-training, in bytes, without computing or allocating anything.

    Activations are counted by running the models' code on tensors without data. What Python, the runtime of the device
    and the allocator take is not included (1 to 2 GB on a GPU).

    Args:
        teacher: The teacher, in the dtype of the training.
        student: The student, in the dtype of the training.
        batch_size: Rows of a batch of one process; each choice of a multiple-choice head counts as a row.
        sequence_length: Tokens of a row, or samples of a recording. Images have the size in the config.
        pretrained_teacher: The frozen teacher of Community KD.
        distillation_mode: The mode, which says what is trained.
        strategy: How the processes share the work: `ddp`, DeepSpeed's `zero1` to `zero3`, or `fsdp`.
        processes: Number of processes.
        scored: Share of the tokens at which a language model is scored (0.15 for a usual masked one).
        mixed_precision: As in the training arguments.
        optimizer: The optimizer; `adamw` keeps two numbers for each parameter.
        gradient_checkpointing: Whether layers keep their inputs only.
        device: Device of the training, by default `cuda` if torch finds it. The fused pass has larger chunks there.

    Raises:
        ValueError: A choice is unknown, a size is not above 0, or a model reads neither tokens, images nor recordings.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value, valid in (
        ("strategy", strategy, _DIVIDED_PARTS),
        ("distillation_mode", distillation_mode, MODES),
        ("optimizer", optimizer, _STATES),
        ("device", device, ("cpu", "cuda")),
    ):
        if value not in valid:
            raise ValueError(f"`{name}={value!r}` is unknown. Valid values: {', '.join(valid)}.")
    sizes = {"batch_size": batch_size, "sequence_length": sequence_length, "processes": processes, "scored": scored}
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"`{name}={value}` is not valid: it must be above 0.")
    mode, learners = MODES[distillation_mode], {TEACHER: teacher, STUDENT: student}
    trained = [learners[name] for name in mode.trained]
    models = [teacher, student, *([] if pretrained_teacher is None else [pretrained_teacher])]
    language_models = find_task(teacher).language_model
    share = {
        part: processes if number < _DIVIDED_PARTS[strategy] else 1
        for number, part in enumerate(("optimizer", "gradients", "weights"))
    }
    trainable = _bytes(parameter for model in trained for parameter in model.parameters() if parameter.requires_grad)

    batch = (batch_size, sequence_length, mixed_precision, language_models)
    activations = [_activations(model, *batch) for model in trained]
    # A ResNet does not say how many layers it has.
    layers = [getattr(model.config.get_text_config(), "num_hidden_layers", 1) for model in trained]
    working = max(size // count for size, count in zip(activations, layers, strict=True))  # gradients inside a layer
    if gradient_checkpointing:
        working *= 2  # the layer is computed again
        activations = [_activations(model, *batch, checkpointing=True) for model in trained]
    if processes > 1 and strategy in ("ddp", "zero1"):  # buckets of gradients
        working += trainable
    if share["weights"] > 1:
        working += sum(map(_gathered_bytes, models))
    if mixed_precision != "no":
        working += max(_bytes(model.parameters()) for model in models) // 2
    positions = int(batch_size * sequence_length * scored)
    if language_models and strategy == "zero3" and processes > 1:
        # Three tensors of the size of the whole logits, of all positions and of the scored ones.
        working += int(4 * positions * sum(map(_vocabulary, models)) * (3 + 3 / scored))
    elif language_models:
        working += _fused_pass_bytes(models, trained, len(mode.edges), positions, device)
    return MemoryEstimate(
        weights=sum(_bytes([*model.parameters(), *model.buffers()]) for model in models) // share["weights"],
        gradients=trainable // share["gradients"],
        optimizer=trainable * _STATES[optimizer] // share["optimizer"],
        activations=sum(activations),
        working=working,
    )


def _fused_pass_bytes(
    models: Sequence[PreTrainedModel], trained: Sequence[nn.Module], edges: int, positions: int, device: str
) -> int:
    """Memory of the pass of `fused_linear.py`: a chunk of logits of each model, scratch, gradients of the heads."""
    largest = 4 * max(map(_vocabulary, models))  # losses and gradients are computed in fp32
    chunk = fused_linear._CPU_CHUNK_BYTES if device == "cpu" else fused_linear._CUDA_CHUNK_BYTES
    rows = min(positions, max(32, chunk // largest // 32 * 32))
    on_cpu = max(2 * torch.get_num_threads(), fused_linear._CPU_BLOCK_BYTES // largest)
    scratch = min(rows, on_cpu) if device == "cpu" else rows
    # Two log-softmaxes, the scaled logits and the probabilities of each model, and a difference for each soft loss.
    # Temperature 1 needs two less for each model, `js` one more for each soft loss.
    buffers = 4 * len(models) + edges
    heads = [embeddings_of(base_model(model), "get_output_embeddings") for model in trained]
    gradients = sum(4 * head.weight.numel() for head in heads if head is not None)  # exist before all other gradients
    return sum(4 * rows * size for size in map(_vocabulary, models)) + buffers * scratch * largest + gradients


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _gathered_bytes(model: nn.Module) -> int:
    """Memory of the whole parts of a sharded model at a time: two layers, and all parameters outside of layers."""
    names = layer_classes([model])
    sizes = [_bytes(module.parameters()) for module in model.modules() if type(module).__name__ in names]
    return _bytes(model.parameters()) - sum(sizes) + 2 * max(sizes, default=0)


def _activations(
    model: PreTrainedModel, rows: int, length: int, mixed_precision: str, headless: bool, checkpointing: bool = False
) -> int:
    """Bytes that a forward pass keeps for the backward pass; `headless`: except for the output layer."""
    inner = base_model(model)
    kept: dict[int, UntypedStorage] = {}  # alive, else another tensor could get the address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        with local_torch_dtype(inner.dtype), no_init_weights():
            empty = type(inner)(copy.deepcopy(inner.config)).train()
        if checkpointing:
            empty.gradient_checkpointing_enable()
        # A sequence classifier with a decoder reads the data that these tensors do not have.
        run = getattr(empty, empty.base_model_prefix, empty) if headless or inner.config.is_encoder_decoder else empty
        dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
        with (
            torch.autocast("cpu", dtype=dtype, enabled=mixed_precision != "no"),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            run(**_dummy_inputs(run, rows, length))
        weights = {parameter.untyped_storage()._cdata for parameter in empty.parameters()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
