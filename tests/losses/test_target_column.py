"""Edges whose targets are a column of the data, in place of a frozen teacher."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import (
    PROBLEMS,
    OnTheFly,
    assert_same_weights,
    tiny_args,
    tiny_bert,
    tiny_rows,
    tiny_trainer,
)
from tiny_models import rows_of, tiny_batch, tiny_model
from tiny_tokenizer import bert_tokenizer
from transformers import DataCollatorWithPadding, default_data_collator

from ctcd_trainer import CoDistillationTrainer, Mixup
from ctcd_trainer.tasks.labels import TARGETS

WEIGHTS = {"student_from_pretrained_weight": 0.7, "teacher_from_pretrained_weight": 1.3}


def rows_with_targets(model, problem="single_label", missing=(), count=24, ragged=False):
    """Rows with the predictions of a model as a column, and NaN for some."""
    rows = tiny_rows(count, problem, ragged=ragged)
    with torch.no_grad():
        logits = [model.eval()(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    nothing = [np.nan] * len(logits[0])
    pairs = enumerate(zip(rows, logits, strict=True))
    return [row | {TARGETS: nothing if i in missing else z.tolist()} for i, (row, z) in pairs]


def trained(folder, **options):
    trainer = tiny_trainer(folder, **{"distillation_mode": "ctcd", **WEIGHTS, **options})
    trainer.train()
    return trainer


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_column_of_its_predictions_stands_for_a_frozen_teacher(tmp_path, problem):
    """Also with evaluations on rows without the column."""
    source = tiny_bert(2, seed=3, problem=problem)
    rows = Dataset.from_list(rows_with_targets(source, problem))
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny_rows(5, problem)}
    options = {
        "problem": problem,
        "data_collator": default_data_collator,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    column = trained(tmp_path / "a", train_dataset=rows, **options, **evaluation)
    model = trained(tmp_path / "b", train_dataset=rows.remove_columns(TARGETS), pretrained_teacher=source, **options)
    assert column.pretrained_teacher is None
    assert_same_weights(column.model, model.model, tolerance=2e-6)
    losses = [
        [log[name] for log in t.state.log_history if name in log] for t in (column, model) for name in ("train_loss",)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def soft_loss_of(problem, learner, source):
    """The mean of the soft loss over rows, written out."""
    if problem == "regression":
        return (learner - source).square().mean()
    if problem == "multi_label":
        p, q = torch.sigmoid(learner), torch.sigmoid(source)
        values = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        return values.sum(-1).mean()
    p, q = torch.softmax(learner, -1), torch.softmax(source, -1)
    return (q * (q / p).log()).sum(-1).mean()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_rows_without_a_target_count_nothing_in_these_edges(tmp_path, problem):
    rows = rows_with_targets(tiny_bert(2, seed=3, problem=problem), problem, missing=(0, 3, 4))
    trainer = tiny_trainer(tmp_path, problem, **WEIGHTS, train_dataset=rows, distillation_mode="standalone")
    models = copy.deepcopy([trainer.teacher_model, trainer.student_model])
    batch = default_data_collator(rows[:6])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    targets = batch.pop(TARGETS)
    outputs = [model(**batch) for model in models]
    expected, there = sum(output.loss for output in outputs), [1, 2, 5]
    for output, weight in zip(outputs, (1.3, 0.7), strict=True):
        expected = expected + weight * soft_loss_of(problem, output.logits[there], targets[there])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for own, model in zip((trainer.teacher_model, trainer.student_model), models, strict=True):
        for (name, parameter), other in zip(own.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_accumulated_batch_is_a_batch(tmp_path):
    """Rows without a target or a label are in some of the micro-batches; one has no target at all."""
    rows = rows_with_targets(tiny_bert(2, seed=3), missing=(0, 1, 2, 3, 5, 9))
    for index in (1, 4, 8):
        rows[index]["labels"] = -100
    options = {"train_dataset": rows, "data_collator": default_data_collator, "max_steps": 2}
    options["edges"] = {"pretrained->teacher": {"rows": "labelled"}}
    whole = trained(tmp_path / "a", per_device_train_batch_size=8, **options)
    parts = trained(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_same_weights(whole.model, parts.model, tolerance=2e-6)


def test_padding_collators_and_streams_keep_the_column(tmp_path):
    rows = Dataset.from_list(rows_with_targets(tiny_bert(2, seed=3), missing=(2,), ragged=True))
    tokenizer = bert_tokenizer()
    make = lambda layers: tiny_bert(layers, seed=layers, vocab_size=len(tokenizer))  # noqa: E731
    options = {"data_collator": DataCollatorWithPadding(tokenizer), "max_steps": 2}
    expected = trained(tmp_path / "a", train_dataset=rows, model=make(3), student_model=make(2), **options)
    for name, stream in (("b", rows.to_iterable_dataset()), ("c", OnTheFly(list(rows)))):
        models = {"model": make(3), "student_model": make(2)}
        found = trained(tmp_path / name, train_dataset=stream, **models, **options)
        assert_same_weights(found.model, expected.model)


def test_multiple_choice_has_a_target_for_each_choice(tmp_path):
    teacher, student = (tiny_model("bert", "multiple-choice", layers, seed=layers) for layers in (2, 1))
    batch = tiny_batch("multiple-choice")
    targets = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    rows = [row | {TARGETS: target} for row, target in zip(rows_of(batch), targets, strict=True)]
    args = tiny_args(tmp_path, distillation_mode="standalone", **WEIGHTS)
    trainer = CoDistillationTrainer(
        copy.deepcopy(teacher), args, train_dataset=rows, student_model=copy.deepcopy(student)
    )
    loss = trainer.compute_loss(trainer.model, default_data_collator(rows))
    expected = sum(model(**batch).loss for model in (teacher, student))
    for model, weight in ((teacher, 1.3), (student, 0.7)):
        expected = expected + weight * soft_loss_of("single_label", model(**batch).logits, targets)
    torch.testing.assert_close(loss, expected)


def test_the_column_is_ignored_where_a_frozen_teacher_runs(tmp_path):
    source = tiny_bert(2, seed=3)
    wrong = [row | {TARGETS: [9.0, 0.0, 0.0]} for row in tiny_rows()]
    options = {"pretrained_teacher": source, "data_collator": default_data_collator, "remove_unused_columns": False}
    found = trained(tmp_path / "a", train_dataset=wrong, max_steps=2, **options)
    assert_same_weights(found.model, trained(tmp_path / "b", max_steps=2, **options).model)


def changed(index, target):
    rows = rows_with_targets(tiny_bert(2, seed=3), count=6)
    rows[index] = rows[index] | {TARGETS: target}
    return rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": tiny_rows()}, "give `train_dataset` its predictions as a column 'pretrained_logits'"),
        ({"train_dataset": changed(2, [0.0, 1.0])}, r"target \[0.0, 1.0\] of row 2 \('pretrained_logits'\) must be 3"),
        ({"train_dataset": changed(3, [0.0, np.nan, 1.0])}, "of row 3"),
        ({"train_dataset": changed(3, [0.0, np.inf, 1.0])}, "of row 3"),
        ({"train_dataset": changed(4, None)}, "target None of row 4"),
        ({"train_dataset": [row | {TARGETS: [np.nan] * 3} for row in tiny_rows()]}, "no row has a target"),
        ({"augmentation": Mixup()}, r"`augmentation` \(Mixup\) mixes rows"),
        ({"pretrained_cache_dir": "cache"}, "`pretrained_cache_dir` is given"),
        ({"soft_loss_func": lambda *outputs: 0.0}, "`soft_loss_func` is given"),
        ({"student_feature_weight": 1.0, "feature_source": "pretrained"}, "features and ensembles need a model"),
        (
            {"edges": {"ensemble->student": {"weight": 1.0}}, "ensemble": {"teacher": 0.5, "pretrained": 0.5}},
            "features and ensembles need a model",
        ),
        ({"student_from_pretrained_weight": "auto"}, "`student_from_pretrained_weight` follows from predictions"),
    ],
)
def test_targets_that_cannot_be_used_are_refused_before_the_training(tmp_path, options, message):
    settings = {"train_dataset": changed(0, [0.0, 1.0, 2.0]), "eval_dataset": tiny_rows(4), "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **{"distillation_mode": "ctcd", **WEIGHTS, **settings, **options})


def test_a_stream_without_the_column_and_language_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape None: the models have logits of the shape \(4, 3\)"):
        trained(tmp_path, train_dataset=OnTheFly(tiny_rows()))
    models = [tiny_model("bert", "masked-lm", layers, seed=layers) for layers in (2, 1)]
    rows = [row | {TARGETS: [0.0]} for row in rows_of(tiny_batch("masked-lm"))]
    args = tiny_args(tmp_path, distillation_mode="ctcd", **WEIGHTS)
    with pytest.raises(ValueError, match="too large for masked-lm"):
        CoDistillationTrainer(models[0], args, train_dataset=rows, student_model=models[1])
