"""Pairs of every head and family, and assertions that their loss and gradients are the naive ones."""

import copy

import pytest
import torch
from naive_losses import naive_loss
from tiny import tiny_args
from tiny_models import tiny_model

from ctcd_trainer import CoDistillationTrainer

#: All different, so that a loss that reaches the wrong model or has the wrong weight is seen.
WEIGHTS = {"teacher_hard": 1.0, "student_hard": 0.7, "student_from_teacher": 0.5, "teacher_from_student": 1.5}
TAU = 2.0

both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "whole logits"])

LANGUAGE_MODELS = {
    "masked-lm": ["bert", "distilbert", "roberta", "deberta-v2", "electra", "modernbert", "albert"],
    "causal-lm": ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "cohere", "granite"],
    "seq2seq-lm": ["t5", "bart"],
}
OTHERS = {
    "token-classification": ["bert", "deberta-v2"],
    "question-answering": ["bert", "distilbert"],
    "multiple-choice": ["bert"],
    "image-classification": ["vit", "resnet"],
    "audio-classification": ["wav2vec2"],
}
MIXED = [
    ("masked-lm", "bert", "distilbert"),
    ("causal-lm", "llama", "qwen2"),
    ("seq2seq-lm", "t5", "bart"),
    ("token-classification", "bert", "distilbert"),
]


def pairs_of(families):
    mixed = [pair for pair in MIXED if pair[0] in families]
    return [(head, family, family) for head, names in families.items() for family in names] + mixed


def pair_of(head, teacher, student=None, **settings):
    """A teacher of two layers and a student of one."""
    return tiny_model(teacher, head, 2, seed=1, **settings), tiny_model(
        student or teacher, head, 1, seed=2, **settings
    )


def trainer_of(tmp_path, teacher, student, weights=WEIGHTS, tau=TAU, **options):
    """A trainer of copies of the models."""
    names = ("pretrained_teacher", "task", "soft_loss_func", "compute_loss_func", "processing_class")
    own = {name: options.pop(name) for name in names if name in options}
    if "pretrained_teacher" in own:
        own["pretrained_teacher"] = copy.deepcopy(own["pretrained_teacher"])
    args = tiny_args(tmp_path, temperature=tau, **{f"{k}_weight": v for k, v in weights.items()}, **options)
    return CoDistillationTrainer(copy.deepcopy(teacher), args, student_model=copy.deepcopy(student), **own)


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(actual, expected, tolerance=1e-5):
    """Each parameter's gradient, relative to its norm; noise around a gradient of zero is measured by the others."""
    actual, expected = gradients_of(actual), gradients_of(expected)
    assert actual.keys() == expected.keys()
    missing = {name for name in actual if (actual[name] is None) != (expected[name] is None)}
    assert not missing, missing
    expected = {name: grad for name, grad in expected.items() if grad is not None}
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert total > 0
    for name, grad in expected.items():
        error = (actual[name] - grad).norm()
        assert error <= tolerance * (grad.norm() + 0.01 * total), f"{name}: {error} of {grad.norm()} (all: {total})"


def assert_equals(trainer, expected, models, batch, num_items_in_batch=None):
    """The loss of the trainer is the expected one, and it gives both models the gradients that the expected one gives.

    Args:
        trainer: Has copies of the models.
        expected: Computed from the models.
        models: Teacher and student.
        batch: The batch.
        num_items_in_batch: As in `compute_loss`.
    """
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items_in_batch)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    for own, model in zip((trainer.teacher_model, trainer.student_model), models, strict=True):
        assert_same_gradients(own, model)


def assert_equals_naive(trainer, head, teacher, student, batch):
    expected = naive_loss(head, teacher, student, batch, WEIGHTS, TAU)
    assert_equals(trainer, expected, (teacher, student), batch)
