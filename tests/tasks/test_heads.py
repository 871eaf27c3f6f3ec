"""Every head and family: loss and gradients are those of the naive computation (`naive_losses.py`)."""

import copy

import pytest
import torch
from head_pairs import (
    LANGUAGE_MODELS,
    OTHERS,
    TAU,
    WEIGHTS,
    assert_equals,
    assert_equals_naive,
    assert_same_gradients,
    both_paths,
    pair_of,
    pairs_of,
    trainer_of,
)
from naive_losses import distributions, naive_loss, run_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_models import VOCAB_SIZE, tiny_batch, tiny_model
from tiny_tokenizer import bert_tokenizer
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput, TokenClassifierOutput


@both_paths
@pytest.mark.parametrize(("head", "teacher", "student"), pairs_of(LANGUAGE_MODELS))
def test_language_models_equal_the_naive_loss_and_gradients(head, teacher, student, fused, tmp_path):
    models = pair_of(head, teacher, student)
    trainer = trainer_of(tmp_path, *models, fused_lm_head=fused)
    assert_equals_naive(trainer, head, *models, tiny_batch(head))
    assert trainer.pair.fused_heads.used is fused


@pytest.mark.parametrize(("head", "teacher", "student"), pairs_of(OTHERS))
def test_other_heads_equal_the_naive_loss_and_gradients(head, teacher, student, tmp_path):
    models = pair_of(head, teacher, student)
    assert_equals_naive(trainer_of(tmp_path, *models), head, *models, tiny_batch(head))


def test_answers_beyond_the_input_are_scored_neither_hard_nor_soft(tmp_path):
    models = pair_of("question-answering", "bert")
    batch = tiny_batch("question-answering")
    length = batch["input_ids"].shape[1]
    batch["start_positions"][1] = batch["end_positions"][1] = batch["end_positions"][2] = length
    assert not batch["attention_mask"].all()
    assert_equals_naive(trainer_of(tmp_path, *models), "question-answering", *models, batch)


@both_paths
@pytest.mark.parametrize("family", LANGUAGE_MODELS["seq2seq-lm"])
def test_decoder_inputs_of_the_batch_are_used_in_place_of_shifted_labels(family, fused, tmp_path):
    models = pair_of("seq2seq-lm", family)
    batch = tiny_batch("seq2seq-lm")
    batch["decoder_input_ids"] = batch["labels"].clamp(min=0).flip(1)
    trainer = trainer_of(tmp_path, *models, fused_lm_head=fused)
    assert_equals_naive(trainer, "seq2seq-lm", *models, batch)
    assert trainer.pair.fused_heads.used is fused


@both_paths
def test_an_encoder_decoder_that_shifts_labels_only_in_its_forward_has_the_naive_loss(fused, tmp_path):
    """M2M100, NLLB and Blenderbot lack `prepare_decoder_input_ids_from_labels`."""
    models = pair_of("seq2seq-lm", "m2m_100")
    assert not hasattr(models[0], "prepare_decoder_input_ids_from_labels")
    assert_equals_naive(
        trainer_of(tmp_path, *models, fused_lm_head=fused), "seq2seq-lm", *models, tiny_batch("seq2seq-lm")
    )


@both_paths
def test_modernbert_with_sparse_prediction_has_the_loss_of_the_whole_prediction(fused, tmp_path):
    models = pair_of("masked-lm", "modernbert")
    sparse = pair_of("masked-lm", "modernbert", sparse_prediction=True)
    assert all(model.sparse_prediction for model in sparse)
    trainer = trainer_of(tmp_path, *sparse, fused_lm_head=fused)
    assert_equals_naive(trainer, "masked-lm", *models, tiny_batch("masked-lm"))
    assert trainer.pair.fused_heads.used is fused


@both_paths
@pytest.mark.parametrize(("head", "family"), [("masked-lm", "bert"), ("causal-lm", "llama")])
def test_under_bf16_autocast_the_loss_differs_by_half_a_percent_and_gradients_by_three(head, family, fused, tmp_path):
    models = pair_of(head, family, initializer_range=0.1)
    batch = tiny_batch(head)
    trainer = trainer_of(tmp_path, *models, fused_lm_head=fused, bf16=True)
    loss = trainer.compute_loss(trainer.accelerator.prepare_model(trainer.model), dict(batch))
    loss.backward()
    assert trainer.pair.fused_heads.used is fused
    expected = naive_loss(head, *models, batch, WEIGHTS, TAU)
    expected.backward()
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0.0)
    for own, model in zip((trainer.teacher_model, trainer.student_model), models, strict=True):
        assert_same_gradients(own, model, tolerance=3e-2)


