"""A student that is made from the teacher, and the warm start: the teacher is trained before."""

import json
import os
from dataclasses import replace
from pathlib import Path
from shutil import ignore_patterns

import pytest
import torch
from tiny import (
    assert_same_weights,
    changed,
    collate,
    tiny_args,
    tiny_bert,
    tiny_rows,
    tiny_trainer,
    weights_of,
)
from transformers import BertForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from ctcd_trainer import CoDistillationTrainer, create_student, make_pair
from ctcd_trainer.hub.upload_queue import NOT_MODELS
from ctcd_trainer.training.warm_start import WarmStart

WARM, STEPS = 5, 4
SETTINGS = {
    "max_steps": STEPS,
    "train_sampling_strategy": "random",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 1e-2,
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny_rows(6, seed=1)}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny_rows())


def cut(teacher):
    return create_student(teacher, num_hidden_layers=2)


def teacher_of(**config):
    return tiny_bert(3, seed=1, dropout=0.1, **config)


def warm_trainer(folder, **options):
    settings = SETTINGS | {"model": teacher_of(), "student_model": cut, "warm_start_steps": WARM} | options
    return tiny_trainer(folder, **settings)


def logs_of(state):
    """The logs without what one call of `train` measures."""
    timed = ("runtime", "per_second", "train_loss")
    return [{key: value for key, value in log.items() if not key.endswith(timed)} for log in state.log_history]


def assert_same_end(trainer, expected):
    assert_same_weights(trainer.teacher_model, expected.teacher_model)
    assert_same_weights(trainer.student_model, expected.student_model)
    assert logs_of(trainer.state) == logs_of(expected.state)


class Stopped(Exception):
    pass


class StopAt(TrainerCallback):
    """Stops the training after a step of a phase, before its checkpoint is written; after step 0 before the first."""

    def __init__(self, warm, step):
        self.warm, self.step = warm, step

    def on_step_end(self, args, state, control, **kwargs):
        if (Path(args.output_dir).name == "warm-start") == self.warm and state.global_step == self.step:
            raise Stopped

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)


class Recorded(TrainerCallback):
    """Writes down the steps that are made."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_a_function_makes_the_student_from_the_teacher(tmp_path):
    teacher = tiny_bert(3, seed=1)
    for pair in (
        tiny_trainer(tmp_path, model=teacher, student_model=cut).pair,
        tiny_trainer(tmp_path, model_init=lambda: teacher, student_model=cut).pair,
        make_pair(teacher, cut),
    ):
        assert_same_weights(pair.student, cut(teacher))
        assert pair.student.cut_layers == [0, 2]


def test_a_function_that_makes_no_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`student_model` has returned None, which is no model"):
        tiny_trainer(tmp_path, student_model=lambda teacher: None)
    with pytest.raises(ValueError, match="`model` and `student_model` are the same object"):
        tiny_trainer(tmp_path, student_model=lambda teacher: teacher)
    for function in (lambda: tiny_bert(2), lambda one, two: tiny_bert(2), lambda *, teacher: tiny_bert(2)):
        with pytest.raises(ValueError, match=r"is the function <lambda>.* takes the teacher and needs nothing else"):
            tiny_trainer(tmp_path, student_model=function)


# ---- The warm start ----


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("ctcd", {"bf16": True, "gradient_accumulation_steps": 2}),
        ("kd", {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 1.0}),
        ("reversed", {}),
    ],
)
def test_a_warm_start_gives_what_two_trainings_give(mode, more, tmp_path):
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "eval_steps": 1,
        "save_steps": 1,
    }
    settings = SETTINGS | EVALUATED | best | more
    rows = settings.pop("eval_dataset")
    first = Trainer(
        teacher_of(),
        tiny_args(tmp_path / "first", **settings | {"max_steps": WARM, "learning_rate": 2e-2}),
        data_collator=collate,
        train_dataset=tiny_rows(),
        eval_dataset=rows,
        callbacks=[EarlyStoppingCallback(2)],
    )
    first.train()
    first.save_model(tmp_path / "teacher")
    teacher = BertForSequenceClassification.from_pretrained(tmp_path / "teacher")
    options = {"eval_dataset": rows, "distillation_mode": mode, **settings}
    expected = tiny_trainer(
        tmp_path / "second", model=teacher, student_model=cut(teacher), callbacks=[EarlyStoppingCallback(2)], **options
    )
    expected.train()

    options |= {"callbacks": [EarlyStoppingCallback(2)], "warm_start_learning_rate": 2e-2}
    trainer = warm_trainer(tmp_path / "out", **options)
    args = dict(vars(trainer.args))
    output = trainer.train()
    assert vars(trainer.args) == args
    assert_same_end(trainer, expected)
    saved = json.loads((tmp_path / "out/warm-start/teacher/trainer_state.json").read_text())
    assert saved["global_step"] == first.state.global_step
    assert logs_of(trainer.state.load_from_json(tmp_path / "out/warm-start/teacher/trainer_state.json")) == logs_of(
        first.state
    )
    trained = BertForSequenceClassification.from_pretrained(tmp_path / "out/warm-start/teacher")
    assert_same_weights(trained, teacher if mode == "kd" else first.model)
    costs = {key: value for key, value in output.metrics.items() if key.startswith("warm_start")}
    assert costs.pop("warm_start_runtime") > 0
    assert costs == {"warm_start_steps": first.state.global_step, "warm_start_flos": first.state.total_flos}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training with a warm start that nothing has stopped, and its metrics."""
    trainer = warm_trainer(tmp_path_factory.mktemp("whole"))
    return trainer, trainer.train().metrics


