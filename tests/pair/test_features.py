"""Feature losses: against computations written by hand, on every family, and through whole trainings."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer, weights_of
from tiny_models import tiny_batch, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, TrainerCallback

from ctcd_trainer import CoDistillationTrainer, DistillationArguments, align_student, create_student, make_pair
from ctcd_trainer.checks import check_features_strategy
from ctcd_trainer.feature_losses import FEATURE_LOSSES
from ctcd_trainer.pair.feature_links import default_layers

ALONE = {"teacher_hard_weight": 0.0, "student_hard_weight": 0.0, "student_feature_weight": 1.0}
ALONE |= {"distillation_mode": "standalone"}
KD = {**ALONE, "distillation_mode": "kd", "student_from_teacher_weight": 0.0}
NAME = "student_feature_loss"
#: Families with their heads; all that `create_student` is tested with.
FAMILIES = {
    **dict.fromkeys(("bert", "distilbert", "roberta", "deberta-v2", "electra", "modernbert", "albert"), "masked-lm"),
    **dict.fromkeys(("gpt2", "llama", "qwen2", "qwen3", "gemma2", "cohere", "granite", "mixtral"), "causal-lm"),
    **dict.fromkeys(("t5", "bart", "m2m_100"), "seq2seq-lm"),
    **{"vit": "image-classification", "wav2vec2": "audio-classification"},
}


def pair_of(teacher, student, **settings):
    return make_pair(teacher, student, DistillationArguments(**{**ALONE, **settings}))


def unlabelled(rows):
    return [{name: value for name, value in row.items() if name != "labels"} for row in rows]


def narrow_student(teacher):
    return create_student(teacher, 2, hidden_size=8, num_attention_heads=1)


def states_of(model, batch):
    """The hidden states after each layer, of BERT."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, output_hidden_states=True).hidden_states[1:]


def mean_over_rows(values, mask):
    """Mean over rows of the means over their positions, of a function of row and position."""
    rows = []
    for row, seen in enumerate(mask.bool()):
        rows.append(torch.stack([values(row, int(position)) for position in seen.nonzero()]).mean())
    return torch.stack(rows).mean()


# ---- Each loss against a naive computation ----