@both_paths
@pytest.mark.parametrize("larger", ["teacher", "student"])
@pytest.mark.parametrize(("head", "family"), [("masked-lm", "bert"), ("causal-lm", "llama"), ("seq2seq-lm", "bart")])
def test_vocabularies_padded_to_two_sizes_are_compared_on_the_ids_that_both_have(
    head, family, larger, fused, tmp_path
):
    tokenizer = bert_tokenizer()
    assert len(tokenizer) > VOCAB_SIZE
    sizes = {name: -(-len(tokenizer) // 8) * 8 + 8 * (name == larger) for name in ("teacher", "student")}
    models = [tiny_model(family, head, 1, seed, vocab_size=size) for seed, size in enumerate(sizes.values())]
    trainer = trainer_of(tmp_path, *models, fused_lm_head=fused, processing_class=tokenizer)
    assert_equals_naive(trainer, head, *models, tiny_batch(head))
    assert trainer.pair.fused_heads.used is fused


MODES = {
    "kd": {"student_hard": 1.0, "student_from_teacher": 1.0},
    "reversed": {"teacher_hard": 1.0, "teacher_from_student": 1.0},
    "community": {
        **dict.fromkeys(["teacher_hard", "student_hard", "student_from_teacher", "teacher_from_student"], 1.0),
        **dict.fromkeys(["student_from_pretrained", "teacher_from_pretrained"], 1.0),
    },
}


@both_paths
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(("head", "family"), [("masked-lm", "bert"), ("causal-lm", "llama"), ("seq2seq-lm", "t5")])
def test_modes_train_what_they_say_and_leave_frozen_models_without_gradients(head, family, mode, fused, tmp_path):
    names = ("teacher", "student", "pretrained")
    models = dict(zip(names, (*pair_of(head, family), tiny_model(family, head, 3, seed=3)), strict=True))
    extra = {"pretrained_teacher": models["pretrained"]} if mode == "community" else {}
    trainer = trainer_of(
        tmp_path, models["teacher"], models["student"], {}, distillation_mode=mode, fused_lm_head=fused, **extra
    )
    own = {**trainer.pair.learners, "pretrained": trainer.pretrained_teacher}
    batch = tiny_batch(head)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    expected = naive_loss(head, **models, batch=batch, weights=MODES[mode], tau=TAU)
    expected.backward()
    assert trainer.pair.fused_heads.used is fused
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    trained = {weight.split("_")[0] for weight in MODES[mode]}
    for name, model in own.items():
        if name in trained:
            assert_same_gradients(model, models[name])
        elif model is not None:
            assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@both_paths
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_part_of_a_model_that_is_frozen_gets_no_gradients_and_the_rest_its_own(tied, fused, tmp_path):
    """The output layer or what is below it: the pass computes only the gradients that are wanted."""
    models = pair_of("causal-lm", "llama", tie_word_embeddings=tied)
    models[0].get_output_embeddings().requires_grad_(False)
    models[1].model.requires_grad_(tied)
    models[1].model.layers.requires_grad_(False)
    trainer = trainer_of(tmp_path, *models, fused_lm_head=fused)
    assert_equals_naive(trainer, "causal-lm", *models, tiny_batch("causal-lm"))
    assert trainer.pair.fused_heads.used is fused
    for model in (trainer.teacher_model, trainer.student_model):
        assert {True, False} == {p.grad is None for p in model.parameters()}


@both_paths
def test_gradient_checkpointing_changes_no_gradient(fused, tmp_path):
    models = pair_of("masked-lm", "bert")
    trainer = trainer_of(tmp_path, *models, fused_lm_head=fused)
    for model in (trainer.teacher_model, trainer.student_model):
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
    assert_equals_naive(trainer, "masked-lm", *models, tiny_batch("masked-lm"))


# ---- Models and arguments that need the whole logits ----


def test_the_balance_of_experts_stays_in_the_hard_loss(tmp_path):
    models = pair_of("causal-lm", "mixtral")
    batch = tiny_batch("causal-lm")
    trainer = trainer_of(tmp_path, *models)
    naive = naive_loss("causal-lm", *models, batch, WEIGHTS, TAU)
    for model, weight in zip(models, (WEIGHTS["teacher_hard"], WEIGHTS["student_hard"]), strict=True):
        naive = naive + weight * model.config.router_aux_loss_coef * run_model(model, batch).aux_loss
    assert_equals(trainer, naive, models, batch)
    assert trainer.pair.fused_heads.used is False


@pytest.mark.parametrize(
    ("head", "family"),
    [("causal-lm", "gpt2"), ("masked-lm", "bert"), ("seq2seq-lm", "t5"), ("token-classification", "bert")],
)
def test_label_smoothing_is_that_of_the_scored_positions(head, family, tmp_path):
    """Those of a causal model are shifted, and an encoder-decoder has the decoder inputs that the labels give."""
    models = pair_of(head, family)
    batch = tiny_batch(head)
    trainer = trainer_of(tmp_path, *models, label_smoothing_factor=0.2)
    soft = {name: weight for name, weight in WEIGHTS.items() if "hard" not in name}
    naive = naive_loss(head, *models, batch, soft, TAU)
    for model, weight in zip(models, (WEIGHTS["teacher_hard"], WEIGHTS["student_hard"]), strict=True):
        scored = distributions(head, run_model(model, batch), batch)
        naive = naive + weight * F.cross_entropy(*scored, label_smoothing=0.2)
    assert_equals(trainer, naive, models, batch)
    assert not trainer.pair.fused_heads.used


def test_compute_loss_func_gets_the_logits_of_each_model_and_the_number_of_scored_positions(tmp_path):
    def loss_func(outputs, labels, num_items_in_batch):
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return 3.0 * F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    models = pair_of("causal-lm", "llama")
    batch = tiny_batch("causal-lm")
    trainer = trainer_of(tmp_path, *models, compute_loss_func=loss_func)
    scored = (batch["labels"][:, 1:] != -100).sum()
    assert scored < (batch["labels"] != -100).sum()
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) == scored
    weights = {name: weight * (3.0 if "hard" in name else 1.0) for name, weight in WEIGHTS.items()}
    naive = naive_loss("causal-lm", *models, batch, weights, TAU)
    assert_equals(trainer, naive, models, batch, num_items_in_batch=scored)
    assert trainer.pair.fused_heads.used is False


ADAPTERS = {
    "LoRA of attention": (LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), True),
    "LoRA of the head": (LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False), False),
    "a new head": (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False), False),
    "prefix": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), True),
    "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False),
}


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_adapters_equal_the_naive_loss_and_fall_back_where_the_head_is_no_linear_layer(adapter, tmp_path):
    config, fused = ADAPTERS[adapter]
    config.task_type = "CAUSAL_LM"
    models = pair_of("causal-lm", "qwen2")
    torch.manual_seed(0)
    models = [get_peft_model(model, copy.deepcopy(config)) for model in models]
    trainer = trainer_of(tmp_path, *models)
    batch = tiny_batch("causal-lm")
    batch["labels"][:, 0] = -100  # the last virtual token of a prompt predicts the first token
    assert_equals_naive(trainer, "causal-lm", *models, batch)
    assert trainer.pair.fused_heads.used is fused
    assert any(p.grad is None for p in trainer.student_model.parameters())