@pytest.mark.parametrize(
    ("warm", "step", "same_trainer"),
    [(True, 3, False), (True, 3, True), (True, WARM, False), (False, 0, True), (False, 0, False), (False, 3, False)],
)
def test_a_training_that_was_stopped_in_any_phase_goes_on_bit_for_bit(warm, step, same_trainer, whole, tmp_path):
    stop = StopAt(warm, step)
    trainer = warm_trainer(tmp_path, callbacks=[stop])
    with pytest.raises(Stopped):
        trainer.train()
    assert (tmp_path / "warm-start/teacher").is_dir() is not warm
    assert ignore_patterns(*NOT_MODELS)("", os.listdir(tmp_path)) == {*os.listdir(tmp_path)}  # for the Hub
    if same_trainer:
        trainer.remove_callback(stop)
    else:
        trainer = warm_trainer(tmp_path)
    steps = []
    trainer.add_callback(Recorded(steps))
    metrics = trainer.train(resume_from_checkpoint=True).metrics
    first = step // 2 * 2 + 1  # after the last checkpoint
    assert steps == [*range(first, (WARM if warm else STEPS) + 1), *(range(1, STEPS + 1) if warm else ())]
    assert_same_end(trainer, whole[0])
    costs = ("warm_start_steps", "warm_start_flos")
    assert [metrics[name] for name in costs] == [whole[1][name] for name in costs]


def test_any_point_of_a_training_can_be_named(whole, tmp_path):
    folder = Path(whole[0].args.output_dir)
    for point in ("warm-start/checkpoint-2", "warm-start/teacher", "warm-start", "checkpoint-2"):
        trainer = warm_trainer(tmp_path / point, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(folder / point))
        assert_same_end(trainer, whole[0])
        assert not (tmp_path / point / "warm-start").exists()


