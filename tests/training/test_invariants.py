"""What must not change the result: how a batch is cut, whether the other model is there, whether a run was resumed."""

import pytest
import torch
from datasets import IterableDataset
from tiny import (
    PROBLEMS,
    assert_same_weights,
    collate,
    tiny_args,
    tiny_bert,
    tiny_rows,
    tiny_trainer,
    train_alone,
    weights_of,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.edges import find_schedule


def assert_same_pair(first, second, tolerance=0.0):
    assert_same_weights(first.teacher_model, second.teacher_model, tolerance)
    assert_same_weights(first.student_model, second.student_model, tolerance)


@pytest.mark.parametrize("problem", list(PROBLEMS))
@pytest.mark.parametrize("rows", [32, 27], ids=["whole batches", "a smaller last accumulation"])
def test_accumulating_eight_micro_batches_of_one_equals_one_batch_of_eight(problem, rows, tmp_path):
    data = tiny_rows(rows, problem, ragged=True)
    settings = {
        "train_dataset": data,
        "max_steps": -1,
        "num_train_epochs": 2,
        "temperature": 2.0,
        "learning_rate": 1e-3,
    }
    whole = tiny_trainer(tmp_path, problem, per_device_train_batch_size=8, **settings)
    parts = tiny_trainer(tmp_path, problem, per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    whole.train()
    parts.train()
    assert whole.state.global_step == parts.state.global_step == 8
    assert_same_pair(whole, parts, tolerance=1e-6)


def test_accumulation_of_unequal_micro_batches_equals_one_batch(tmp_path):
    """Batches of 3 over 8 rows: micro-batches of 3, 3 and 2 rows count by their rows."""
    settings = {
        "train_dataset": tiny_rows(8, ragged=True),
        "max_steps": -1,
        "num_train_epochs": 4,
        "learning_rate": 1e-3,
    }
    whole = tiny_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    parts = tiny_trainer(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3, **settings)
    whole.train()
    parts.train()
    assert_same_pair(whole, parts, tolerance=1e-6)


@pytest.mark.parametrize("problem", list(PROBLEMS))
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing_factor": 0.1, "weight_decay": 0.1}, {"max_grad_norm": 0.01}], ids=str
)
def test_with_soft_weights_of_zero_each_model_is_what_trainer_makes_of_it_alone(problem, options, tmp_path):
    if problem != "single_label" and "label_smoothing_factor" in options:
        options = {"weight_decay": 0.1}  # Trainer has no label smoothing for the others
    rows = tiny_rows(24, problem, ragged=True)
    options = {"train_dataset": rows, "train_sampling_strategy": "random", "max_steps": 8, **options}
    pair = tiny_trainer(tmp_path, problem, student_from_teacher_weight=0.0, teacher_from_student_weight=0.0, **options)
    pair.train()
    teacher = train_alone(tiny_bert(3, 1, problem), tmp_path, **options)
    student = train_alone(tiny_bert(2, 2, problem), tmp_path, **options)
    assert_same_weights(pair.teacher_model, teacher)
    assert_same_weights(pair.student_model, student)


def test_per_model_arguments_equal_training_alone_with_them(tmp_path):
    own = {"learning_rate": 3e-3, "weight_decay": 0.3, "max_grad_norm": 0.05}
    pair = tiny_trainer(
        tmp_path, distillation_mode="standalone", **{f"student_{name}": value for name, value in own.items()}
    )
    pair.train()
    assert_same_weights(pair.teacher_model, train_alone(tiny_bert(3, 1), tmp_path))
    assert_same_weights(pair.student_model, train_alone(tiny_bert(2, 2), tmp_path, **own))


def test_clipping_the_student_alone_leaves_the_teacher_unclipped(tmp_path):
    pair = tiny_trainer(tmp_path, distillation_mode="standalone", max_grad_norm=0.0, student_max_grad_norm=0.05)
    pair.train()
    assert_same_weights(pair.teacher_model, train_alone(tiny_bert(3, 1), tmp_path, max_grad_norm=0.0))
    assert_same_weights(pair.student_model, train_alone(tiny_bert(2, 2), tmp_path, max_grad_norm=0.05))


@pytest.mark.parametrize("plain_arguments", [False, True], ids=["standalone", "TrainingArguments"])
def test_without_a_student_it_is_trainer_bit_for_bit(plain_arguments, tmp_path):
    rows = tiny_rows(24, ragged=True)
    options = {"train_sampling_strategy": "random", "max_steps": 6, "logging_steps": 2, "eval_strategy": "steps"}
    if plain_arguments:
        options |= {"gradient_accumulation_steps": 2}
    results = []
    for cls in (Trainer, CoDistillationTrainer):
        args = tiny_args(tmp_path, distillation_mode="standalone", **options)
        if plain_arguments:
            keys = TrainingArguments.__dataclass_fields__
            known = {k: v for k, v in vars(args).items() if k in keys and keys[k].init}
            args = TrainingArguments(**known)
        trainer = cls(
            tiny_bert(2, 5, dropout=0.1), args, data_collator=collate, train_dataset=rows, eval_dataset=rows[:7]
        )
        trainer.train()
        prediction = trainer.predict(rows[:7])
        timeless = [
            {k: v for k, v in log.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}
            for log in trainer.state.log_history
        ]
        results.append((trainer.model, timeless, prediction))
    (model, logs, prediction), (own_model, own_logs, own_prediction) = results
    assert_same_weights(own_model, model)
    assert own_logs == logs
    assert type(own_prediction) is type(prediction)
    assert (own_prediction.predictions == prediction.predictions).all()


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6])
def test_resuming_at_any_step_equals_never_having_stopped(stop_at, tmp_path):
    options = {
        "train_dataset": tiny_rows(28, ragged=True),
        "train_sampling_strategy": "random",
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "soft_warmup_ratio": 0.6,
        "student_learning_rate": 5e-3,
        "save_strategy": "steps",
        "save_steps": 1,
    }

    def trainer(**more):
        return tiny_trainer(
            tmp_path, model=tiny_bert(3, 1, dropout=0.2), student_model=tiny_bert(2, 2, dropout=0.2), **options, **more
        )

    whole = trainer()
    whole.train()
    torch.rand(7)  # another process would be in another state
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop_at}"))
    assert_same_pair(resumed, whole)
    assert resumed.state.global_step == 8


