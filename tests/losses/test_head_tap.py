"""Which positions go through the head of a language model, which path is taken, and that the log says so."""

import logging

import pytest
import torch
from head_pairs import assert_equals_naive, pair_of, trainer_of
from tiny_models import VOCAB_SIZE, rows_of, tiny_batch
from torch import nn
from transformers import BartConfig, BartForCausalLM, BertForMaskedLM


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="ctcd_trainer.pair.fused_heads")
    return lambda: [record.getMessage() for record in caplog.records if "language-model heads" in record.getMessage()]


def step(trainer, head):
    return trainer.compute_loss(trainer.model, dict(tiny_batch(head)))


def shapes_into(module):
    shapes = []
    module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


def test_only_the_scored_positions_go_through_the_whole_head(tmp_path):
    trainer = trainer_of(tmp_path, *pair_of("masked-lm", "bert"))
    step(trainer, "masked-lm")  # decides the path
    shapes = [shapes_into(model.cls.predictions.transform) for model in (trainer.teacher_model, trainer.student_model)]
    step(trainer, "masked-lm")
    scored = int((tiny_batch("masked-lm")["labels"] != -100).sum())
    assert 0 < scored < tiny_batch("masked-lm")["labels"].numel()
    assert [[shape[:-1] for shape in own] for own in shapes] == [[(1, scored)]] * 2


class MixingHead(nn.Module):
    """Adds to each position the one before it, so that no position can be left out."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden + 0.5 * hidden.roll(1, dims=1))


class BertOfMixedPositions(BertForMaskedLM):
    def __init__(self, config):
        super().__init__(config)
        self.cls = MixingHead(self.cls)

    def get_output_embeddings(self):
        return self.cls.head.predictions.decoder


def test_a_head_that_mixes_positions_gets_them_all_and_is_stopped_at_its_last_layer(tmp_path):
    models = []
    for plain in pair_of("masked-lm", "bert", tie_word_embeddings=False):
        model = BertOfMixedPositions(plain.config)
        state = {name.replace("cls.", "cls.head.", 1): value for name, value in plain.state_dict().items()}
        model.load_state_dict(state)
        models.append(model)
    trainer = trainer_of(tmp_path, *models)
    assert_equals_naive(trainer, "masked-lm", *models, tiny_batch("masked-lm"))
    assert trainer.pair.fused_heads.used
    assert trainer.pair.fused_heads.taps["teacher"].entry is None


def test_the_log_says_once_that_the_fast_path_is_taken(tmp_path, messages):
    trainer = trainer_of(tmp_path, *pair_of("masked-lm", "bert"))
    for _ in range(2):
        step(trainer, "masked-lm")
    assert messages() == ["Losses of the language-model heads: one fused pass over the scored positions."]


def test_the_log_says_why_the_fast_path_is_not_taken(tmp_path, messages):
    step(trainer_of(tmp_path, *pair_of("masked-lm", "bert"), fused_lm_head=False), "masked-lm")
    step(trainer_of(tmp_path, *pair_of("causal-lm", "llama"), label_smoothing_factor=0.1), "causal-lm")
    assert messages() == [
        "Losses of the language-model heads: whole logits, because `fused_lm_head` is False.",
        "Losses of the language-model heads: whole logits, because `label_smoothing_factor` is set.",
    ]


def test_the_path_is_decided_anew_for_each_training(tmp_path, messages):
    trainer = trainer_of(tmp_path, *pair_of("masked-lm", "bert"), max_steps=1)
    trainer.train_dataset = rows_of(tiny_batch("masked-lm"))
    trainer.train()
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()
    trainer.train()
    assert [message.split(": ")[1].split(",")[0] for message in messages()] == [
        "one fused pass over the scored positions.",
        "whole logits",
    ]


def test_a_causal_model_that_does_not_shift_labels_is_named_and_trains_fused_as_what_it_is(tmp_path, messages):
    config = BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
    )
    models = [BartForCausalLM(config) for _ in range(2)]
    step(trainer_of(tmp_path, *models), "causal-lm")
    assert "its labels are not shifted by the model (if intended, pass `task='masked-lm'`)" in messages()[0]
    trainer = trainer_of(tmp_path, *models, task="masked-lm")
    step(trainer, "causal-lm")
    assert trainer.pair.fused_heads.used


def test_the_models_are_left_without_hooks_and_in_their_mode(tmp_path):
    trainer = trainer_of(tmp_path, *pair_of("masked-lm", "bert"))
    trainer.model.train()
    step(trainer, "masked-lm").backward()
    for model in (trainer.teacher_model, trainer.student_model):
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_batch_that_scores_nothing_gives_zero_whatever_the_path(tmp_path):
    batch = tiny_batch("masked-lm")
    for fused in (True, False):
        trainer = trainer_of(tmp_path, *pair_of("masked-lm", "bert"), fused_lm_head=fused)
        step(trainer, "masked-lm")
        loss = trainer.compute_loss(trainer.model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
