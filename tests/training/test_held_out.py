"""`auto` weights and burn-ins: what held-out rows say about a source, and what a checkpoint keeps of it."""

import copy
import json

import numpy as np
import pytest
import torch
from scipy.special import softmax
from tiny import OnTheFly, assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import rows_of, tiny_batch, tiny_model
from transformers import TrainerState, default_data_collator

from ctcd_trainer.arguments import DistillationArguments
from ctcd_trainer.graph import Edge, Graph
from ctcd_trainer.losses.reliability import trusted_weight
from ctcd_trainer.training.held_out import HeldOutErrors, HeldOutWeights

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "per_device_eval_batch_size": 25}
AUTO = {"teacher_from_student_weight": "auto", **EVALUATED}


def logs_of(trainer, name="held_out_chance_error"):
    return [log for log in trainer.state.log_history if name in log]


@torch.no_grad()
def shifted(model, factor):
    """A copy of a model whose logits are multiplied."""
    model = copy.deepcopy(model)
    model.classifier.weight.mul_(factor)
    model.classifier.bias.mul_(factor)
    return model


@torch.no_grad()
def labelled_by(model, problem, count=40):
    """Rows with the labels that a model predicts, every fifth of them another one. The model gets sure of itself."""
    rows = tiny_rows(count, problem)
    logits = model.eval()(**{k: v for k, v in collate(rows).items() if k != "labels"}).logits
    if problem != "regression":
        model.classifier.bias.sub_(logits.mean(0))
        logits = 4 * (logits - logits.mean(0))
        model.load_state_dict(shifted(model, 4.0).state_dict())
    noise = torch.Generator().manual_seed(4)
    for index, (row, z) in enumerate(zip(rows, logits, strict=True)):
        if problem == "regression":
            row["labels"] = z.item() + 0.3 * torch.randn((), generator=noise).item()
        elif problem == "single_label":
            row["labels"] = int(z.argmax() + (index % 5 == 0)) % len(z)
        else:
            row["labels"] = [float(value) for value in (z > 0) ^ (torch.arange(len(z)) == index % 20)]
    return rows


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("source", ["uniform", "confident and random", "copy of the best"])
def test_auto_is_zero_for_a_random_source_and_the_hard_weight_for_a_copy_of_the_best(problem, source, tmp_path):
    teacher = tiny_bert(3, seed=1, problem=problem)
    rows = labelled_by(teacher, problem)
    others = {
        "uniform": shifted(tiny_bert(2, seed=5, problem=problem), 0.0),
        "confident and random": shifted(tiny_bert(2, seed=5, problem=problem), 5.0),
        "copy of the best": copy.deepcopy(teacher),
    }
    options = {"model": teacher, "student_model": others[source], "teacher_hard_weight": 0.8, "max_steps": 1}
    trainer = tiny_trainer(tmp_path, problem, eval_dataset=rows, train_dataset=rows, **options, **AUTO)
    before = copy.deepcopy(trainer.teacher_model)
    trainer.train()
    log = logs_of(trainer)[0]
    if source == "copy of the best":
        assert log["teacher_from_student_weight"] == 0.8
        assert log["held_out_teacher_error"] == log["held_out_student_error"] < log["held_out_chance_error"]
    else:
        assert log["teacher_from_student_weight"] == 0.0
        assert log["held_out_teacher_error"] < log["held_out_chance_error"] <= log["held_out_student_error"] + 1e-6
    assert not torch.equal(before.classifier.weight, trainer.teacher_model.classifier.weight)


