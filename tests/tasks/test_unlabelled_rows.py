"""Rows without a label train through the soft losses alone, each term a mean over what it has."""

import math

import pytest
import torch
from datasets import IterableDataset
from tiny import PROBLEMS, assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import rows_of, tiny_batch, tiny_model
from torch.nn import functional as F
from transformers import default_data_collator

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.training.meters import LossMeter

#: Both soft losses compare all rows; by default a teacher learns from its student on labelled rows.
ALL_ROWS = {"edges": {"student->teacher": {"rows": "all"}}}
UNLABELLED = {"single_label": -100, "multi_label": [math.nan] * 4, "regression": math.nan}


def mixed_rows(problem: str, count: int = 24, unlabelled: tuple[int, ...] = (0, 3, 4, 9, 10, 11)) -> list[dict]:
    return [
        {**row, "labels": UNLABELLED[problem]} if index % 12 in unlabelled else row
        for index, row in enumerate(tiny_rows(count, problem))
    ]


def naive_losses(problem: str, logits: list[torch.Tensor], rows: list[dict], tau: float, kind: str) -> torch.Tensor:
    """The sum of both hard and both soft losses of some rows, one row at a time; the teacher's on rows of a kind."""
    hard, total, count = 0.0, 0.0, 0
    for index, row in enumerate(rows):
        first, second = (each[index] for each in logits)
        labelled = row["labels"] != UNLABELLED[problem] and not math.isnan(torch.tensor(row["labels"]).sum().item())
        count += labelled
        for own, other in ((first, second.detach()), (second, first.detach())):
            soft = 0.0
            if problem == "single_label":
                soft = soft + tau**2 * F.kl_div(
                    F.log_softmax(own / tau, -1), F.log_softmax(other / tau, -1), reduction="sum", log_target=True
                )
                hard = hard + F.cross_entropy(own, torch.tensor(row["labels"])) if labelled else hard
            elif problem == "multi_label":
                for z, target in zip(own / tau, torch.sigmoid(other / tau), strict=True):
                    p = torch.stack([target, 1 - target])
                    q = torch.stack([F.logsigmoid(z), F.logsigmoid(-z)])
                    soft = soft + tau**2 * (p * (p.log() - q)).sum()
                label = torch.tensor(row["labels"])
                hard = hard + F.binary_cross_entropy_with_logits(own, label) if labelled else hard
            else:
                soft = soft + (own - other).square().sum()
                hard = hard + (own - torch.tensor(row["labels"])).square().sum() if labelled else hard
            if own is second or kind == "all":
                total = total + soft / len(rows)
            elif labelled == (kind == "labelled"):
                alike = [UNLABELLED[problem] is each["labels"] or each["labels"] == -100 for each in rows]
                total = total + soft / alike.count(kind == "unlabelled")
    return hard / count + total