def test_resuming_over_an_iterable_dataset_equals_never_having_stopped(tmp_path):
    rows = tiny_rows(40)
    data = IterableDataset.from_generator(lambda: iter(rows))

    def trainer():
        return tiny_trainer(tmp_path, train_dataset=data, save_strategy="steps", save_steps=2, max_steps=6)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_pair(resumed, whole)


def test_the_seed_decides_the_result(tmp_path):
    def train(seed):
        trainer = tiny_trainer(
            tmp_path,
            model=tiny_bert(3, 1, dropout=0.2),
            student_model=tiny_bert(2, 2, dropout=0.2),
            train_sampling_strategy="random",
            seed=seed,
        )
        trainer.train()
        return trainer

    first, again, other = train(1), train(1), train(2)
    assert_same_pair(first, again)
    assert not torch.equal(first.student_model.classifier.weight, other.student_model.classifier.weight)


def test_the_users_arguments_are_not_changed(tmp_path):
    trainer = tiny_trainer(tmp_path, student_learning_rate=1e-4, student_weight_decay=0.5, student_max_grad_norm=0.1)
    args, before = trainer.args, dict(vars(trainer.args))
    trainer.train()
    assert trainer.args is args
    assert {name: value for name, value in vars(args).items() if before[name] is not value} == {}


def test_soft_warmup_starts_from_the_hard_losses_alone(tmp_path):
    """The first of four warm-up steps has factor 0: after one step the weights are those of two trainings alone."""
    warm = tiny_trainer(tmp_path, soft_warmup_ratio=1.0, max_steps=4)
    factors = [find_schedule(warm.graph.edges[0].schedule).factor(step, 4) for step in range(5)]
    assert factors == [0.0, 0.25, 0.5, 0.75, 1.0]
    alone = tiny_trainer(tmp_path, distillation_mode="standalone", max_steps=4)
    after_first_step = []
    for trainer in (warm, alone):
        trainer.add_callback(AfterFirstStep(after_first_step, trainer.student_model))
        trainer.train()
    assert_same_weights(*after_first_step)
    assert not torch.equal(warm.student_model.classifier.weight, alone.student_model.classifier.weight)


class AfterFirstStep(TrainerCallback):
    """Copies a model's weights after the first optimizer step."""

    def __init__(self, copies, model):
        self.copies, self.model = copies, model

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.copies.append(weights_of(self.model))
