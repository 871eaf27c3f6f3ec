"""Estimates of memory are what is counted by hand, and close to what trainings take."""

import json
import subprocess
import sys
import weakref
from itertools import pairwise

import pytest
import torch
from places import PROGRAMS
from tiny import tiny_bert
from tiny_models import SIDE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    T5Config,
    T5ForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from ctcd_trainer.graph import EDGES
from ctcd_trainer.losses import fused_linear
from ctcd_trainer.losses.fused_linear import LinearHead, linear_losses
from ctcd_trainer.students import costs
from ctcd_trainer.students.costs import estimate_memory

SIZES = {"batch_size": 4, "sequence_length": 16}


def numbers(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_weights_gradients_and_adam_state_take_4_4_and_8_bytes_a_parameter():
    teacher, student = tiny_bert(3), tiny_bert(2)
    estimate = estimate_memory(teacher, student, **SIZES)
    parameters = numbers(teacher) + numbers(student)
    buffers = sum(b.numel() * b.element_size() for model in (teacher, student) for b in model.buffers())
    assert estimate.weights == 4 * parameters + buffers
    assert estimate.gradients == 4 * parameters
    assert estimate.optimizer == 8 * parameters
    parts = (estimate.weights, estimate.gradients, estimate.optimizer, estimate.activations, estimate.working)
    assert estimate.total == sum(parts)


def test_a_model_that_is_not_trained_takes_its_weights_alone():
    teacher, student, pretrained = tiny_bert(3), tiny_bert(2), tiny_bert(4)
    trained = estimate_memory(teacher, student, **SIZES)
    one_way = estimate_memory(teacher, student, distillation_mode="kd", **SIZES)
    assert one_way.weights == trained.weights
    assert one_way.gradients == 4 * numbers(student)
    assert one_way.optimizer == 8 * numbers(student)
    assert one_way.activations < trained.activations
    community = estimate_memory(
        teacher, student, pretrained_teacher=pretrained, distillation_mode="community", **SIZES
    )
    assert community.weights - trained.weights >= 4 * numbers(pretrained)
    assert (community.gradients, community.activations) == (trained.gradients, trained.activations)


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [("ddp", (1, 1, 1)), ("zero1", (1, 1, 4)), ("zero2", (1, 4, 4)), ("zero3", (4, 4, 4)), ("fsdp", (4, 4, 4))],
)
def test_strategies_divide_among_the_processes_what_they_shard(strategy, parts):
    models = tiny_bert(3), tiny_bert(2)
    one = estimate_memory(*models, **SIZES)
    four = estimate_memory(*models, strategy=strategy, processes=4, **SIZES)
    found = (four.weights, four.gradients, four.optimizer)
    whole = (one.weights, one.gradients, one.optimizer)
    assert found == tuple(size // count for size, count in zip(whole, parts, strict=True))
    assert four.activations == one.activations


def kept_by_forward_passes(*models, **inputs) -> int:
    """Bytes that real forward passes of models keep for the backward pass."""
    kept = {}
    for model in models:
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(tensor, weights=weights):
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(**inputs)
        kept[id(model)] = 0, outputs
    return sum(size for size, _ in kept.values())


def test_activations_are_what_a_real_forward_pass_keeps():
    models = tiny_bert(3).train(), tiny_bert(2).train()
    expected = kept_by_forward_passes(*models, input_ids=torch.zeros(4, 16, dtype=torch.long))
    assert estimate_memory(*models, **SIZES).activations == pytest.approx(expected, rel=0.02)


IDS = torch.zeros(4, 16, dtype=torch.long)


@pytest.mark.parametrize(
    ("family", "head", "body", "inputs"),
    [
        ("vit", "image-classification", None, {"pixel_values": torch.zeros(4, 3, SIDE, SIDE)}),
        ("resnet", "image-classification", None, {"pixel_values": torch.zeros(4, 3, 224, 224)}),
        ("wav2vec2", "audio-classification", None, {"input_values": torch.zeros(4, 16)}),
        ("t5", "seq2seq-lm", None, {"input_ids": IDS, "decoder_input_ids": IDS}),
        ("m2m_100", "seq2seq-lm", "model", {"input_ids": IDS, "decoder_input_ids": IDS}),
        ("bert", "multiple-choice", None, {"input_ids": IDS.unsqueeze(1)}),
        ("modernbert", "masked-lm", "model", {"input_ids": IDS}),
    ],
)
def test_activations_of_models_that_read_more_or_other_things_than_one_sequence_are_counted(
    family, head, body, inputs
):
    model = tiny_model(family, head)
    expected = 2 * kept_by_forward_passes(model.get_submodule(body) if body else model, **inputs)
    assert estimate_memory(model, model, **SIZES).activations == pytest.approx(expected, rel=0.04)


def test_a_classifier_with_a_decoder_has_an_estimate():
    config = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = T5ForSequenceClassification(config)
    expected = 2 * kept_by_forward_passes(model.transformer, input_ids=IDS, decoder_input_ids=IDS)
    assert estimate_memory(model, model, **SIZES).activations == pytest.approx(expected, rel=0.02)


def test_a_model_that_reads_what_is_not_known_is_refused():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, pad_token_id=0, **heads)
    model = WhisperForAudioClassification(config)
    with pytest.raises(ValueError, match=r"reads `input_features`.*`input_ids`, `pixel_values` or `input_values`"):
        estimate_memory(model, model, **SIZES)