class HalvedLogits(BertForMaskedLM):
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, token_type_ids)
        logits = outputs.logits / 2
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class UnshiftedLoss(LlamaForCausalLM):
    """Its labels are those of the positions themselves, but its logits are compared as those of the next token."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            outputs["loss"] = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


@pytest.mark.parametrize(
    ("head", "family", "subclass"), [("masked-lm", "bert", HalvedLogits), ("causal-lm", "llama", UnshiftedLoss)]
)
def test_a_subclass_with_logits_or_a_loss_of_its_own_keeps_them(head, family, subclass, tmp_path):
    models = pair_of(head, family)
    for model in models:
        model.__class__ = subclass
    batch = tiny_batch(head)
    soft = {name: weight for name, weight in WEIGHTS.items() if "hard" not in name}
    naive = naive_loss(head, *models, batch, soft, TAU)
    for model, weight in zip(models, (WEIGHTS["teacher_hard"], WEIGHTS["student_hard"]), strict=True):
        naive = naive + weight * run_model(model, batch, labelled=True).loss
    trainer = trainer_of(tmp_path, *models)
    assert_equals(trainer, naive, models, batch)
    assert trainer.pair.fused_heads.used is False


# ---- Heads that are not known ----


class Wrapper(PreTrainedModel):
    """A masked language model whose class no `AutoModel` knows."""

    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, model):
        super().__init__(model.config)
        self.model = model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        return self.model(input_ids, attention_mask, token_type_ids, labels=labels)


def test_a_task_given_by_name_makes_a_model_of_an_unknown_class_a_masked_language_model(tmp_path):
    models = [Wrapper(model) for model in pair_of("masked-lm", "bert")]
    with pytest.raises(ValueError, match="Wrapper, a head that is not known"):
        trainer_of(tmp_path, *models)
    trainer = trainer_of(tmp_path, *models, task="masked-lm")
    assert_equals_naive(trainer, "masked-lm", *models, tiny_batch("masked-lm"))
    assert trainer.pair.fused_heads.used


class Tracker(PreTrainedModel):
    """Predicts a point for each token: a head that nobody knows."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, labels=None):
        points = self.head(self.embedding(input_ids))
        loss = None if labels is None else (points - labels).abs().mean()
        return TokenClassifierOutput(loss=loss, logits=points)