def test_auto_of_language_models(tmp_path):
    """Of masked tokens; the frozen third model runs in the evaluation because of it."""
    teacher = tiny_model("bert", "masked-lm", 2, seed=1)
    batch = tiny_batch("masked-lm", 24)
    with torch.no_grad():
        for parameter in teacher.get_output_embeddings().parameters():
            parameter.mul_(10)
        predicted = teacher.eval()(**batch).logits.argmax(-1)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, predicted)
    models = {
        "model": teacher,
        "student_model": tiny_model("distilbert", "masked-lm", 2, seed=2),
        "pretrained_teacher": copy.deepcopy(teacher),
    }
    options = {"train_dataset": rows_of(batch), "eval_dataset": rows_of(batch), "max_steps": 1}
    options |= {"teacher_from_pretrained_weight": "auto", "data_collator": default_data_collator}
    trainer = tiny_trainer(tmp_path, **models, **options, **AUTO, distillation_mode="community")
    trainer.train()
    log = logs_of(trainer)[0]
    labels = batch["labels"][batch["labels"] != -100].numpy()
    before = {"teacher": models["pretrained_teacher"], "student": tiny_model("distilbert", "masked-lm", 2, seed=2)}
    errors = {}
    for name, model in before.items():
        known = {k: v for k, v in batch.items() if name == "teacher" or k != "token_type_ids"}
        with torch.no_grad():
            probs = softmax(model.eval()(**known).logits[batch["labels"] != -100].double().numpy(), -1)
        errors[name] = ((probs - np.eye(probs.shape[1])[labels]) ** 2).sum(1).mean()
    frequencies = np.bincount(labels) / len(labels)
    chance = 1 - (frequencies**2).sum()
    for name, value in {**errors, "pretrained": errors["teacher"], "chance": chance}.items():
        assert log[f"held_out_{name}_error"] == pytest.approx(value, rel=1e-5)
    assert log["teacher_from_pretrained_weight"] == 1.0
    assert log["teacher_from_student_weight"] == 0.0
    assert errors["teacher"] < chance < errors["student"]


def test_errors_are_means_over_all_labelled_rows_of_all_evaluation_sets(tmp_path):
    teacher = tiny_bert(3, seed=1)
    rows = labelled_by(teacher, "single_label", 33)
    for index in (2, 7, 8, 20):
        rows[index]["labels"] = -100
    student = shifted(teacher, 0.3)
    options = {"eval_dataset": {"one": rows[:13], "two": rows[13:]}, "max_steps": 4, **AUTO}
    trainer = tiny_trainer(tmp_path, model=teacher, student_model=student, **options)
    models = copy.deepcopy(dict(trainer.pair.learners))
    trainer.train()
    logs = logs_of(trainer)
    assert [log["step"] for log in logs] == [0, 2, 4]
    batch = collate(rows)
    labels = batch.pop("labels").numpy()
    there = labels != -100
    with torch.no_grad():
        probs = {name: softmax(m.eval()(**batch).logits.double().numpy(), -1)[there] for name, m in models.items()}
    onehot = np.eye(3)[labels[there]]
    errors = {name: p - onehot for name, p in probs.items()}
    means = {name: (error**2).sum(1).mean() for name, error in errors.items()}
    product = (errors["teacher"] * errors["student"]).sum(1).mean()
    chance = ((onehot - onehot.mean(0)) ** 2).sum(1).mean()
    for name, value in {"teacher_error": means["teacher"], "student_error": means["student"]}.items():
        assert logs[0][f"held_out_{name}"] == pytest.approx(value, rel=1e-5)
    assert logs[0]["held_out_chance_error"] == pytest.approx(chance)
    assert logs[0]["held_out_label_noise"] == pytest.approx(min(*means.values(), product), rel=1e-5)
    expected = trusted_weight(means["student"], means["teacher"], product, chance)
    assert 0 < expected < 1
    assert logs[0]["teacher_from_student_weight"] == pytest.approx(expected, rel=1e-4)
    before = dict(trainer.pair.objective.held_out.weights)
    trainer.evaluate(rows[:5])
    assert trainer.pair.objective.held_out.weights == before, "an evaluation outside of the training changes nothing"


def test_a_burn_in_ends_once_and_for_all(monkeypatch):
    weights, graph = HeldOutWeights(), DistillationArguments(teacher_from_student_schedule="burn-in:0.1").graph
    opened = []
    for step, error in enumerate((0.6, 0.545, 0.539, 0.9)):
        means = {("teacher", "teacher"): 0.3, ("teacher", "student"): 0.3, ("student", "student"): error}, 0.6
        monkeypatch.setattr(HeldOutErrors, "means", lambda self, means=means: means)
        assert weights.renew(HeldOutErrors(), graph, step).keys() == {
            *("held_out_teacher_error", "held_out_student_error", "held_out_chance_error", "held_out_label_noise")
        }
        opened.append(set(weights.opened))
    assert opened == [set(), set(), {"teacher_from_student"}, {"teacher_from_student"}]