def test_an_earlier_warm_start_is_not_used_unless_that_is_asked_for(tmp_path, caplog):
    old = tmp_path / "warm-start"
    trainer = warm_trainer(tmp_path, callbacks=[StopAt(False, 0)], learning_rate=0.1)
    with pytest.raises(Stopped):
        trainer.train()
    before = (old / "teacher/model.safetensors").read_bytes()
    trainer = warm_trainer(tmp_path, callbacks=[StopAt(True, 3)])
    with pytest.raises(Stopped):
        trainer.train()
    assert f"{old} holds an earlier warm start, which this training does not use. It was moved" in caplog.text
    assert (tmp_path / "warm-start.old/teacher/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in old.iterdir()) == ["checkpoint-2"]


def test_checkpoints_of_two_trainings_are_not_confused(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = warm_trainer(tmp_path, callbacks=[StopAt(True, 3)])
    with pytest.raises(Stopped):
        trainer.train()
    with pytest.raises(ValueError, match=r"may mean '.*checkpoint-5' or the warm start in .* Give the path of one"):
        trainer.train(resume_from_checkpoint=True)
    trainer = warm_trainer(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"there is no checkpoint in '.*empty' or '.*warm-start'"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.pair is trainer.model


def test_a_second_call_trains_on(tmp_path):
    trainer = warm_trainer(tmp_path, save_strategy="no")
    trainer.train()
    assert not (tmp_path / "warm-start").exists()
    student, steps = trainer.student_model, []
    trainer.add_callback(Recorded(steps))
    trainer.train()
    assert trainer.student_model is student
    assert steps == [1, 2, 3, 4]


def test_the_metric_of_a_pair_has_a_stand_in_while_the_teacher_is_alone(tmp_path):
    chosen = {"load_best_model_at_end": True, "callbacks": [EarlyStoppingCallback(1)], **EVALUATED}
    for metric, expected in (
        ("eval_student_loss", "eval_loss"),
        ("agreement", "loss"),
        ("dev_perplexity", "dev_loss"),
    ):
        trainer = warm_trainer(tmp_path / metric, metric_for_best_model=metric, **chosen)
        alone = WarmStart(trainer.args).arguments
        assert (alone.metric_for_best_model, alone.greater_is_better) == (expected, False)
        assert trainer.args.metric_for_best_model == metric
    trainer = warm_trainer(
        tmp_path, metric_for_best_model="student_loss", student_metric_for_best_model="loss", **chosen
    )
    trainer.train()
    assert (tmp_path / "best-student/model.safetensors").is_file()


def test_a_teacher_without_a_trained_head_can_be_frozen_after_its_warm_start(tmp_path):
    body = teacher_of().bert
    body.save_pretrained(tmp_path / "body")
    body.config.architectures = ["BertForSequenceClassification"]
    body.config.save_pretrained(tmp_path / "body")
    teacher = str(tmp_path / "body")
    with pytest.raises(ValueError, match="newly initialized"):
        tiny_trainer(tmp_path / "out", model=teacher, student_model=cut, distillation_mode="kd")
    for model in (teacher, BertForSequenceClassification.from_pretrained(teacher, num_labels=3)):
        trainer = warm_trainer(tmp_path / "out", model=model, distillation_mode="kd", save_strategy="no")
        before = weights_of(trainer.teacher_model)
        trainer.train()
        assert changed(trainer.teacher_model, before) == before.keys()
        assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"student_model": tiny_bert(2)}, r"`student_model` is a BertForSequenceClassification. Pass a function"),
        ({"student_model": "name"}, r"`student_model` is a str. Pass a function: `student_model=lambda teacher:"),
        ({"student_model": None, "distillation_mode": "standalone"}, "`student_model` is None. Pass a function"),
        ({"model_init": lambda: tiny_bert(3)}, r"`model_init` would repeat it .* give its folder to `model_init`"),
        (
            {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)},
            r"`optimizers` holds .* `optimizer_cls_and_kwargs`",
        ),
        ({"student_processing_class": object()}, "`student_processing_class` is for a student with another tokenizer"),
        ({"train_dataset": Stream()}, "`train_dataset` has no length.* `warm_start_steps`"),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused(options, problem, tmp_path):
    with pytest.raises(ValueError, match=f"`warm_start_epochs=2.0`, a warm start: .*{problem}"):
        tiny_trainer(tmp_path, **{"student_model": cut, "warm_start_epochs": 2} | options)


def test_a_warm_start_needs_a_trainer_and_whole_models(tmp_path, monkeypatch):
    args = tiny_args(tmp_path, warm_start_steps=2)
    with pytest.raises(ValueError, match=r"`warm_start_steps=2` is for the trainer.* your own loop"):
        make_pair(teacher_of(), cut, args)
    args.warm_start_steps = 0
    trainer = tiny_trainer(tmp_path)
    trainer.args.warm_start_steps = 2
    with pytest.raises(ValueError, match="after the trainer was made. Make a new trainer"):
        trainer.train()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="a warm start: FSDP and DeepSpeed divide the teacher .* as `model`"):
        tiny_trainer(tmp_path, student_model=cut, warm_start_steps=2)