def distance(source, learner, inputs):
    """Not symmetric, and no comparison that a task makes."""
    weight = source["logits"].sigmoid() * inputs["input_ids"].ne(0)[..., None]
    return (weight * (learner["logits"] - source["logits"]) ** 2).mean()


@pytest.mark.parametrize("head", ["unknown", "token-classification", "causal-lm"])
def test_soft_loss_func_takes_the_place_of_the_comparison_of_any_head(head, tmp_path):
    if head == "unknown":
        batch = {"input_ids": tiny_batch("causal-lm")["input_ids"], "labels": torch.randn(4, 10, 2)}
        models = [Tracker(BertConfig(vocab_size=VOCAB_SIZE, hidden_size=size)) for size in (8, 4)]
    else:
        batch = tiny_batch(head)
        models = pair_of(head, "bert" if head == "token-classification" else "llama")
    trainer = trainer_of(tmp_path, *models, soft_loss_func=distance)
    teacher, student = (run_model(model, batch, labelled=True) for model in models)
    naive = WEIGHTS["teacher_hard"] * teacher.loss + WEIGHTS["student_hard"] * student.loss
    for weight, source, learner in (
        ("student_from_teacher", teacher, student),
        ("teacher_from_student", student, teacher),
    ):
        naive = naive + WEIGHTS[weight] * distance({"logits": source.logits.detach()}, learner, batch)
    assert_equals(trainer, naive, models, batch)
    assert trainer.pair.fused_heads.used is (False if head == "causal-lm" else None)


class Renamed(Tracker):
    """Calls its labels by another name."""

    def forward(self, input_ids, targets=None):
        return super().forward(input_ids, targets)


def test_the_labels_of_an_unknown_head_have_the_names_that_the_trainer_knows(tmp_path):
    labels = torch.randn(4, 10, 2)
    losses = []
    for cls, name in ((Tracker, "labels"), (Renamed, "targets")):
        torch.manual_seed(0)
        models = [cls(BertConfig(vocab_size=VOCAB_SIZE, hidden_size=size)) for size in (8, 4)]
        batch = {"input_ids": tiny_batch("causal-lm")["input_ids"], name: labels}
        trainer = trainer_of(tmp_path, *models, soft_loss_func=distance, label_names=[name])
        losses.append(trainer.compute_loss(trainer.pair, batch))
    assert losses[0] == losses[1]


def test_soft_losses_alone_train_on_batches_without_labels(tmp_path):
    """Without labels all tokens count that are no padding."""
    models = pair_of("token-classification", "bert")
    batch = tiny_batch("token-classification")
    del batch["labels"]
    weights = {"teacher_hard": 0.0, "student_hard": 0.0, "student_from_teacher": 0.5, "teacher_from_student": 1.5}
    trainer = trainer_of(tmp_path, *models, weights)
    every_token = {**batch, "labels": 100 * (batch["attention_mask"] - 1)}
    naive = naive_loss("token-classification", *models, every_token, weights, TAU)
    assert_equals(trainer, naive, models, batch)
