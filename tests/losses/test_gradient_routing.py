"""Each loss reaches the model that it trains, and no other."""

import pytest
import torch
from tiny import assert_same_weights, changed, tiny_bert, tiny_trainer, train_alone, weights_of

EDGES = [
    ("student_from_teacher_weight", "student"),
    ("teacher_from_student_weight", "teacher"),
    ("student_from_pretrained_weight", "student"),
    ("teacher_from_pretrained_weight", "teacher"),
]


@pytest.mark.parametrize(("weight", "learner"), EDGES)
def test_one_soft_weight_alone_trains_every_weight_of_its_learner_and_none_of_the_others(weight, learner, tmp_path):
    weights = {name: float(name == weight) for name, _ in EDGES}
    options = {"pretrained_teacher": tiny_bert(2, 3)} if "pretrained" in weight else {}
    trainer = tiny_trainer(tmp_path, teacher_hard_weight=0.0, student_hard_weight=0.0, **weights, **options)
    models = {**trainer.pair.learners, "pretrained": options.get("pretrained_teacher", torch.nn.Linear(1, 1))}
    before = {name: weights_of(model) for name, model in models.items()}
    trainer.train()
    for name, model in models.items():
        unused = {"bert.embeddings.position_embeddings.weight"} if name == learner else set()
        assert changed(model, before[name]) >= (set(before[name]) - unused if name == learner else set())
        assert name == learner or not changed(model, before[name])


@pytest.mark.parametrize(("mode", "frozen"), [("kd", "teacher"), ("reversed", "student")])
def test_a_frozen_model_does_not_change_and_takes_no_optimizer_state(mode, frozen, tmp_path):
    trainer = tiny_trainer(tmp_path, distillation_mode=mode, weight_decay=0.5)
    before = {name: weights_of(model) for name, model in trainer.pair.learners.items()}
    trainer.train()
    trained = "student" if frozen == "teacher" else "teacher"
    assert not changed(trainer.pair.learners[frozen], before[frozen])
    assert changed(trainer.pair.learners[trained], before[trained])
    optimized = {id(p) for p in trainer.optimizer.optimizer.state}
    assert optimized == {id(p) for p in trainer.pair.learners[trained].parameters()}
    assert {group["learner"] for group in trainer.optimizer.param_groups} == {trained}
    assert not any(p.requires_grad for p in trainer.pair.learners[frozen].parameters())


def test_the_student_of_kd_is_the_student_that_a_frozen_teacher_in_evaluation_mode_gives(tmp_path):
    """Dropout of the frozen teacher is off: with dropout only there, the student is the same."""
    students = []
    for dropout in (0.0, 0.5):
        trainer = tiny_trainer(tmp_path, model=tiny_bert(3, 1, dropout=dropout), distillation_mode="kd")
        trainer.train()
        students.append(trainer.student_model)
    assert_same_weights(*students)


@pytest.mark.parametrize("mode", ["ctcd", "standalone", "community"])
def test_both_models_train_with_dropout_also_after_an_evaluation(mode, tmp_path):
    trainer = tiny_trainer(tmp_path, distillation_mode=mode)
    trainer.evaluate(trainer.train_dataset)
    trainer.train()
    assert trainer.teacher_model.training
    assert trainer.student_model.training
    if mode == "community":
        assert not trainer.pretrained_teacher.training


def test_hard_weights_scale_each_models_own_loss(tmp_path):
    """With SGD, twice the hard weight is twice the step."""
    deltas = []
    for weight in (1.0, 2.0):
        trainer = tiny_trainer(
            tmp_path,
            distillation_mode="standalone",
            student_hard_weight=weight,
            optim="sgd",
            max_steps=1,
            max_grad_norm=0.0,
        )
        before = trainer.student_model.classifier.weight.detach().clone()
        trainer.train()
        deltas.append(trainer.student_model.classifier.weight.detach() - before)
    torch.testing.assert_close(deltas[1], 2 * deltas[0], rtol=1e-4, atol=1e-7)


def test_a_learner_without_any_weight_is_frozen_and_its_weight_decay_does_not_touch_it(tmp_path):
    trainer = tiny_trainer(tmp_path, teacher_hard_weight=0.0, teacher_from_student_weight=0.0, weight_decay=0.5)
    before = weights_of(trainer.teacher_model)
    trainer.train()
    assert not changed(trainer.teacher_model, before)


def test_the_frozen_pretrained_teacher_is_outside_of_the_trained_module(tmp_path):
    trainer = tiny_trainer(tmp_path, distillation_mode="community")
    inside = {id(p) for p in trainer.model.parameters()}
    assert not any(id(p) in inside or p.requires_grad for p in trainer.pretrained_teacher.parameters())


def test_training_the_pair_in_kd_mode_saves_the_gradients_of_the_teacher(tmp_path):
    trainer = tiny_trainer(tmp_path, distillation_mode="kd")
    outputs = trainer.model(**{"input_ids": torch.ones(2, 4, dtype=torch.long)}).outputs
    assert not outputs["teacher"]["logits"].requires_grad
    assert outputs["student"]["logits"].requires_grad


def test_the_teacher_alone_is_trained_like_the_teacher_of_a_trainer_in_mode_reversed_without_soft_weight(tmp_path):
    trainer = tiny_trainer(tmp_path, distillation_mode="reversed", teacher_from_student_weight=0.0)
    trainer.train()
    assert_same_weights(trainer.teacher_model, train_alone(tiny_bert(3, 1), tmp_path))
