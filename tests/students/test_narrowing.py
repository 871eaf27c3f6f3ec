"""Narrower students: what is left out is exactly as if it had been silenced, in every family."""

import re
from collections.abc import Callable

import pytest
import torch
from tiny import collate, tiny_bert, tiny_rows, weights_of
from tiny_models import FAMILIES, HEADS, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from ctcd_trainer import create_student

#: Head and names of the modules that read the feed-forward units and the heads, by family.
READERS = {
    "bert": ("masked-lm", r"layer\.\d+\.output\.dense", r"attention\.output\.dense"),
    "distilbert": ("masked-lm", r"ffn\.lin2", r"attention\.out_lin"),
    "roberta": ("masked-lm", r"layer\.\d+\.output\.dense", r"attention\.output\.dense"),
    "deberta-v2": ("masked-lm", r"layer\.\d+\.output\.dense", r"attention\.output\.dense"),
    "electra": ("masked-lm", r"layer\.\d+\.output\.dense", r"attention\.output\.dense"),
    "modernbert": ("masked-lm", r"mlp\.Wo", r"attn\.Wo"),
    "albert": ("masked-lm", r"ffn_output", r"attention\.dense"),
    "gpt2": ("causal-lm", r"mlp\.c_proj", r"attn\.c_proj"),
    "llama": ("causal-lm", r"mlp\.down_proj", r"self_attn\.o_proj"),
    "qwen2": ("causal-lm", r"mlp\.down_proj", r"self_attn\.o_proj"),
    "qwen3": ("causal-lm", r"mlp\.down_proj", r"self_attn\.o_proj"),
    "gemma2": ("causal-lm", r"mlp\.down_proj", r"self_attn\.o_proj"),
    "cohere": ("causal-lm", r"mlp\.down_proj", r"self_attn\.o_proj"),
    "granite": ("causal-lm", r"mlp\.down_proj", r"self_attn\.o_proj"),
    "mixtral": ("causal-lm", None, r"self_attn\.o_proj"),
    "t5": ("seq2seq-lm", r"DenseReluDense\.wo", r"(SelfAttention|EncDecAttention)\.o"),
    "bart": ("seq2seq-lm", r"layers\.\d+\.fc2", r"(self_attn|encoder_attn)\.out_proj"),
    "m2m_100": ("seq2seq-lm", r"layers\.\d+\.fc2", r"(self_attn|encoder_attn)\.out_proj"),
    "vit": ("image-classification", r"mlp\.fc2", r"attention\.o_proj"),
    "wav2vec2": ("audio-classification", r"feed_forward\.output_dense", r"attention\.out_proj"),
}
#: Families whose heads are as wide as is left of the hidden states for each, so that both are cut or none.
TIED = {"bert", "distilbert", "roberta", "deberta-v2", "electra", "modernbert", "albert", "gpt2", "qwen2", "bart"}
TIED |= {"m2m_100", "vit", "wav2vec2"}


def logits(model: PreTrainedModel, head: str) -> Tensor:
    batch = {name: value for name, value in tiny_batch(head).items() if name != "token_type_ids"}
    with torch.no_grad():
        return model.eval()(**batch).logits


def keep_only(mask: Tensor) -> Callable[[nn.Module, tuple], tuple]:
    return lambda _, arguments: (arguments[0] * mask, *arguments[1:])


def silence_what_is_left_out(teacher: PreTrainedModel, student: PreTrainedModel, readers: str) -> int:
    """Make the teacher's readers read zeros of the units that the student does not have; the number of readers."""
    count = 0
    for name, module in teacher.named_modules():
        if not re.search(rf"\b{readers}$", name):
            continue
        weights = [model.get_submodule(name).weight for model in (teacher, student)]
        own, kept = [each if isinstance(module, Conv1D) else each.T for each in weights]  # (units, ...)
        there = (own[:, None] == kept[None]).all(-1)
        assert there.sum(0).tolist() == [1] * len(kept)
        module.register_forward_pre_hook(keep_only(there.any(1)))
        count += 1
    return count


def saves_and_loads(student: PreTrainedModel, head: str, folder) -> None:
    student.save_pretrained(folder)
    loaded = HEADS[head].from_pretrained(folder)
    assert type(loaded) is type(student)
    torch.testing.assert_close(logits(loaded, head), logits(student, head))


def test_every_family_of_the_tests_is_here():
    assert READERS.keys() == FAMILIES.keys() - {"resnet"}