def test_a_training_listens_after_the_burn_in(tmp_path):
    teacher = tiny_bert(3, seed=1)
    rows = labelled_by(teacher, "single_label")
    options = {"max_steps": 3, "logging_steps": 1, "eval_dataset": rows, **EVALUATED, "eval_on_start": False}
    options |= {"teacher_from_student_schedule": "burn-in:0.1", "learning_rate": 1e-4, "train_dataset": rows}
    trainer = tiny_trainer(tmp_path, model=teacher, student_model=copy.deepcopy(teacher), **options)
    trainer.train()
    assert [log["teacher_from_student_weight"] for log in trainer.state.log_history if "loss" in log] == [0, 0, 1]


def test_a_resumed_training_has_the_weights_of_its_checkpoint(tmp_path):
    """The checkpoint lies between two evaluations, and the resumed training evaluates at its start."""
    teacher = tiny_bert(3, seed=1)
    rows = labelled_by(teacher, "single_label")
    options = {"train_dataset": rows, "eval_dataset": rows, "max_steps": 4, "logging_steps": 1, **AUTO}
    options |= {
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-3,
        "student_from_teacher_schedule": "burn-in:0.2",
    }

    def make(**more):
        models = {"model": copy.deepcopy(teacher), "student_model": shifted(teacher, 0.3)}
        return tiny_trainer(tmp_path, **models, **options, **more)

    whole = make()
    whole.train()
    resumed = []
    for restore in (False, True):
        resumed.append(make(restore_callback_states_from_checkpoint=restore))
        resumed[-1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert_same_weights(resumed[-1].pair, whole.pair)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["HeldOutWeights"]["args"]
    logs = {log["step"]: log["teacher_from_student_weight"] for log in logs_of(whole)}
    assert kept == {"weights": {"teacher_from_student": logs[2]}, "opened": ["student_from_teacher"]}
    assert 0 < logs[2] != logs[0]
    weights = [log["teacher_from_student_weight"] for log in whole.state.log_history if "loss" in log]
    assert weights == [logs[0], logs[0], logs[2], logs[2]]
    callback = HeldOutWeights.among(whole.callback_handler.callbacks)
    callback.on_train_begin(whole.args, TrainerState(stateful_callbacks=[callback]), whole.control)
    assert (callback.weights, callback.opened) == ({}, set()), "a new training begins anew"


def test_where_nothing_is_held_out_auto_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_from_student_weight='auto'` follows .*`eval_strategy='no'`. Set"):
        tiny_trainer(tmp_path, teacher_from_student_weight="auto")
    with pytest.raises(ValueError, match="`student_from_teacher_schedule='burn-in:0.1'` follows"):
        tiny_trainer(tmp_path, edges={"teacher->student": {"schedule": "burn-in:0.1"}})
    rows = [{**row, "labels": -100} for row in tiny_rows(6)]
    with pytest.raises(ValueError, match=r"No row of `eval_dataset` has a label.*\['teacher_from_student_weight'\]"):
        tiny_trainer(tmp_path, eval_dataset=rows, **AUTO)
    trainer = tiny_trainer(tmp_path, eval_dataset=OnTheFly(rows), **AUTO)
    with pytest.raises(ValueError, match=r"evaluation data have no labels.*\['teacher_from_student_weight'\]"):
        trainer.train()


def test_the_weight_of_several_labels_counts_that_the_soft_loss_is_their_sum():
    """The hard loss is the mean over 4 labels: beside it, a soft loss of weight w weighs 4 w."""
    errors = HeldOutErrors()
    errors.labels_of_item = 4
    errors.means = lambda: ({("teacher", "teacher"): 0.1, ("student", "student"): 0.3}, 0.5)
    graph = Graph({"teacher": 1.0, "student": 1.0}, (Edge("student", "teacher", 1.0, auto=True),))
    found = HeldOutWeights()
    found.renew(errors, graph, step=1)
    noise, bias, skill = 0.1, 0.3 - 0.1, (0.5 - 0.3) / (0.5 - 0.1)
    assert found.weights == {"teacher_from_student": pytest.approx(noise / bias / 4 * skill)}
