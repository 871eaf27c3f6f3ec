"""Sources that are made of the learners: a fitted ensemble, averages of weights, and snapshots."""

import copy

import pytest
import torch
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from torch.nn import functional as F
from transformers import TrainerCallback

from ctcd_trainer import DistillationArguments

POOLED = {"ensemble->student": {"weight": 0.7, "temperature": 2.0}, "ensemble->teacher": {"weight": 0.3}}
QUIET = {"teacher_from_student_weight": 0.0, "student_from_teacher_weight": 0.0}


# ---- The ensemble ----


def test_a_fitted_ensemble_follows_the_held_out_rows_and_is_resumed(tmp_path):
    rows = tiny_rows(24)
    options = {
        **{"train_dataset": rows, "eval_dataset": tiny_rows(20, seed=3), "edges": POOLED, "ensemble": "auto", **QUIET},
        **{"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3},
        **{"learning_rate": 1e-2, "logging_steps": 1},
    }
    whole = tiny_trainer(tmp_path, **options)
    whole.train()
    logs = [log for log in whole.state.log_history if "ensemble_teacher_weight" in log]
    assert [log["step"] for log in logs] == [2, 4]
    assert all(log["ensemble_teacher_weight"] + log["ensemble_student_weight"] == pytest.approx(1) for log in logs)
    assert whole.pair.objective.members["teacher"] == logs[-1]["ensemble_teacher_weight"] != 0.5
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(resumed.pair, whole.pair)


# ---- Copies of learners ----


class Weights(TrainerCallback):
    """Keeps a weight of both learners after each step, and after each epoch its number of steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.epochs: list[int] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: m.classifier.weight.detach().clone() for name, m in model.learners.items()})

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs.append(len(self.steps))


COPIES = {
    "teacher_average->student": {"weight": 1.0},
    "student_snapshot->teacher": {"weight": 0.5, "gate": "confident"},
}


def test_copies_of_learners_follow_them(tmp_path):
    kept = Weights()
    options = {
        "train_dataset": tiny_rows(8),
        "max_steps": 5,
        "edges": COPIES,
        "average_decay": 0.5,
        "logging_steps": 5,
    }
    trainer = tiny_trainer(tmp_path, **options, callbacks=[kept])
    start = {name: m.classifier.weight.detach().clone() for name, m in trainer.pair.learners.items()}
    trainer.train()
    average = start["teacher"]
    for step, weights in enumerate(kept.steps, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights["teacher"]
    models = trainer.pair.copies.models
    torch.testing.assert_close(models["teacher_average"].classifier.weight, average)
    assert kept.epochs[:2] == [2, 4]
    last = kept.steps[kept.epochs[-1] - 1]["student"]
    torch.testing.assert_close(models["student_snapshot"].classifier.weight, last)
    logs = trainer.state.log_history[0]
    assert logs["student_from_teacher_average_loss"] > 0
    assert 0 < logs["teacher_from_student_snapshot_gate"] < 1
    assert not any("average" in name for name, _ in trainer.pair.named_parameters())


def test_a_step_learns_from_the_average_of_the_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, edges={"teacher_average->student": {"weight": 1.0}}, **QUIET)
    frozen = tiny_bert(3, seed=9)
    trainer.pair.copies.models["teacher_average"].load_state_dict(frozen.state_dict())
    batch = collate(tiny_rows(4))
    output = trainer.pair(**batch, return_logits=True)
    with torch.no_grad():
        target = frozen.eval()(**batch).logits
    expected = F.kl_div(
        output.outputs["student"].logits.log_softmax(-1),
        target.log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(output.losses["student_from_teacher_average_loss"], expected)


def test_copies_are_resumed_bit_for_bit(tmp_path):
    options = {
        "train_dataset": tiny_rows(8),
        "max_steps": 5,
        "edges": COPIES,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = tiny_trainer(tmp_path, **options)
    whole.train()
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(resumed.pair, whole.pair)
    for name, model in whole.pair.copies.models.items():
        assert_same_weights(resumed.pair.copies.models[name], model)
    plain = tiny_trainer(tmp_path / "plain", **{**options, "edges": None})
    plain.train()
    with pytest.raises(ValueError, match=r"has no student_snapshot, from which this training learns"):
        tiny_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))


def test_a_second_training_begins_with_the_weights_of_then(tmp_path):
    trainer = tiny_trainer(tmp_path, train_dataset=tiny_rows(8), max_steps=3, edges=COPIES)
    trainer.train()
    trainer.args.max_steps = 1
    before = copy.deepcopy(trainer.teacher_model.classifier.weight)
    trainer.train()
    after, decay = trainer.teacher_model.classifier.weight, 2 / 11
    average = trainer.pair.copies.models["teacher_average"].classifier.weight
    torch.testing.assert_close(average, decay * before + (1 - decay) * after)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edges": {"ensemble->student": {"weight": "auto"}}}, "held-out rows set the weights of its members"),
        ({"edges": POOLED, "distillation_mode": "kd"}, "freezes the teacher"),
        ({"edges": POOLED, "ensemble": {"uncle": 1}}, "`ensemble` has the unknown member 'uncle'"),
        ({"edges": POOLED, "ensemble": {"teacher": -1}}, "`ensemble={'teacher': -1}` is not valid"),
        ({"edges": POOLED, "ensemble": "some"}, "`ensemble='some'` is not valid"),
        ({"edges": POOLED, "ensemble_of": "votes"}, "`ensemble_of='votes'` is unknown"),
        ({"ensemble": "auto"}, "`ensemble='auto'` has no effect without an edge"),
        ({"average_decay": 0.9}, "`average_decay=0.9` has no effect without an edge"),
        ({"edges": COPIES, "average_decay": 1.5}, "`average_decay=1.5` is not valid"),
        ({"edges": {"teacher_mean->student": {}}}, "unknown edge 'teacher_mean->student'"),
    ],
)
def test_sources_that_are_not_valid_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**settings)


def test_an_ensemble_needs_evaluations_to_be_fitted(tmp_path):
    with pytest.raises(ValueError, match="`ensemble='auto'` follows from evaluations .* `eval_strategy='no'`"):
        tiny_trainer(tmp_path, train_dataset=tiny_rows(8), edges=POOLED, ensemble="auto")


def test_a_pretrained_member_needs_the_model(tmp_path):
    with pytest.raises(ValueError, match="`pretrained_teacher`"):
        tiny_trainer(tmp_path, edges=POOLED, ensemble={"teacher": 1, "pretrained": 1})


def test_an_average_of_half_precision_weights_moves(tmp_path):
    """A step of an average is far below the precision of bf16."""
    teacher = tiny_bert(2).bfloat16()
    trainer = tiny_trainer(
        tmp_path, model=teacher, student_model=tiny_bert(1).bfloat16(), edges={"teacher_average->student": {}}
    )
    copies = trainer.pair.copies
    average = copies.models["teacher_average"].classifier.weight
    with torch.no_grad():
        average.fill_(1.0)
        trainer.teacher_model.classifier.weight.fill_(1.25)
    for step in range(10_000, 10_100):
        copies.after_step(step)
    torch.testing.assert_close(average, torch.full_like(average, 1.25 - 0.25 * 0.999**100))


def test_snapshots_are_resumed_at_the_end_of_an_epoch(tmp_path):
    """Trainer saves before the epoch ends, when the snapshot is not yet taken."""
    options = {"train_dataset": tiny_rows(8), "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    options["edges"] = {"teacher_snapshot->student": {}}
    whole = tiny_trainer(tmp_path, **options)
    whole.train()
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, whole.pair)


def test_copies_have_the_defaults_of_other_edges():
    arguments = DistillationArguments(
        edges={"student_average->teacher": {}, "teacher_average->student": {"schedule": "constant"}},
        soft_warmup_ratio=0.5,
    )
    edges = {edge.arrow: edge for edge in arguments.graph.edges}
    assert (edges["student_average->teacher"].rows, edges["student_average->teacher"].schedule) == (
        "labelled",
        "rise:0.5",
    )
    assert (edges["teacher_average->student"].rows, edges["teacher_average->student"].schedule) == ("all", "constant")
    with pytest.raises(ValueError, match="is a multiple of `student_hard_weight`, which is 0"):
        DistillationArguments(edges={"teacher_average->student": {"weight": "auto"}}, student_hard_weight=0.0)