@pytest.mark.parametrize("family", [name for name, (_, readers, _) in READERS.items() if readers is not None])
def test_leaving_out_feed_forward_units_is_silencing_them(family, tmp_path):
    head, readers, _ = READERS[family]
    teacher = tiny_model(family, head)
    student = create_student(teacher, intermediate_size=12)
    assert silence_what_is_left_out(teacher, student, readers) >= (1 if family == "albert" else 2)
    torch.testing.assert_close(logits(student, head), logits(teacher, head))
    saves_and_loads(student, head, tmp_path)


@pytest.mark.parametrize("family", [name for name in READERS if name not in TIED])
def test_leaving_out_heads_is_silencing_them(family, tmp_path):
    head, _, readers = READERS[family]
    teacher = tiny_model(family, head, num_attention_heads=4, **({} if family == "t5" else {"head_dim": 4}))
    student = create_student(teacher, num_attention_heads=2)
    assert student.config.num_attention_heads == 2
    assert student.config.hidden_size == teacher.config.hidden_size
    assert silence_what_is_left_out(teacher, student, readers) >= 2
    torch.testing.assert_close(logits(student, head), logits(teacher, head))
    saves_and_loads(student, head, tmp_path)


@pytest.mark.parametrize(("key_heads", "heads", "left"), [(2, 4, 1), (4, 4, 2), (2, 6, 2), (1, 6, 1)])
def test_heads_that_share_key_value_heads_are_left_out_with_them(key_heads, heads, left):
    teacher = tiny_model(
        "llama", "causal-lm", num_attention_heads=8, num_key_value_heads=key_heads, head_dim=4, hidden_size=32
    )
    student = create_student(teacher, num_attention_heads=heads)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (heads, left)
    silence_what_is_left_out(teacher, student, r"self_attn\.o_proj")
    torch.testing.assert_close(logits(student, "causal-lm"), logits(teacher, "causal-lm"), rtol=1e-4, atol=1e-4)


def test_experts_lose_the_same_units():
    teacher = tiny_model("mixtral", "causal-lm")
    student = create_student(teacher, intermediate_size=12)
    for layer, own in zip(student.model.layers, teacher.model.layers, strict=True):
        experts, before = layer.mlp.experts, own.mlp.experts
        assert experts.gate_up_proj.shape == (3, 24, 16)
        (kept,) = [
            [unit for unit in range(32) if (before.down_proj[0, :, unit] == column).all()]
            for column in [experts.down_proj[0, :, 0]]
        ]
        assert torch.equal(experts.gate_up_proj[:, 0], before.gate_up_proj[:, kept[0]])
        assert torch.equal(experts.gate_up_proj[:, 12], before.gate_up_proj[:, 32 + kept[0]])
    assert logits(student, "causal-lm").shape == logits(teacher, "causal-lm").shape


@pytest.mark.parametrize("family", [name for name in READERS if name != "wav2vec2"])
def test_narrower_hidden_states_save_load_and_run(family, tmp_path):
    head = READERS[family][0]
    teacher = tiny_model(family, head, **({"embedding_size": 4} if family == "electra" else {}))
    student = create_student(teacher, hidden_size=8)
    assert student.config.hidden_size == 8
    assert student.num_parameters() < teacher.num_parameters()
    saves_and_loads(student, head, tmp_path)


def test_the_weights_of_narrower_hidden_states_are_the_teachers():
    teacher = tiny_bert(2)
    student = create_student(teacher, hidden_size=8)
    assert (student.config.num_attention_heads, student.config.intermediate_size) == (1, 32)
    old, new = teacher.state_dict(), student.state_dict()
    words = "bert.embeddings.word_embeddings.weight"
    hidden = [next(i for i in range(16) if (old[words][:, i] == column).all()) for column in new[words].T]
    assert hidden == sorted(hidden)
    heads = []
    for layer in range(2):
        query = new[f"bert.encoder.layer.{layer}.attention.self.query.bias"]
        rows = old[f"bert.encoder.layer.{layer}.attention.self.query.weight"][:, hidden]
        own = new[f"bert.encoder.layer.{layer}.attention.self.query.weight"]
        heads.append([next(i for i in range(16) if (rows[i] == row).all()) for row in own])
        assert query.shape == (8,)
        assert heads[-1] in ([*range(8)], [*range(8, 16)])
    for name, value in old.items():
        match = re.search(r"layer\.(\d)\.attention\.(self|output\.dense)", name)
        own = heads[int(match[1])] if match else hidden
        rows, columns = (own, hidden) if match and match[2] == "self" else (hidden, own)
        expected = value[rows] if value.shape[0] == 16 else value
        if value.ndim == 2:
            columns = columns if value.shape[1] == 16 else [*range(value.shape[1])]
            expected = expected[:, columns]
        assert torch.equal(new[name], expected), name