@pytest.mark.parametrize("narrow", [False, True], ids=["same width", "projected"])
def test_hidden_states_are_compared_as_written_by_hand(narrow):
    teacher = tiny_bert(4, seed=1)
    student = narrow_student(teacher) if narrow else create_student(teacher, 2)
    pair = pair_of(teacher, student, distillation_mode="standalone")
    batch = collate(tiny_rows(6, ragged=True))
    ours, theirs = (states_of(model, batch) for model in (student, teacher))
    projections = list(pair.feature_links["student"].projections.values())
    losses = []
    for index, target in enumerate((2, 3)):  # the student has the layers 0 and 3
        state = projections[index](ours[index]) if narrow else ours[index]
        goal = theirs[target].detach()
        losses.append(
            mean_over_rows(
                lambda r, p, s=state, g=goal: (s[r, p] - g[r, p]).square().mean() / g[r, p].var(correction=0),
                batch["attention_mask"],
            )
        )
    expected = torch.stack(losses).mean()
    trained = [*student.bert.parameters(), *pair.feature_links.parameters()]
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    output = pair(**batch)
    assert output.losses.keys() == {NAME}
    torch.testing.assert_close(output.losses[NAME], expected)
    torch.testing.assert_close(output.loss, expected)
    found = torch.autograd.grad(output.loss, trained, allow_unused=True)
    for actual, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, gradient)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def qkv_of(model, layer, batch):
    """Queries, keys and values of the self-attention of a layer, from the states that go into it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    state = model(**inputs, output_hidden_states=True).hidden_states[layer]
    if hasattr(model, "bert"):
        attention = model.bert.encoder.layer[layer].attention.self
        return attention.query(state), attention.key(state), attention.value(state)
    if hasattr(model, "transformer"):
        block = model.transformer.h[layer]
        return block.attn.c_attn(block.ln_1(state)).split(model.config.hidden_size, -1)
    block = model.model.layers[layer]
    if hasattr(block, "attn"):  # ModernBERT
        return block.attn.Wqkv(block.attn_norm(state)).split(model.config.hidden_size, -1)
    state = block.input_layernorm(state)
    attention = block.self_attn
    q, k, v = attention.q_proj(state), attention.k_proj(state), attention.v_proj(state)
    return q, k, v


def naive_divergence(ours, theirs, heads, mask, causal):
    """KL divergence of the softmax over seen positions of `first second^T`, one row, head and position at a time."""

    def value(row, position):
        seen = mask[row].bool().clone()
        if causal:
            seen[position + 1 :] = False
        heads_of = []
        for head in range(heads):
            log_p = []
            for first, second in (theirs, ours):
                width = first.shape[-1] // heads
                part = slice(head * width, (head + 1) * width)
                scores = second[row, seen][:, part] @ first[row, position, part] / math.sqrt(width)
                log_p.append(F.log_softmax(scores, -1))
            heads_of.append(F.kl_div(log_p[1], log_p[0], reduction="sum", log_target=True))
        return torch.stack(heads_of).mean()

    return mean_over_rows(value, mask)


@pytest.mark.parametrize(
    ("family", "head", "causal"),
    [
        ("bert", "masked-lm", False),
        ("modernbert", "masked-lm", False),
        ("gpt2", "causal-lm", True),
        ("llama", "causal-lm", True),
        ("qwen2", "causal-lm", True),
    ],
)
@pytest.mark.parametrize("kind", ["relations", "attention"])
def test_relations_are_compared_as_written_by_hand(kind, family, head, causal):
    teacher = tiny_model(family, head, 3, seed=1)
    student = tiny_model(family, head, 2, seed=2, hidden_size=8 if family != "qwen2" else 16, num_attention_heads=2)
    pair = pair_of(teacher, student, feature_loss=kind, fused_lm_head=False, distillation_mode="standalone")
    batch = tiny_batch(head)
    batch.pop("token_type_ids", None)
    layers = [qkv_of(model, layer, batch) for model, layer in ((student, 1), (teacher, 2))]
    layers[1] = [each.detach() for each in layers[1]]
    if kind == "relations":
        pairs = [[(layer[index],) * 2 for layer in layers] for index in range(3)]
    else:
        repeats = 2 if family == "qwen2" else 1  # one key for both heads
        pairs = [[(q, k.repeat(1, 1, repeats)) for q, k, _ in layers]]
    mask = batch["attention_mask"]
    expected = torch.stack([naive_divergence(*each, 2, mask, causal) for each in pairs]).mean()
    output = pair(**batch)
    torch.testing.assert_close(output.losses[NAME], expected, rtol=1e-4, atol=1e-6)
    wanted = torch.autograd.grad(expected, student.get_input_embeddings().weight)
    found = torch.autograd.grad(output.loss, student.get_input_embeddings().weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_relations_take_any_widths_and_heads():
    teacher = tiny_bert(2, seed=1, hidden_size=24, num_attention_heads=4)
    student = tiny_bert(1, seed=2, hidden_size=18, num_attention_heads=3)  # 3 is the most below 4 that divides both
    batch = collate(tiny_rows(3, ragged=True))
    found = pair_of(teacher, student, feature_loss="relations")(**batch).losses[NAME]
    layers = [qkv_of(model, layer, batch) for model, layer in ((student, 0), (teacher, 1))]
    pairs = [[(layer[index],) * 2 for layer in layers] for index in range(3)]
    expected = torch.stack([naive_divergence(*each, 3, batch["attention_mask"], False) for each in pairs]).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_features_and_equal_models_no_loss(family):
    head = FAMILIES[family]
    teacher, student = (tiny_model(family, head, 2, seed=seed).eval() for seed in (1, 2))
    same, batch = copy.deepcopy(teacher), tiny_batch(head)
    for kind in FEATURE_LOSSES:
        pair = pair_of(teacher, student, feature_loss=kind)
        loss = pair(**batch).losses[NAME]
        assert loss.isfinite()
        assert loss > 1e-4
        loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in student.parameters())
        pair.feature_links["student"].remove()
    assert pair_of(teacher, same).eval()(**batch).losses[NAME] < 1e-6


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_padding_changes_nothing(kind):
    rows = tiny_rows(4, ragged=True)
    pair = pair_of(tiny_bert(3, seed=1), tiny_bert(2, seed=2), feature_loss=kind)
    batch = collate(rows)
    padded = {name: F.pad(value, (0, 5)) if value.ndim == 2 else value for name, value in batch.items()}
    torch.testing.assert_close(pair(**padded).losses[NAME], pair(**batch).losses[NAME])
    each = torch.stack([pair(**collate([row])).losses[NAME] for row in rows])
    torch.testing.assert_close(pair(**batch).losses[NAME], each.mean())


def test_each_layer_learns_the_end_of_the_span_that_it_replaces():
    assert default_layers(3, 6, [0, 2, 5]) == [1, 4, 5]
    assert default_layers(3, 6, [0, 1, 2]) == [0, 1, 5]
    assert default_layers(3, 6, [3, 4, 5]) == [3, 4, 5]
    assert default_layers(3, 6) == [1, 3, 5]
    assert default_layers(4, 6) == [1, 2, 4, 5]
    assert default_layers(4, 3) == [0, 1, 2, 2]

    def links(student, **settings):
        return pair_of(tiny_bert(4), student, **settings).feature_links["student"].links

    assert links(create_student(tiny_bert(4), layers=[0, 1])) == [(0, 0, 0), (0, 1, 3)]
    assert links(create_student(tiny_bert(5), layers=[0, 1])) == [(0, 0, 1), (0, 1, 3)]  # of another teacher
    assert links(tiny_bert(2), feature_layers="0:1, 1:2,1:3") == [(0, 0, 1), (0, 1, 2), (0, 1, 3)]
    assert links(tiny_bert(2), feature_loss="relations") == [(0, 1, 3)]


# ---- Trainings ----


def test_without_a_weight_nothing_is_registered():
    pair = make_pair(tiny_bert(3), tiny_bert(2))
    assert not any(module._forward_hooks for module in pair.modules())
    assert not hasattr(pair.feature_links, "parameters")


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_features_alone_train_on_rows_without_labels(kind, tmp_path):
    teacher = tiny_bert(3, seed=1)
    before = weights_of(teacher)
    trainer = tiny_trainer(
        tmp_path, model=teacher, train_dataset=unlabelled(tiny_rows(ragged=True)), **KD, feature_loss=kind, max_steps=8
    )
    start = weights_of(trainer.student_model)
    trainer.train()
    assert_same_weights(teacher, before)
    end = trainer.student_model.state_dict()
    assert not torch.equal(
        end["bert.embeddings.word_embeddings.weight"], start["bert.embeddings.word_embeddings.weight"]
    )
    assert torch.equal(end["classifier.weight"], start["classifier.weight"])
    assert trainer.state.log_history[-1]["train_loss"] > 0


@pytest.mark.parametrize("head", ["token-classification", "causal-lm", "masked-lm"])
def test_accumulated_batches_give_what_one_batch_gives(head, tmp_path):
    """Rows of different lengths, all losses; on the fused pass of language models too."""
    batch = tiny_batch(head, 8)
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    ended = []
    for size, number in ((8, 1), (1, 8), (4, 2)):
        family = "gpt2" if head == "causal-lm" else "bert"
        args = tiny_args(
            tmp_path,
            **{"per_device_train_batch_size": size, "gradient_accumulation_steps": number, "max_steps": 3},
            **{"optim": "sgd", "student_feature_weight": 0.7, "logging_steps": 1},
        )
        trainer = CoDistillationTrainer(
            tiny_model(family, head, 3, seed=1),
            args,
            train_dataset=rows,
            student_model=tiny_model(family, head, 2, seed=2, hidden_size=8),
        )
        trainer.train()
        assert trainer.pair.fused_heads.used == (True if "lm" in head else None)
        ended.append((trainer.pair, [log[NAME] for log in trainer.state.log_history if NAME in log]))
    for pair, losses in ended[1:]:
        assert losses == pytest.approx(ended[0][1], rel=1e-4)
        assert_same_weights(pair, ended[0][0], 1e-5)


def test_the_fused_pass_computes_the_same_features():
    batch = tiny_batch("masked-lm")
    models = tiny_model("bert", "masked-lm", 3, seed=1), tiny_model("bert", "masked-lm", 2, seed=2)
    losses = []
    for fused in (True, False):
        arguments = DistillationArguments(student_feature_weight=2.0, fused_lm_head=fused)
        pair = make_pair(*copy.deepcopy(models), arguments)
        losses.append(pair(**batch, num_items_in_batch=torch.tensor([30, 30, 8])))
        assert pair.fused_heads.used is fused
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    assert losses[0].losses.keys() == losses[1].losses.keys()
    for name, value in losses[1].losses.items():
        torch.testing.assert_close(losses[0].losses[name], value)
    with pytest.raises(ValueError, match="has no number of rows"):
        pair(**batch, num_items_in_batch=30)


def test_a_resumed_training_has_the_projections_bit_for_bit(tmp_path):
    def trainer():
        teacher = tiny_bert(3, 1, dropout=0.2)
        options = {"student_feature_weight": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
        return tiny_trainer(
            tmp_path, model=teacher, student_model=narrow_student(teacher), student_learning_rate=5e-3, **options
        )

    whole = trainer()
    start = weights_of(whole.pair.feature_links)
    whole.train()
    torch.rand(7)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(resumed.pair, whole.pair)
    assert not any(torch.equal(value, start[name]) for name, value in whole.pair.feature_links.state_dict().items())
    groups = whole.optimizer.param_groups
    held = {id(p): group["learner"] for group in groups for p in group["params"]}
    assert {held[id(p)] for p in whole.pair.feature_links.parameters()} == {"student"}
    assert not hasattr(whole.student_model, "feature_projections")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-6" / "student", output_loading_info=True
    )
    assert not any(report.values())
    assert_same_weights(loaded, whole.student_model)
    (tmp_path / "checkpoint-4" / "feature_projections_of_student.safetensors").unlink()
    with pytest.raises(ValueError, match="has the projections {} in 'feature_projections_of_student"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_it_learns_from_a_frozen_pretrained_teacher(tmp_path):
    pretrained = tiny_bert(4, seed=3)
    options = {"student_feature_weight": 1.0, "feature_source": "pretrained"}
    trainer = tiny_trainer(tmp_path, distillation_mode="community", pretrained_teacher=pretrained, **options)
    batch = collate(tiny_rows(3))
    ours, theirs = states_of(trainer.student_model, batch), states_of(pretrained.eval(), batch)
    expected = [
        ((ours[i] - theirs[j]).square().mean(-1) / theirs[j].var(-1, correction=0)).mean() for i, j in ((0, 1), (1, 3))
    ]
    torch.testing.assert_close(trainer.model(**batch).losses[NAME], torch.stack(expected).mean())
    trainer.train()


def test_features_begin_after_a_warm_start(tmp_path):
    options = {"warm_start_steps": 2, "max_steps": 3, "student_feature_weight": 1.0, "logging_steps": 1}
    trainer = tiny_trainer(tmp_path, student_model=lambda teacher: create_student(teacher, 2), **options)
    trainer.train()
    assert [NAME in log for log in trainer.state.log_history] == [True, True, True, False]
    assert trainer.pair.feature_links["student"].links == [(0, 0, 1), (0, 1, 2)]


def test_checkpointing_and_autocast_give_the_same(tmp_path):
    def losses(**options):
        trainer = tiny_trainer(tmp_path, student_feature_weight=1.0, logging_steps=1, max_steps=3, **options)
        trainer.train()
        return [log[NAME] for log in trainer.state.log_history if NAME in log]

    for kind in ("hidden", "attention"):
        plain = losses(feature_loss=kind)
        assert losses(feature_loss=kind, gradient_checkpointing=True) == plain
        assert losses(feature_loss=kind, bf16=True) == pytest.approx(plain, rel=0.1)


@pytest.mark.slow
def test_compiled_models_are_not_compiled_again_at_each_step(tmp_path):
    graphs = []

    class Counting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def losses(**options):
        trainer = tiny_trainer(
            tmp_path,
            **{
                "student_feature_weight": 1.0,
                "feature_loss": "attention",
                "logging_steps": 1,
                "callbacks": [Counting()],
            },
            **options,
        )
        trainer.train()
        return [log[NAME] for log in trainer.state.log_history if NAME in log]

    plain = losses()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs.clear()
    assert losses(torch_compile_backend="aot_eager") == pytest.approx(plain, rel=1e-4)
    assert graphs[0] == graphs[-1] > 0


def test_adapters_of_the_student_learn_features(tmp_path):
    teacher = tiny_bert(3, seed=1)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    for kind in ("hidden", "relations"):
        student = get_peft_model(create_student(teacher, 2), lora)
        before = weights_of(student)
        tiny_trainer(tmp_path, model=teacher, student_model=student, **KD, feature_loss=kind).train()
        changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all("lora" in name for name in changed)


# ---- align_student ----


def test_aligning_brings_a_student_nearer_and_leaves_the_teacher(tmp_path):
    teacher = tiny_bert(4, seed=1, dropout=0.1)
    teacher.bert.embeddings.requires_grad_(False)
    teacher.eval()
    before = weights_of(teacher)
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    rows = [{**row, "labels": 99} for row in tiny_rows(24, ragged=True)]  # labels of another task
    quiet = {"use_cpu": True, "disable_tqdm": True}

    def loss_of(student):
        return pair_of(*copy.deepcopy((teacher, student))).eval()(**collate(tiny_rows(12, seed=5))).losses[NAME].item()

    def start():
        return create_student(teacher, 2)

    options = {"data_collator": collate, "learning_rate": 3e-3, "max_steps": 30, **quiet}
    student = start()
    assert align_student(teacher, student, rows, **options) is student
    assert loss_of(student) < 0.7 * loss_of(start())
    teacher.eval()
    assert_same_weights(teacher, before)
    assert flags == [parameter.requires_grad for parameter in teacher.parameters()]
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)

    class Killed(Exception):
        pass

    class Killing:
        """Stops the work in the middle."""

        def __init__(self, batches):
            self.batches = batches

        def __call__(self, rows):
            self.batches -= 1
            if self.batches < 0:
                raise Killed
            return collate(rows)

    with pytest.raises(Killed):
        align_student(teacher, start(), rows, **{**options, "data_collator": Killing(20)}, output_dir=tmp_path)
    resumed = align_student(teacher, start(), rows, **options, output_dir=tmp_path)
    assert_same_weights(resumed, student)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_feature_weight": -1.0}, "`student_feature_weight=-1.0` is not valid"),
        ({"student_feature_weight": 1.0, "feature_loss": "cosine"}, "`feature_loss='cosine'` is unknown"),
        ({"student_feature_weight": 1.0, "feature_source": "student"}, "`feature_source='student'` is unknown"),
        ({"feature_loss": "relations"}, "`feature_loss='relations'` has no effect with `student_feature_weight=0.0`"),
        ({"student_feature_weight": 1.0, "feature_layers": "0-1"}, "`feature_layers='0-1'` is not valid"),
        ({"student_feature_weight": 1.0, "feature_layers": "0:1,0:1"}, "names a pair of layers twice"),
        ({"student_feature_weight": 1.0, "share": "layers:1"}, "`student_feature_weight=1.0` and `share='layers:1'`"),
        ({"student_feature_weight": 1.0, "distillation_mode": "reversed"}, "freezes the student"),
        ({**ALONE, "student_feature_weight": 0.0}, "at least one hard, soft or feature weight above 0"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_layers": "0:1,2:2"}, "the pair 2:2, and the student has layers 0 to 1, the teacher 0 to 2"),
        ({"student_processing_class": object()}, "`student_processing_class` are both given"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`use_reentrant` to False",
        ),
        ({"feature_source": "pretrained"}, "needs a frozen teacher, and `pretrained_teacher` is None"),
    ],
)
def test_trainings_that_would_go_wrong_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, student_feature_weight=1.0, **options)


@pytest.mark.parametrize(("plugin", "name"), [("fsdp_plugin", "FSDP"), ("deepspeed_plugin", "DeepSpeed")])
def test_models_that_are_divided_among_processes_are_refused(plugin, name, tmp_path):
    accelerator = SimpleNamespace(state=SimpleNamespace(**{plugin: object()}))
    check_features_strategy(accelerator, tiny_args(tmp_path))
    with pytest.raises(ValueError, match=f"`student_feature_weight=1.0` and {name}.*train with DDP"):
        check_features_strategy(accelerator, tiny_args(tmp_path, student_feature_weight=1.0))


def test_models_without_comparable_layers_are_refused(tmp_path):
    dropping = tiny_model("bart", "seq2seq-lm", 2)
    dropping.config.decoder_layerdrop = 0.1
    with pytest.raises(ValueError, match="`decoder_layerdrop=0.1`. Set it to 0"):
        pair_of(dropping, tiny_model("bart", "seq2seq-lm", 1, seed=2))
    resnets = [tiny_model("resnet", "image-classification", 2, seed=seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match="a ResNetForImageClassification, give tensors of the shapes"):
        pair_of(*resnets)(**tiny_batch("image-classification"))
    student = tiny_model("vit", "image-classification", 1, image_size=4)
    pair = pair_of(tiny_model("vit", "image-classification", 2), student)
    with pytest.raises(ValueError, match=r"cannot be compared|images of"):
        pair(**tiny_batch("image-classification"))
    frozen = tiny_bert(2, seed=2)
    frozen.bert.requires_grad_(False)
    with pytest.raises(ValueError, match="No gradient reaches the layers of `student_model`"):
        pair_of(tiny_bert(3, seed=1), frozen)(**collate(tiny_rows(2)))
    teacher = tiny_bert(3)
    student = narrow_student(teacher)
    optimizer = torch.optim.SGD([*teacher.parameters(), *student.parameters()], lr=0.1)
    options = {"student_feature_weight": 1.0, "optimizers": (optimizer, None)}
    trainer = tiny_trainer(tmp_path, model=teacher, student_model=student, **options)
    with pytest.raises(ValueError, match="does not have the 4 parameters of the projections"):
        trainer.train()