def test_activations_have_the_dtype_of_the_model():
    models = tiny_bert(3), tiny_bert(2)
    whole = estimate_memory(*models, **SIZES)
    half = estimate_memory(*(model.bfloat16() for model in models), **SIZES)
    assert half.activations == pytest.approx(0.5 * whole.activations, rel=0.05)
    assert torch.get_default_dtype() == torch.float32


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, and the most that are there at a time."""

    def __init__(self, *there):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.data_ptr(), storage.nbytes())
        return outputs

    def free(self, address, size):
        self.seen.discard(address)
        self.now -= size


@pytest.mark.parametrize("block", [2**18, 2**10], ids=["as on CUDA", "as on CPUs"])
def test_the_fused_pass_allocates_what_is_estimated(block, monkeypatch):
    monkeypatch.setattr(fused_linear, "_CPU_CHUNK_BYTES", 2**18)
    monkeypatch.setattr(fused_linear, "_CPU_BLOCK_BYTES", block)
    models = {"teacher": tiny_model("bert", "masked-lm", 2), "student": tiny_model("bert", "masked-lm", 1)}
    positions = 1200  # more than a chunk
    heads = {
        name: LinearHead(torch.randn(positions, 16, requires_grad=True), model.cls.predictions.decoder.weight)
        for name, model in models.items()
    }
    labels = torch.zeros(positions, dtype=torch.long)
    learners = list(models.values())
    there = [tensor for head in heads.values() for tensor in (head.hidden, head.weight)]
    with Allocations(labels, *there) as found:
        linear_losses(heads, labels, dict.fromkeys(models, 1.0), EDGES[:2], temperature=2.0)
    hidden = sum(4 * head.hidden.numel() for head in heads.values())  # their gradients
    estimated = costs._fused_pass_bytes(learners, learners, 2, positions, "cpu")
    assert estimated + hidden == pytest.approx(found.peak, rel=0.1)


def test_chunks_are_larger_on_cuda_and_so_is_their_scratch():
    teacher, student = (tiny_model("bert", "masked-lm", layers, vocab_size=50_000) for layers in (2, 1))
    sizes = {"batch_size": 64, "sequence_length": 32}  # more positions than a chunk on CUDA has
    on = {device: estimate_memory(teacher, student, device=device, **sizes).working for device in ("cpu", "cuda")}
    assert on["cuda"] - on["cpu"] > 2 * 2**27 + 9 * 2**28


def test_activations_grow_with_the_rows_and_shrink_with_checkpointing_and_bf16():
    models = tiny_model("bert", "masked-lm", 4), tiny_model("bert", "masked-lm", 2)
    rows = [estimate_memory(*models, batch_size=size, sequence_length=32, scored=0.15) for size in (8, 16, 32)]
    for fewer, more in pairwise(rows):
        assert more.activations == pytest.approx(2 * fewer.activations, rel=0.02)
    options = {"batch_size": 32, "sequence_length": 32, "scored": 0.15}
    assert estimate_memory(*models, gradient_checkpointing=True, **options).activations < 0.2 * rows[-1].activations
    assert estimate_memory(*models, mixed_precision="bf16", **options).activations < 0.8 * rows[-1].activations


def test_nothing_is_changed_or_computed():
    teacher, student = tiny_bert(3), tiny_bert(2)
    state, before = torch.get_rng_state(), teacher.state_dict()
    estimate_memory(teacher, student, gradient_checkpointing=True, **SIZES)
    assert torch.equal(torch.get_rng_state(), state)
    assert not teacher.is_gradient_checkpointing
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "zero4"}, "`strategy='zero4'` is unknown. Valid values: ddp, zero1"),
        ({"distillation_mode": "both"}, "`distillation_mode='both'` is unknown"),
        ({"device": "tpu"}, "`device='tpu'` is unknown. Valid values: cpu, cuda"),
        ({"optimizer": "lion"}, "`optimizer='lion'` is unknown. Valid values: adamw, sgd"),
        ({"batch_size": 0}, "`batch_size=0` is not valid: it must be above 0"),
        ({"scored": 0.0}, "`scored=0.0` is not valid"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(tiny_bert(2), tiny_bert(2), **{**SIZES, **options})


@pytest.mark.slow
@pytest.mark.parametrize("live", [False, True], ids=["resident", "live"])
def test_estimates_are_close_to_what_trainings_take(live, tmp_path, monkeypatch):
    """With gradient checkpointing glibc keeps much that is freed; what is in use stays below the estimate."""
    if live:  # glibc gives each block back when it is freed
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        monkeypatch.setenv("MALLOC_MMAP_MAX_", "1000000")
    subprocess.run([sys.executable, PROGRAMS / "measured_memory.py", tmp_path], check=True, timeout=900)
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(found) == 6
    fused, whole = (found.pop(f"sharded-{name}")["measured"] for name in ("fused", "whole"))
    assert fused < 0.6 * whole
    for case, numbers in found.items():
        if live:
            assert 0.7 * numbers["estimated"] < numbers["measured"] < numbers["estimated"], case
        else:
            assert numbers["estimated"] == pytest.approx(numbers["measured"], rel=0.3), case