def largest(scores: Tensor, number: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: -scores[unit])[:number])


def kept_units(teacher: nn.Module, student: nn.Module, layer: int) -> list[int]:
    name = f"bert.encoder.layer.{layer}.intermediate.dense.weight"
    old, new = teacher.state_dict()[name], student.state_dict()[name]
    return [next(i for i in range(len(old)) if (old[i] == row).all()) for row in new]


def test_units_of_large_weights_are_kept():
    teacher = tiny_bert(2)
    student = create_student(teacher, intermediate_size=10)
    for layer, module in enumerate(teacher.bert.encoder.layer):
        into, out = module.intermediate.dense, module.output.dense
        scores = torch.zeros(32)
        for sizes in (into.weight.square().sum(1), into.bias.square(), out.weight.square().sum(0)):
            scores += sizes.detach() / max(sizes.mean().item(), 1e-30)
        assert kept_units(teacher, student, layer) == largest(scores, 10)


def test_units_that_pass_on_much_are_kept():
    teacher = tiny_bert(2, dropout=0.5)
    batches = [collate(tiny_rows(4, seed=seed)) for seed in (1, 2)]
    state = torch.get_rng_state()
    before = weights_of(teacher)
    student = create_student(teacher, intermediate_size=10, calibration=batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    teacher.eval()
    for layer in range(2):
        with torch.no_grad():
            units = [
                teacher.bert.encoder.layer[layer].intermediate(
                    teacher.bert.encoder.layer[layer].attention(
                        teacher.bert(
                            batch["input_ids"], batch["attention_mask"], output_hidden_states=True
                        ).hidden_states[layer]
                    )[0]
                )
                for batch in batches
            ]
        scores = torch.cat([each.abs().flatten(0, 1) for each in units]).mean(0)
        assert kept_units(teacher, student, layer) == largest(scores, 10)


def test_a_calibrated_teacher_has_the_modes_of_its_parts_afterwards():
    teacher = tiny_bert(2, dropout=0.5)
    teacher.bert.embeddings.eval()
    modes = [module.training for module in teacher.modules()]
    create_student(teacher, intermediate_size=10, calibration=[collate(tiny_rows(4))])
    assert [module.training for module in teacher.modules()] == modes


def test_silent_units_cost_nothing_when_calibrated():
    """Heads and hidden units too: what a calibrated student leaves out first is what is always zero."""
    teacher = tiny_model("llama", "causal-lm", num_attention_heads=4, num_key_value_heads=4, head_dim=4).eval()
    silent = [0, 2]
    with torch.no_grad():
        for layer in teacher.model.layers:
            for head in silent:
                layer.self_attn.v_proj.weight[4 * head : 4 * head + 4] = 0
                layer.self_attn.q_proj.weight[4 * head : 4 * head + 4] *= 100  # large weights that do nothing
    expected = logits(teacher, "causal-lm")
    batch = {name: value for name, value in tiny_batch("causal-lm", seed=3).items() if name != "labels"}
    calibrated = create_student(teacher, num_attention_heads=2, calibration=[batch])
    torch.testing.assert_close(logits(calibrated, "causal-lm"), expected)
    by_weights = create_student(teacher, num_attention_heads=2)
    assert not torch.allclose(logits(by_weights, "causal-lm"), expected)


# ---- Layers and stacks ----


@pytest.mark.parametrize(
    ("layers", "kept"), [("uniform", [0, 2, 5]), ("first", [0, 1, 2]), ("last", [3, 4, 5]), ([1, 2, 4], [1, 2, 4])]
)
def test_the_layers_that_are_asked_for_are_kept(layers, kept):
    teacher = tiny_bert(6)
    student = create_student(teacher, 3, layers=layers)
    for own, index in zip(student.bert.encoder.layer, kept, strict=True):
        for name, value in own.state_dict().items():
            assert torch.equal(value, teacher.bert.encoder.layer[index].state_dict()[name])


@pytest.mark.parametrize("family", READERS)
def test_a_student_of_all_layers_equals_its_teacher(family):
    head = READERS[family][0]
    teacher = tiny_model(family, head, 3, **({"num_decoder_layers": 3} if family == "t5" else {}))
    student = create_student(teacher, 3, layers="first")
    torch.testing.assert_close(logits(student, head), logits(teacher, head), rtol=0, atol=0)


@pytest.mark.parametrize("layers", ["first", "last"])
@pytest.mark.parametrize("family", READERS)
def test_students_of_fewer_layers_save_load_and_run(family, layers, tmp_path):
    head = READERS[family][0]
    student = create_student(tiny_model(family, head, 3), 2, layers=layers)
    saves_and_loads(student, head, tmp_path)


def test_encoder_and_decoder_are_cut_alike():
    config = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_decoder_layers=3, num_heads=2)
    teacher = T5ForSequenceClassification(config)
    student = create_student(teacher, 2)
    encoder, decoder = student.transformer.encoder, student.transformer.decoder
    assert (student.config.num_layers, student.config.num_decoder_layers) == (2, 2)
    assert (len(encoder.block), len(decoder.block)) == (2, 2)
    old = teacher.transformer
    for stack, own, kept in ((encoder, old.encoder, [0, 3]), (decoder, old.decoder, [0, 2])):
        for block, index in zip(stack.block, kept, strict=True):
            for name, value in block.state_dict().items():
                assert torch.equal(value, own.block[index].state_dict()[name])


