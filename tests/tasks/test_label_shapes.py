"""Labels in every form that plain Trainer takes; those that would be broadcast are refused."""

import pytest
import torch
from datasets import Dataset
from tiny import OnTheFly, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import tiny_batch, tiny_model
from torch.nn import functional as F
from transformers import ASTConfig, ASTForAudioClassification, Trainer, default_data_collator

from ctcd_trainer import make_pair
from ctcd_trainer.task import Task


def tiny_ast(layers, seed, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.3}
    patches = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 8, "num_mel_bins": 8}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ASTForAudioClassification(ASTConfig(num_hidden_layers=layers, **sizes, **patches, **dropout, **settings))


@pytest.mark.parametrize(
    "make", [tiny_ast, lambda layers, seed: tiny_model("wav2vec2", "audio-classification", layers)]
)
def test_recordings_take_labels_as_a_column_of_one(make):
    teacher, student = make(2, 0), make(1, 1)
    batch = tiny_batch("audio-classification")
    if isinstance(teacher, ASTForAudioClassification):
        batch = {"input_values": torch.randn(4, 8, 8), "labels": batch["labels"] % 2}
    pair = make_pair(teacher, student)
    flat, column = pair(**batch), pair(**{**batch, "labels": batch["labels"][:, None]})
    assert flat.losses.keys() == column.losses.keys()
    assert all(torch.equal(column.losses[name], value) for name, value in flat.losses.items())


def test_recordings_take_several_labels():
    settings = {"num_labels": 4, "problem_type": "multi_label_classification"}
    teacher, student = tiny_ast(2, 0, **settings), tiny_ast(1, 1, **settings)
    batch = {"input_values": torch.randn(4, 8, 8), "labels": torch.randint(0, 2, (4, 4)).float()}
    losses = make_pair(teacher, student)(**batch).losses
    assert torch.equal(losses["teacher_hard_loss"], teacher(**batch).loss)
    p, q = (model(batch["input_values"]).logits.sigmoid() for model in (teacher, student))
    soft = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    torch.testing.assert_close(losses["student_from_teacher_loss"], soft)


@pytest.mark.parametrize("form", [list, Dataset.from_list, OnTheFly])
@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
def test_boolean_labels_are_taken_as_plain_trainer_takes_them(problem, form, tmp_path):
    rows = [{"input_ids": row["input_ids"], "label": bool(index % 3)} for index, row in enumerate(tiny_rows(8))]
    if problem == "multi_label":
        rows = [{**row, "label": [row["label"], index % 2 == 0]} for index, row in enumerate(rows)]
    head = {"num_labels": 2, "problem_type": None if problem == "single_label" else "multi_label_classification"}
    settings = {"max_steps": 2, "logging_steps": 1}
    models = [tiny_bert(3, 1, **head) for _ in range(2)]
    plain = Trainer(models[0], tiny_args(tmp_path, **settings), train_dataset=form(rows))
    plain.train()
    options = {"student_from_teacher_weight": 0.0, "teacher_from_student_weight": 0.0}
    options |= {"model": models[1], "student_model": tiny_bert(2, 2, **head), "data_collator": default_data_collator}
    trainer = tiny_trainer(tmp_path, train_dataset=form(rows), **options, **settings)
    trainer.train()
    for ours, theirs in zip(trainer.state.log_history[:2], plain.state.log_history[:2], strict=True):
        assert ours["teacher_hard_loss"] == pytest.approx(theirs["loss"], abs=0)


@pytest.mark.parametrize(
    ("problem", "settings", "labels", "message"),
    [
        ("single_label", {}, [[1, 0, 1]] * 8, r"integers of the shape \(8, 3\).*index of one class"),
        ("multi_label", {}, [[0.0]] * 8, r"`num_labels=4` and the labels have shape \(8, 1\)"),
        (
            "multi_label",
            {},
            [[True] * 4] * 8,
            "of type bool, and `problem_type='multi_label_classification'` needs float",
        ),
        ("regression", {}, [[0.5, 1.0]] * 8, r"`num_labels=1` and the labels have the shape \(8, 2\)"),
        ("regression", {"num_labels": 2}, [0.5] * 8, r"`num_labels=2` and the labels have the shape \(8,\)"),
        ("regression", {"num_labels": 2}, [[0.5]] * 8, r"`num_labels=2` and the labels have the shape \(8, 1\)"),
    ],
)
def test_labels_of_another_shape_than_the_outputs_are_refused(problem, settings, labels, message, tmp_path):
    rows = [{**row, "labels": label} for row, label in zip(tiny_rows(8), labels, strict=True)]
    models = {
        "model": tiny_bert(2, problem=problem, **settings),
        "student_model": tiny_bert(1, 1, problem, **settings),
    }
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, problem, **models, train_dataset=rows)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_scores_of_a_stream_are_not_broadcast_to_several_outputs(shape):
    pair = make_pair(*(tiny_bert(1, seed, "regression", num_labels=2) for seed in range(2)))
    batch = {**collate(tiny_rows(2)), "labels": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"`labels` have the shape \(2,.* and the logits \(2, 2\)"):
        pair(**batch)


def test_scores_may_be_a_column_of_one_or_flat():
    pair = make_pair(*(tiny_bert(1, seed, "regression") for seed in range(2)))
    batch = collate(tiny_rows(4, "regression"))
    losses = pair(**batch).losses
    column = pair(**{**batch, "labels": batch["labels"][:, None]}).losses
    assert all(torch.equal(column[name], value) for name, value in losses.items())


def test_a_soft_loss_is_not_broadcast_to_labels_of_another_shape():
    """A task of the user's, whose model flattens the labels."""
    models = [tiny_bert(1, seed) for seed in range(2)]
    batch = collate(tiny_rows(4))
    batch["labels"] = batch["labels"][:, None]
    logits = [model(batch["input_ids"]).logits for model in models]
    assert F.cross_entropy(logits[0], batch["labels"][:, 0]).isfinite()
    with pytest.raises(
        ValueError, match=r"positions of the shape \(4, 1\), and logits of the shape \(4, 3\) need \(4,\)"
    ):
        make_pair(*models, task=Task(models[0].config))(**batch)
    outputs = {"logits": logits[0]}, {"logits": logits[1][:, :1]}
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(4, 1\)"):
        Task(models[0].config).soft_loss(*outputs, {"labels": batch["labels"][:, 0]}, "kl", 1.0)
