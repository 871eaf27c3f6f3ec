"""The student's own best step is kept, and a resumed training goes on with what was the best before."""

import json
import os
import shutil

import pytest
from tiny import assert_same_weights, tiny_rows, tiny_trainer, weights_of
from transformers import AutoModelForSequenceClassification, TrainerCallback

from ctcd_trainer import CoDistillationTrainer


class Stop(TrainerCallback):
    """Ends a training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trainer_with(folder, values, monkeypatch, students=None, **options) -> CoDistillationTrainer:
    """A trainer whose student has these accuracies at the steps 1, 2, ...; its weights are added to `students`."""
    trainer = tiny_trainer(
        folder,
        **{
            "max_steps": len(values),
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_dataset": tiny_rows(),
            "student_metric_for_best_model": "accuracy",
            **options,
        },
    )
    evaluate = trainer.evaluate

    def scored(*args, **kwargs):
        if students is not None:
            students.append(weights_of(trainer.student_model))
        return evaluate(*args, **kwargs) | {"eval_student_accuracy": values[trainer.state.global_step - 1]}

    monkeypatch.setattr(trainer, "evaluate", scored)
    return trainer


def kept(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder / "best-student")


@pytest.mark.parametrize(("greater", "best"), [(None, 2), (True, 2), (False, 3)])
def test_the_best_student_is_kept(greater, best, tmp_path, monkeypatch):
    students = []
    trainer = trainer_with(
        tmp_path, [0.4, 0.8, 0.1, 0.8], monkeypatch, students, student_greater_is_better=greater, save_total_limit=1
    )
    trainer.train()
    assert_same_weights(kept(tmp_path), students[best - 1])
    assert sorted(os.listdir(tmp_path)) == ["best-student", "checkpoint-4"]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_training_compares_with_the_best_one_before(restore, tmp_path, monkeypatch):
    values, students = [0.2, 0.9, 0.5, 0.7], []
    trainer = trainer_with(tmp_path, values, monkeypatch, students, callbacks=[Stop(2)])
    trainer.train()
    resumed = trainer_with(tmp_path, values, monkeypatch, students, restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_weights(kept(tmp_path), students[1])
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["BestStudent"]["attributes"] == {"value": 0.9, "step": 2}


def test_a_new_training_begins_with_no_best_one(tmp_path, monkeypatch):
    students = []
    trainer = trainer_with(tmp_path, [0.9, 0.5], monkeypatch)
    trainer.train()
    trainer_with(tmp_path, [0.1, 0.05], monkeypatch, students).train()
    assert_same_weights(kept(tmp_path), students[0])


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    students = []
    trainer_with(tmp_path, [float("nan"), 0.5, float("nan")], monkeypatch, students).train()
    assert_same_weights(kept(tmp_path), students[1])


def test_a_best_student_that_is_not_on_this_machine_is_not_waited_for(tmp_path, monkeypatch):
    students = []
    trainer_with(tmp_path / "one", [0.9, 0.8, 0.2, 0.1], monkeypatch, callbacks=[Stop(2)]).train()
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    resumed = trainer_with(tmp_path / "two", [0.9, 0.8, 0.2, 0.1], monkeypatch, students)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(kept(tmp_path / "two"), students[0])


def test_the_metric_may_be_of_one_of_several_evaluation_sets(tmp_path):
    students = []

    class Remember(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            students.append((metrics.get("eval_second_student_loss"), weights_of(trainer.student_model)))

    trainer = tiny_trainer(
        tmp_path,
        eval_dataset={"first": tiny_rows(seed=1), "second": tiny_rows(seed=2)},
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=5,
        student_metric_for_best_model="second_student_loss",
        callbacks=[Remember()],
    )
    trainer.train()
    best = min((each for each in students if each[0] is not None), key=lambda each: each[0])
    assert_same_weights(kept(tmp_path), best[1])


def test_values_of_another_metric_do_not_count_after_resuming(tmp_path, monkeypatch):
    students = []
    trainer_with(tmp_path, [0.9, 0.9, 0.9], monkeypatch, callbacks=[Stop(2)]).train()
    resumed = trainer_with(tmp_path, [0.1] * 3, monkeypatch, students, student_greater_is_better=False)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(kept(tmp_path), students[0])


def test_a_metric_that_is_not_there_is_named_with_those_that_are(tmp_path, monkeypatch):
    trainer = trainer_with(tmp_path, [0.9], monkeypatch, student_metric_for_best_model="student_f1")
    with pytest.raises(KeyError, match=r"student_f1.*eval_student_f1.*eval_student_loss"):
        trainer.train()


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"student_metric_for_best_model='loss'.*eval_strategy='no'"):
        tiny_trainer(tmp_path, student_metric_for_best_model="loss")
    with pytest.raises(ValueError, match=r"student_greater_is_better=True.*student_metric_for_best_model"):
        tiny_trainer(tmp_path, student_greater_is_better=True)
