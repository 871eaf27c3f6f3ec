"""Estimates of memory are what is counted by hand, and close to what trainings take."""

import json
from itertools import pairwise

import pytest
import torch
from processes import run_program
from tiny import tiny_bert
from tiny_models import tiny_model

from ctcd_trainer.students.memory import estimate_memory

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


def test_activations_are_what_a_real_forward_pass_keeps():
    models = tiny_bert(3).train(), tiny_bert(2).train()
    kept = {}
    for model in models:
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(tensor, weights=weights):
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(input_ids=torch.zeros(4, 16, dtype=torch.long))
        kept[id(model)] = 0, outputs
    expected = sum(size for size, _ in kept.values())
    assert estimate_memory(*models, **SIZES).activations == pytest.approx(expected, rel=0.02)


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
    run_program("measured_memory.py", tmp_path)
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 4
    for file in files:
        found = json.loads(file.read_text())
        if live:
            assert 0.7 * found["estimated"] < found["measured"] < found["estimated"], file.stem
        else:
            assert found["estimated"] == pytest.approx(found["measured"], rel=0.3), file.stem
