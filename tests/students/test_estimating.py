"""What a model costs: against figures worked out by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_bert
from tiny_models import FAMILIES, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ctcd_trainer import create_student, estimate

HEADS = {
    **dict.fromkeys(("bert", "distilbert", "roberta", "deberta-v2", "electra", "modernbert", "albert"), "masked-lm"),
    **dict.fromkeys(
        ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "cohere", "granite", "mixtral"),
        "causal-lm",
    ),
    **dict.fromkeys(("t5", "bart", "m2m_100"), "seq2seq-lm"),
}
LENGTH = 20


def naive_flops(model: PreTrainedModel) -> int:
    """Of a forward pass: each weight is used once for each position, and each head compares each pair of positions."""
    total = 0

    def count(module: nn.Module, arguments: tuple, _output: object) -> None:
        nonlocal total
        positions = arguments[0].numel() // arguments[0].shape[-1]
        total += 2 * positions * module.weight.numel()

    handles = [
        module.register_forward_hook(count) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    with torch.no_grad():
        ids = torch.ones(1, LENGTH, dtype=torch.long)
        decoded = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        model.eval()(input_ids=ids, **decoded)
    for handle in handles:
        handle.remove()
    heads, width = model.config.num_attention_heads, getattr(model.config, "head_dim", None)
    width = width or getattr(model.config, "d_kv", 16 // heads)
    decoder = getattr(model.config, "num_decoder_layers", getattr(model.config, "decoder_layers", 0))
    return total + (2 + 2 * decoder) * 4 * LENGTH * LENGTH * heads * width


def test_every_family_of_sequences_of_tokens_is_here():
    assert HEADS.keys() == FAMILIES.keys() - {"vit", "resnet", "wav2vec2"}


@pytest.mark.parametrize("family", HEADS)
def test_operations_are_counted_in_every_family(family):
    model = tiny_model(family, HEADS[family]).train()
    settings = model.config._attn_implementation, model.config._experts_implementation
    found = LENGTH * estimate(model, LENGTH, seconds=0.01).flops_per_token
    assert model.training
    assert (model.config._attn_implementation, model.config._experts_implementation) == settings
    if family not in ("deberta-v2", "mixtral"):  # positions against contents, experts
        assert found == naive_flops(model)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids = torch.ones(1, LENGTH, dtype=torch.long)
    decoded = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=ids, **decoded)
    assert found == counter.get_total_flops()


def test_experts_that_are_not_used_cost_nothing():
    """Two of the experts are used for each token, however many there are."""
    flops = [
        estimate(tiny_model("mixtral", "causal-lm", num_local_experts=number), LENGTH, 0.01).flops_per_token
        for number in (3, 6)
    ]
    router = 2 * 2 * 16 * 3  # of two layers, for three more
    assert flops[1] - flops[0] == router


def test_adapters_cost_what_they_add():
    model = tiny_bert(2)
    before = estimate(model, LENGTH, 0.01)
    adapted = estimate(
        get_peft_model(model, LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")), LENGTH, 0.01
    )
    own = 2 * 2 * 3 * 16
    assert adapted.flops_per_token - before.flops_per_token == 2 * own
    head = 3 * 16 + 3  # the classifier is trained, as a copy
    assert adapted.parameters - before.parameters == own + head


def test_a_longer_sequence_than_the_model_allows_is_cut():
    model = tiny_model("bert", "masked-lm", max_position_embeddings=22)
    assert estimate(model, 400, 0.01).flops_per_token == estimate(model, LENGTH, 0.01).flops_per_token


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