@pytest.mark.parametrize(("tau", "kind"), [(1.0, "all"), (3.0, "all"), (3.0, "labelled"), (1.0, "unlabelled")])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_loss_is_a_mean_over_its_own_rows(problem, tau, kind, tmp_path):
    rows = mixed_rows(problem)
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    settings = {**options, "temperature": tau, "per_device_train_batch_size": 8, "max_steps": 3}
    settings |= {"edges": {"student->teacher": {"rows": kind}}} if kind != "labelled" else {}  # the default
    trainer = tiny_trainer(tmp_path, problem, train_dataset=rows, **settings)
    twin = tiny_trainer(tmp_path, problem)
    models = [twin.teacher_model, twin.student_model]
    for step in range(3):
        own = rows[8 * step : 8 * step + 8]
        batch = collate(own)
        batch.pop("labels")
        logits = [model.train()(**batch).logits for model in models]
        for model in models:
            model.zero_grad()
        naive_losses(problem, logits, own, tau, kind).backward()
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
    trainer.train()
    assert_same_weights(trainer.teacher_model, models[0], 1e-5)
    assert_same_weights(trainer.student_model, models[1], 1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_accumulated_batches_count_each_kind_of_row_over_all_of_them(problem, tmp_path):
    """Also where a micro-batch has no labelled row, or no other."""
    rows = mixed_rows(problem, 16, unlabelled=(0, 1, 5, 8, 9))
    settings = {"train_dataset": rows, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
    gate = {} if problem == "regression" else {"gate": "confident"}
    settings["edges"] = {"teacher->student": {"rows": "unlabelled", **gate}}
    trainers = [
        tiny_trainer(
            tmp_path, problem, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        for size in (8, 2, 1)
    ]
    for trainer in trainers:
        trainer.train()
    for other in trainers[1:]:
        assert_same_weights(other.pair, trainers[0].pair, 1e-6)
        for log, expected in zip(other.state.log_history, trainers[0].state.log_history, strict=True):
            losses = {name: value for name, value in expected.items() if name.endswith(("_loss", "_gate"))}
            assert {name: log[name] for name in losses} == pytest.approx(losses, rel=1e-5)


def test_a_multiple_choice_without_a_label_is_compared(tmp_path):
    batch = tiny_batch("multiple-choice", 8)
    models = {
        "model": tiny_model("bert", "multiple-choice", 2),
        "student_model": tiny_model("bert", "multiple-choice", 1),
    }
    data = {"train_dataset": rows_of(batch), "data_collator": default_data_collator}
    trainer = tiny_trainer(tmp_path, **models, **data, **ALL_ROWS)
    batch["labels"][[1, 4]] = -100
    loss = trainer.compute_loss(trainer.pair, dict(batch))
    with torch.no_grad():
        logits = [F.log_softmax(model(**{**batch, "labels": None}).logits, -1) for model in models.values()]
    labelled = batch["labels"] != -100
    hard = sum(F.nll_loss(own[labelled], batch["labels"][labelled]) for own in logits)
    soft = sum(F.kl_div(own, other, reduction="batchmean", log_target=True) for own, other in (logits, logits[::-1]))
    torch.testing.assert_close(loss, hard + soft)


def test_rows_without_labels_alone_train_both_models_towards_each_other(tmp_path):
    rows = mixed_rows("single_label", 24, unlabelled=tuple(range(12)))
    weights = {"teacher_hard_weight": 0.0, "student_hard_weight": 0.0}
    trainer = tiny_trainer(tmp_path, train_dataset=rows, logging_steps=1, max_steps=5, **weights)
    trainer.train()
    logs = [each for each in trainer.state.log_history if "student_from_teacher_loss" in each]
    assert not any("teacher_hard_loss" in each for each in logs)
    assert logs[-1]["student_from_teacher_loss"] < logs[0]["student_from_teacher_loss"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_data_without_any_label_are_refused_where_a_model_learns_from_labels(problem, tmp_path):
    rows = mixed_rows(problem, 24, unlabelled=tuple(range(12)))
    with pytest.raises(ValueError, match=r"`train_dataset`: No row has a label .*student.*`student_hard_weight=0`"):
        tiny_trainer(tmp_path, problem, train_dataset=rows, teacher_hard_weight=0.0)


def test_tokens_without_any_label_are_refused(tmp_path):
    rows = rows_of(tiny_batch("token-classification"))
    for row in rows:
        row["labels"] = torch.full_like(row["labels"], -100)
    models = {
        "model": tiny_model("bert", "token-classification", 2),
        "student_model": tiny_model("bert", "token-classification", 1),
    }
    with pytest.raises(ValueError, match="No row has a label"):
        tiny_trainer(tmp_path, **models, train_dataset=rows)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_evaluation_scores_labelled_rows_alone(problem, tmp_path):
    rows = mixed_rows(problem, 20)
    labelled = [row for row, plain in zip(rows, tiny_rows(20, problem), strict=True) if row == plain]
    assert 0 < len(labelled) < 20
    trainer = tiny_trainer(tmp_path, problem, per_device_eval_batch_size=20)
    mixed, alone = trainer.evaluate(rows), trainer.evaluate(labelled)
    for name in ("eval_loss", "eval_student_loss"):
        assert mixed[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_rows_with_neither_label_nor_partner_are_refused(problem, tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset`: Row 0 and 5 more have no label.*soft losses"):
        tiny_trainer(tmp_path, problem, train_dataset=mixed_rows(problem, 12), distillation_mode="standalone")


def test_rows_without_a_label_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level("WARNING", logger="ctcd_trainer")
    tiny_trainer(tmp_path, "regression", train_dataset=mixed_rows("regression", 12), **ALL_ROWS)
    text = "6 of 12 rows of `train_dataset` have no label (nan): only the soft losses use them, which train the "
    assert f"{text}student and the teacher." in caplog.text


def test_it_is_said_whom_rows_without_a_label_train(tmp_path, caplog):
    caplog.set_level("WARNING", logger="ctcd_trainer")
    rows = mixed_rows("single_label", 12)
    options = {"train_dataset": rows, "eval_dataset": rows, "student_from_teacher_weight": 0.0}
    trainer = tiny_trainer(tmp_path, **options, **ALL_ROWS)
    assert (
        "6 of 12 rows of `train_dataset` have no label (-100): only the soft losses use them, which train the teac"
        in (caplog.text)
    )
    assert "6 of 12 rows of `eval_dataset` have no label (-100): only the soft losses use them." in caplog.text
    unlabelled = [row for row in rows if row["labels"] == -100]
    loss = trainer.compute_loss(trainer.pair.train(), collate(unlabelled))
    loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in trainer.student_model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in trainer.teacher_model.parameters())


def test_rows_without_a_label_are_refused_if_all_soft_weights_are_zero(tmp_path):
    weights = {"student_from_teacher_weight": 0.0, "teacher_from_student_weight": 0.0}
    with pytest.raises(ValueError, match=r"Row 0 and 5 more have no label.*no model learns from another"):
        tiny_trainer(tmp_path, train_dataset=mixed_rows("single_label", 12), **weights)


def test_rows_that_train_nothing_are_refused_where_the_teacher_alone_learns_from_labelled_rows(tmp_path):
    with pytest.raises(ValueError, match=r"Row 0 and 5 more have no label.*on labelled rows alone.*'rows': 'all'"):
        tiny_trainer(tmp_path, train_dataset=mixed_rows("single_label", 12), student_from_teacher_weight=0.0)


def test_labels_beyond_zero_and_one_are_refused(tmp_path):
    rows = tiny_rows(4, "multi_label")
    rows[2]["labels"] = [0.0, 1.5, math.nan, 0.0]
    with pytest.raises(ValueError, match="Multi-label row 2 is .*nan.*or NaN where a label is missing"):
        tiny_trainer(tmp_path, "multi_label", train_dataset=rows)


OUTPUTS = 3


def rows_with_missing_targets(problem, count=16):
    """Rows with all, some or no targets; micro-batches of two have very unequal numbers of them."""
    rows = tiny_rows(count)
    make = torch.Generator().manual_seed(5)
    for index, row in enumerate(rows):
        targets = torch.randn(OUTPUTS, generator=make)
        targets = targets if problem == "regression" else targets.gt(0).float()
        missing = torch.rand(OUTPUTS, generator=make) < (0.8 if index % 8 < 3 else 0.3)
        row["labels"] = targets.masked_fill(missing | torch.tensor(index % 5 == 4), math.nan).tolist()
    return rows


def trainer_of_outputs(tmp_path, problem, **options):
    models = {"model": (3, 1), "student_model": (2, 2)}
    models = {name: tiny_bert(*each, problem=problem, num_labels=OUTPUTS) for name, each in models.items()}
    return tiny_trainer(tmp_path, problem, **models, **options)


def naive_hard_loss(problem, logits, labels):
    """The mean over the targets that are there, one by one."""
    losses = []
    for z, y in zip(logits.reshape(-1), labels.reshape(-1), strict=True):
        if not y.isnan():
            bce = -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
            losses.append((z - y) ** 2 if problem == "regression" else bce)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
def test_missing_targets_count_in_no_hard_loss_and_every_output_is_compared(problem, tmp_path):
    rows = rows_with_missing_targets(problem)
    trainer = trainer_of_outputs(tmp_path, problem, train_dataset=rows, **ALL_ROWS)
    batch = collate(rows)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    first, second = (model(**inputs).logits for model in (trainer.teacher_model, trainer.student_model))
    hard = [naive_hard_loss(problem, logits, batch["labels"]) for logits in (first, second)]
    if problem == "regression":
        soft = 2 * F.mse_loss(first, second)
    else:
        p, q = first.sigmoid(), second.sigmoid()
        parts = [(p, q), (1 - p, 1 - q), (q, p), (1 - q, 1 - p)]
        soft = sum((a * (a / b).log()).sum() for a, b in parts) / len(rows)
    losses = trainer.pair(**batch).losses
    torch.testing.assert_close([losses["teacher_hard_loss"], losses["student_hard_loss"]], hard)
    torch.testing.assert_close(losses["student_from_teacher_loss"] + losses["teacher_from_student_loss"], soft)
    complete = {**batch, "labels": batch["labels"].nan_to_num()}
    assert torch.equal(trainer.pair(**complete).losses["teacher_hard_loss"], trainer.teacher_model(**complete).loss)
    assert trainer.evaluate(rows[:5])["eval_loss"] == pytest.approx(
        naive_hard_loss(problem, first[:5], batch["labels"][:5]).item(), rel=1e-5
    )


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
def test_missing_targets_of_accumulated_batches_are_counted_over_all_of_them(problem, tmp_path):
    """Rows that come one by one, as from a stream, are not checked beforehand."""
    rows = rows_with_missing_targets(problem)
    settings = {
        "train_dataset": IterableDataset.from_generator(lambda: iter(rows)),
        "max_steps": 2,
        "logging_steps": 1,
    }
    trainers = [
        trainer_of_outputs(
            tmp_path, problem, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        for size in (8, 1)
    ]
    for trainer in trainers:
        trainer.train()
    assert_same_weights(trainers[1].pair, trainers[0].pair, 2e-6)
    hard = [trainer.state.log_history[0]["teacher_hard_loss"] for trainer in trainers]
    assert hard[1] == pytest.approx(hard[0], rel=1e-5)


def test_missing_labels_of_several_are_left_out_of_the_agreement(tmp_path):
    rows = rows_with_missing_targets("multi_label")
    trainer = trainer_of_outputs(tmp_path, "multi_label", train_dataset=rows)
    batch = collate(rows)
    labels = batch.pop("labels")
    same = trainer.teacher_model(**batch).logits.gt(0) == trainer.student_model(**batch).logits.gt(0)
    assert trainer.evaluate(rows)["eval_agreement"] == pytest.approx(same[~labels.isnan()].float().mean().item())


@pytest.mark.parametrize("counting", [True, False], ids=["counted", "means of micro-batches"])
def test_a_hard_loss_is_logged_as_the_mean_over_the_steps_that_have_a_labelled_row(counting, tmp_path, monkeypatch):
    if not counting:
        step = CoDistillationTrainer.training_step
        monkeypatch.setattr(CoDistillationTrainer, "training_step", lambda self, *args: step(self, *args[:2]))
    rows = mixed_rows("single_label", 24, unlabelled=(0, 1, 4, 5, 6, 7))  # the second of three steps has no label
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    each, all_steps = (tiny_trainer(tmp_path, train_dataset=rows, logging_steps=every, **settings) for every in (1, 3))
    for trainer in (each, all_steps):
        trainer.train()
    logs = each.state.log_history[:3]
    names = ("teacher_hard_loss", "student_hard_loss")
    assert [[name in log for name in names] for log in logs] == [[True, True], [False, False], [True, True]]
    for name in names:
        expected = (logs[0][name] + logs[2][name]) / 2
        assert all_steps.state.log_history[0][name] == pytest.approx(expected, rel=1e-6)
    soft = [log["student_from_teacher_loss"] for log in logs]
    assert all_steps.state.log_history[0]["student_from_teacher_loss"] == pytest.approx(sum(soft) / 3, rel=1e-6)


def test_a_hard_loss_is_logged_as_the_mean_over_the_processes_that_have_a_labelled_row():
    """Where each process divides by its own number of items (`average_tokens_across_devices=False`)."""
    meters = LossMeter(), LossMeter()
    for step, (first, second) in enumerate([((2, 4), (0, 4)), ((0, 4), (0, 4)), ((1, 4), (3, 4))], 1):
        for meter, items, value in zip(meters, (first, second), (1.0, 5.0), strict=True):
            losses = {"teacher_hard_loss": torch.tensor(value * step * (items[0] > 0)), "soft": torch.tensor(value)}
            meter.add(losses, step, labelled=torch.tensor(items[0]))
    gathered = []
    meters[1].drain(lambda tensor: gathered.append(tensor) or tensor)
    expected = {"teacher_hard_loss": (1.0 * 1 + 1.0 * 3 + 5.0 * 3) / 3, "soft": 3.0}
    assert meters[0].drain(lambda tensor: torch.cat([tensor, *gathered])) == pytest.approx(expected)
    assert meters[1].drain(lambda tensor: tensor) == {}