def test_the_first_layer_keeps_the_position_biases_of_all():
    config = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    teacher = T5ForSequenceClassification(config)
    student = create_student(teacher, 1, layers="last")
    name = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for stack in ("encoder", "decoder"):
        own, old = getattr(student.transformer, stack).state_dict(), getattr(teacher.transformer, stack).state_dict()
        assert torch.equal(own[name], old[name])
        query = "layer.0.SelfAttention.q.weight"
        assert torch.equal(own[f"block.0.{query}"], old[f"block.2.{query}"])


def test_a_random_student_has_the_config_and_no_weights_of_the_teacher():
    teacher = tiny_bert(4)
    torch.manual_seed(3)
    student = create_student(teacher, 2, hidden_size=32, intermediate_size=64, init="random")
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**teacher.config.to_dict(), "num_hidden_layers": 2, "hidden_size": 32})
    config.intermediate_size, config.num_attention_heads = 64, 4
    expected = type(teacher)(config)
    assert student.config.num_attention_heads == 4
    for name, value in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        ("bert", {"hidden_size": 12}, r"`hidden_size=12` and `num_attention_heads=1` do not fit.*16 / 2 = 8"),
        (
            "bert",
            {"num_attention_heads": 1},
            r"`hidden_size=16` and `num_attention_heads=1` do not fit.*hidden_size=8",
        ),
        ("bert", {"intermediate_size": 64}, r"cannot be wider than its teacher: `bert.*intermediate.*\(32, 16\)"),
        ("bert", {"intermediate_size": 0}, r"`intermediate_size=0` is not valid"),
        ("llama", {"num_attention_heads": 3}, r"`num_attention_heads=3` does not fit: 2 of the teacher's 4 heads"),
        ("wav2vec2", {"hidden_size": 8}, r"cannot be narrowed like this: `wav2vec2.*conv.*init='random'"),
        ("bert", {"layers": [1, 1]}, r"`layers=\[1, 1\]` are not valid.*0 to 1"),
        ("bert", {"layers": [2]}, r"`layers=\[2\]` are not valid.*0 to 1"),
        ("bert", {"layers": [0], "num_hidden_layers": 2}, r"`num_hidden_layers=2`, but `layers=\[0\]` are 1"),
        ("bert", {"layers": "middle", "num_hidden_layers": 1}, r"`layers='middle'` is not known.*uniform"),
        ("bert", {"init": "zero"}, r"`init='zero'` is not known"),
        ("bert", {"intermediate_size": 8, "calibration": []}, r"`calibration` has no batch"),
    ],
)
def test_what_cannot_be_cut_is_refused(teacher, settings, message):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2} if teacher == "llama" else {}
    with pytest.raises(ValueError, match=message):
        create_student(tiny_model(teacher, READERS[teacher][0], **options), **settings)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"config of a resnet has no `num_hidden_layers`.*smaller config"):
        create_student(ResNetForImageClassification(ResNetConfig()), 1)


def test_widths_that_cannot_be_told_from_each_other_are_refused():
    with pytest.raises(ValueError, match="both 16 wide"):
        create_student(tiny_bert(2, intermediate_size=16), hidden_size=8)
