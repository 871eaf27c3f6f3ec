"""How much memory a co-training needs, before it is started: weights, gradients, optimizer state, activations."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..graph import MODES, STUDENT, TEACHER
from ..model_structure import base_model, layer_classes
from ..tasks import find_task

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
#: What of weights, gradients and optimizer state each process holds a part of alone.
_SHARDED: Mapping[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero1": frozenset({"optimizer"}),
    "zero2": frozenset({"optimizer", "gradients"}),
    "zero3": frozenset({"optimizer", "gradients", "weights"}),
    "fsdp": frozenset({"optimizer", "gradients", "weights"}),
}
#: Bytes of optimizer state for each byte of weights.
_STATES: Mapping[str, float] = {"adamw": 2.0, "sgd": 0.0}
#: Logits of one model that the fused pass over the scored positions holds at a time (`fused_linear.py`).
_CHUNK_BYTES = 2**27
#: How many tensors of the size of the logits are there at a time where whole logits are used.
_COPIES = 3.0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs, each at its largest.

    Attributes:
        weights: Parameters and buffers of all models, frozen ones among them.
        gradients: Gradients of the trained models.
        optimizer: State of the optimizer.
        activations: What the forward passes of one batch keep for the backward pass.
        working: What is there for a while: the gradients inside of a layer, the layer that is gathered or computed
            again, buckets of gradients, the logits of a chunk, weights in the dtype of autocast.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The peak, as if all were there at once.

        It nearly is: activations are given back while gradients grow, but in other sizes, and allocators keep what is
        given back.
        """
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "working")
        listed = ", ".join(f"{name} {getattr(self, name) / 1e6:,.0f}" for name in parts)
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
) -> MemoryEstimate:
    """Memory of one process of a co-training, without computing or placing anything.

    Activations are counted by running the models' code on tensors without data. What Python, the device's runtime and
    the allocator take beyond (1 to 2 GB on a GPU) is not in it.

    Args:
        teacher: The teacher.
        student: The student.
        batch_size: Rows of a batch of one process.
        sequence_length: Tokens of a row.
        pretrained_teacher: The frozen teacher of Community KD.
        distillation_mode: Which of the models are trained.
        strategy: How the processes share the work: `ddp`, DeepSpeed's `zero1` to `zero3`, or `fsdp`.
        processes: Number of processes.
        scored: Share of the tokens that a language model is scored at (0.15 for a usual masked one).
        mixed_precision: As in the training arguments; weights stay in fp32.
        optimizer: The optimizer; `adamw` keeps two numbers for each parameter.
        gradient_checkpointing: Whether layers keep their inputs alone.

    Returns:
        The estimate, in bytes.

    Raises:
        ValueError: An unknown strategy, mode or optimizer, or a size that is not above 0.

    Example:
        ```python
        print(estimate_memory(teacher, student, batch_size=32, sequence_length=128, strategy="fsdp", processes=8))
        ```
    """
    for name, value, valid in (
        ("strategy", strategy, _SHARDED),
        ("distillation_mode", distillation_mode, MODES),
        ("optimizer", optimizer, _STATES),
    ):
        if value not in valid:
            raise ValueError(f"`{name}={value!r}` is unknown. Valid values: {', '.join(valid)}.")
    for name, value in (
        ("batch_size", batch_size),
        ("sequence_length", sequence_length),
        ("processes", processes),
        ("scored", scored),
    ):
        if value <= 0:
            raise ValueError(f"`{name}={value}` is not valid: it must be above 0.")
    models = {TEACHER: teacher, STUDENT: student}
    trained = [models[name] for name in MODES[distillation_mode].trained]
    everything = [*models.values(), *([pretrained_teacher] if pretrained_teacher is not None else [])]

    parts = {name: processes if name in _SHARDED[strategy] else 1 for name in ("weights", "gradients", "optimizer")}
    trainable = sum(_bytes(p) for model in trained for p in model.parameters() if p.requires_grad)
    weights = sum(_bytes(tensor) for model in everything for tensor in [*model.parameters(), *model.buffers()])
    working = trainable if processes > 1 and strategy in ("ddp", "zero1") else 0  # buckets of gradients
    if parts["weights"] > 1:
        working += sum(_gathered(model) for model in everything)
    if mixed_precision != "no":
        working += max(sum(_bytes(p) for p in model.parameters()) for model in everything) // 2
    language_models = find_task(teacher).language_model
    if language_models:
        positions = int(batch_size * sequence_length * scored)
        for model in everything:
            logits = positions * model.config.get_text_config().vocab_size * 4
            if parts["weights"] > 1:  # the whole logits, of all positions and of the scored ones
                working += int(logits * (_COPIES + _COPIES / scored))
                continue
            head = base_model(model).get_output_embeddings()
            # Their gradients are there before the other ones.
            own = _bytes(head.weight) if model in trained and head is not None else 0
            working += min(logits, _CHUNK_BYTES) + own
    sizes = (batch_size, sequence_length, mixed_precision, language_models)
    kept = [_activations(model, *sizes) for model in trained]
    layers = (model.config.get_text_config().num_hidden_layers for model in trained)
    layer = max(size // count for size, count in zip(kept, layers, strict=True))
    working += layer  # the gradients of what a layer keeps
    if gradient_checkpointing:
        kept = [_activations(model, *sizes, checkpointing=True) for model in trained]
        working += layer
    return MemoryEstimate(
        weights=weights // parts["weights"],
        gradients=trainable // parts["gradients"],
        optimizer=int(trainable * _STATES[optimizer]) // parts["optimizer"],
        activations=sum(kept),
        working=working,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gathered(model: nn.Module) -> int:
    """What is whole at a time of a sharded model: two layers, and all that is in no layer."""
    names = layer_classes([model])
    layers = [module for module in model.modules() if type(module).__name__ in names]
    sizes = [sum(_bytes(p) for p in layer.parameters()) for layer in layers]
    rest = sum(_bytes(p) for p in model.parameters()) - sum(sizes)
    return rest + 2 * max(sizes, default=0)


def _activations(
    model: PreTrainedModel, rows: int, length: int, mixed_precision: str, headless: bool, checkpointing: bool = False
) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights excepted.

    Args:
        model: The model.
        rows: Rows of the batch.
        length: Tokens of a row.
        mixed_precision: As in the training arguments.
        headless: Whether to leave out the output layer (the fused pass keeps nothing of it).
        checkpointing: Whether layers keep their inputs alone.
    """
    inner = base_model(model)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # else another tensor may get its address
        return tensor

    alive: list[Tensor] = []
    with FakeTensorMode():
        empty = type(inner)(copy.deepcopy(inner.config)).train()
        if checkpointing:
            empty.gradient_checkpointing_enable()
        run = getattr(empty, empty.base_model_prefix, empty) if headless else empty
        inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.bfloat16)
        with (
            torch.autocast("cpu", dtype=dtype, enabled=mixed_precision != "no"),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            outputs = run(**inputs)
        weights = {p.untyped_storage()._cdata for p in empty.parameters()}
        del outputs
    return sum(size for key, size in kept.items() if key not in weights)
