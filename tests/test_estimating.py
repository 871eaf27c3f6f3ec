"""What a model costs: against figures worked out by hand."""

import pytest
import torch
from tiny_models import tiny_model

from ctcd_trainer import create_student, estimate


def bert_flops(layers: int, hidden: int, intermediate: int, vocabulary: int, length: int) -> int:
    """Of a BERT with its masked-LM head, for one token."""
    layer = 4 * hidden * hidden + 2 * length * hidden + 2 * hidden * intermediate
    return 2 * (layers * layer + hidden * hidden + hidden * vocabulary)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_figures_of_a_bert(attention):
    model = tiny_model("bert", "masked-lm", 3)
    model.set_attn_implementation(attention)
    found = estimate(model, sequence_length=20, seconds=0.1)
    assert found.flops_per_token == bert_flops(3, 16, 32, 64, 20)
    assert found.parameters == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert found.bytes == 4 * found.parameters
    assert found.milliseconds > 0
    assert "MFLOPs a token" in str(found)
    assert model.config._attn_implementation == attention


def test_a_narrower_student_costs_less():
    teacher = tiny_model("llama", "causal-lm", 4)
    figures = [estimate(each, seconds=0.1) for each in (teacher, create_student(teacher, 2, intermediate_size=16))]
    for name in ("parameters", "bytes", "flops_per_token"):
        assert getattr(figures[1], name) < getattr(figures[0], name)


def test_a_model_of_another_dtype_has_other_bytes():
    model = tiny_model("gpt2", "causal-lm").to(torch.bfloat16)
    assert estimate(model, seconds=0.05).bytes == 2 * model.num_parameters()


def test_a_model_of_images_has_no_figures_per_token():
    found = estimate(tiny_model("vit", "image-classification"))
    assert (found.flops_per_token, found.milliseconds) == (None, None)
    assert "not measured" in str(found)