def test_the_arguments_of_a_warm_start_are_checked(tmp_path):
    args = tiny_args(tmp_path)
    assert (args.warm_start_epochs, args.warm_start_steps, args.warm_start) == (0.0, 0, False)
    assert not replace(args, seed=1).warm_start
    for values in ({"warm_start_epochs": -1}, {"warm_start_steps": 1.5}, {"warm_start_steps": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(values))}=.*` is not valid"):
            tiny_args(tmp_path, **values)
    with pytest.raises(ValueError, match="`warm_start_learning_rate=0.1` has no effect"):
        tiny_args(tmp_path, warm_start_learning_rate=0.1)
    alone = WarmStart(tiny_args(tmp_path, warm_start_epochs=1.5, hub_token="secret")).arguments
    assert (alone.num_train_epochs, alone.max_steps, alone.hub_token) == (1.5, -1, None)


def test_a_student_with_adapters_goes_on_on_the_base_that_was_cut_from_the_trained_teacher(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(teacher):
        return peft.get_peft_model(cut(teacher), peft.LoraConfig(r=2, target_modules=["query"]))

    options = {"student_model": adapted, "save_strategy": "no"}
    expected = warm_trainer(tmp_path / "whole", **options)
    expected.train()
    trainer = warm_trainer(tmp_path, **options | {"save_strategy": "steps", "callbacks": [StopAt(False, 3)]})
    with pytest.raises(Stopped):
        trainer.train()
    trainer = warm_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(trainer.student_model, expected.student_model)
    (tmp_path / "warm-start").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="from which the base of the student's adapter was cut, and there is no"):
        warm_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- The student's rate, and recipes ----


def rates_of(trainer):
    trainer.create_optimizer_and_scheduler(4)
    return {group["learner"]: group["initial_lr"] for group in trainer.optimizer.param_groups}


def test_the_rate_of_a_cut_student_follows_from_its_layers(tmp_path, caplog):
    trainer = warm_trainer(tmp_path)
    args = dict(vars(trainer.args))
    assert rates_of(trainer) == {"teacher": 1e-2, "student": pytest.approx(2.25e-2)}
    assert (
        "`student_learning_rate=0.0225`, 2.25 times `learning_rate`: the student has 2 layers of the t" in caplog.text
    )
    assert vars(trainer.args) == args
    trainer = warm_trainer(tmp_path, max_steps=1, save_strategy="no", warm_start_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["student_learning_rate"] == pytest.approx(2.25e-2)
    one = create_student(teacher_of(num_hidden_layers=8), 1)
    assert (
        rates_of(tiny_trainer(tmp_path, model=teacher_of(num_hidden_layers=8), student_model=one))["student"] == 4e-2
    )
    for options in (
        {"student_learning_rate": 1e-2},
        {"student_model": tiny_bert(2), "warm_start_steps": 0},
        {"recipe": "paper", "warm_start_steps": 0},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2})},
    ):
        assert rates_of(warm_trainer(tmp_path, **options)) == {"teacher": 1e-2, "student": 1e-2}


def test_a_batch_size_is_found_in_each_phase(tmp_path):
    class Small(CoDistillationTrainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["labels"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    args = tiny_args(tmp_path, auto_find_batch_size=True, warm_start_steps=2, max_steps=3)
    trainer = Small(teacher_of(), args, collate, tiny_rows(), student_model=cut)
    assert trainer.train().metrics["warm_start_steps"] == 2
    assert (trainer._train_batch_size, trainer.state.global_step) == (2, 3)


def test_layers_are_shared_with_the_trained_teacher(tmp_path):
    options = {"share": "layers:1", "student_model": lambda teacher: create_student(teacher, 2, layers="first")}
    trainer = warm_trainer(tmp_path, save_strategy="no", max_steps=1, warm_start_steps=1, **options)
    trainer.train()
    models = trainer.teacher_model.bert, trainer.student_model.bert
    assert models[0].embeddings is models[1].embeddings
    assert models[0].encoder.layer[0] is models[1].encoder.layer[0]
