"""What must not change the result of heads that count tokens, and what an evaluation of them reports."""

import copy
import math

import pytest
import torch
from naive_losses import run_model
from tiny import assert_same_weights, changed, tiny_args, weights_of
from tiny_models import rows_of, tiny_batch, tiny_model
from transformers import Trainer, default_data_collator

from ctcd_trainer import CoDistillationTrainer

LANGUAGE_MODELS = [("masked-lm", "bert"), ("causal-lm", "gpt2"), ("seq2seq-lm", "t5")]
TOKEN_COUNTED = [*LANGUAGE_MODELS, ("token-classification", "bert")]

both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "whole logits"])


def tiny_trainer(tmp_path, head, family, cls=CoDistillationTrainer, model_settings=None, **options):
    """A trainer of a teacher of two layers and a student of one."""
    names = ("train_dataset", "eval_dataset", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
    own = {name: options.pop(name) for name in names if name in options}
    settings = model_settings or {}
    return cls(
        tiny_model(family, head, 2, seed=1, **settings),
        tiny_args(tmp_path, **options),
        data_collator=default_data_collator,
        student_model=tiny_model(family, head, 1, seed=2, **settings),
        **own,
    )


def train(*args, **options):
    trainer = tiny_trainer(*args, **options)
    trainer.train()
    return trainer


def tiny_data(head, rows=16, unscored=(), seed=0):
    """Rows that score different numbers of positions, and some that score none."""
    batch = tiny_batch(head, rows, seed)
    batch["labels"][list(unscored)] = -100
    return rows_of(batch)


def assert_same_pair(first, second, tolerance=0.0):
    assert_same_weights(first.teacher_model, second.teacher_model, tolerance)
    assert_same_weights(first.student_model, second.student_model, tolerance)


# ---- Training ----


@pytest.mark.parametrize(("head", "family"), TOKEN_COUNTED)
def test_accumulation_of_micro_batches_that_score_unequal_numbers_of_positions_equals_one_batch(
    head, family, tmp_path
):
    """Also where one scores none, first or later, and whether losses are fused or not."""
    data = tiny_data(head, unscored=(0, 3, 13))
    scored = {int((row["labels"] != -100).sum()) for row in data}
    assert len(scored) > 3
    assert 0 in scored
    trainers = [
        train(
            tmp_path,
            head,
            family,
            train_dataset=data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            fused_lm_head=fused,
            max_steps=2,
            temperature=2.0,
            learning_rate=1e-3,
        )
        for size, fused in [(8, True), (1, True), (8, False), (1, False), (2, True)]
    ]
    before = tiny_trainer(tmp_path, head, family).student_model
    assert changed(trainers[0].student_model, weights_of(before))
    for other in trainers[1:]:
        assert_same_pair(trainers[0], other, tolerance=1e-6)
    if head != "token-classification":
        assert [trainer.pair.fused_heads.used for trainer in trainers] == [True, True, False, False, True]


@both_paths
@pytest.mark.parametrize(("head", "family"), TOKEN_COUNTED)
def test_steps_that_score_nothing_change_no_weight(head, family, fused, tmp_path):
    """Before anything is scored, and after."""
    data = tiny_data(head, 12, unscored=[*range(4), *range(8, 12)])
    # Without momentum, or a step without gradients would not be one without changes.
    options = {"fused_lm_head": fused, "logging_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
    padded = train(tmp_path, head, family, train_dataset=data, max_steps=3, **options)
    plain = train(tmp_path, head, family, train_dataset=data[4:8], max_steps=1, **options)
    assert_same_pair(padded, plain)
    losses = [log for log in padded.state.log_history if "loss" in log]
    for name in ("loss", "student_from_teacher_loss"):
        assert [log[name] > 0 for log in losses] == [False, True, False]
        assert losses[0][name] == losses[2][name] == 0
    assert ["teacher_hard_loss" in log for log in losses] == [False, True, False]
    assert losses[1]["teacher_hard_loss"] > 0


@both_paths
@pytest.mark.parametrize(("head", "family"), LANGUAGE_MODELS)
@pytest.mark.parametrize("learner", ["teacher", "student"])
def test_one_soft_weight_alone_trains_every_weight_of_its_learner_and_none_of_the_other(
    learner, head, family, fused, tmp_path
):
    source = "student" if learner == "teacher" else "teacher"
    weights = {
        "teacher_hard_weight": 0.0,
        "student_hard_weight": 0.0,
        f"{learner}_from_{source}_weight": 1.0,
        f"{source}_from_{learner}_weight": 0.0,
    }
    trainer = tiny_trainer(
        tmp_path, head, family, train_dataset=tiny_data(head), max_steps=2, fused_lm_head=fused, **weights
    )
    before = {name: weights_of(model) for name, model in trainer.pair.learners.items()}
    trainer.train()
    assert trainer.pair.fused_heads.used is fused
    assert not changed(trainer.pair.learners[source], before[source])
    same = set(before[learner]) - changed(trainer.pair.learners[learner], before[learner])
    assert same == set()


@both_paths
def test_with_soft_weights_of_zero_each_language_model_is_what_trainer_makes_of_it_alone(fused, tmp_path):
    data = tiny_data("causal-lm")
    options = {"max_steps": 3, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    pair = train(
        tmp_path,
        "causal-lm",
        "gpt2",
        train_dataset=data,
        distillation_mode="standalone",
        fused_lm_head=fused,
        **options,
    )
    for layers, seed, own in ((2, 1, pair.teacher_model), (1, 2, pair.student_model)):
        model = tiny_model("gpt2", "causal-lm", layers, seed)
        args = tiny_args(tmp_path, **options)
        Trainer(model, args, data_collator=default_data_collator, train_dataset=data).train()
        assert_same_weights(own, model, tolerance=1e-6)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_resuming_a_fused_causal_model_equals_never_having_stopped(stop_at, tmp_path):
    options = {
        "model_settings": {"resid_pdrop": 0.2, "embd_pdrop": 0.2},
        "train_dataset": tiny_data("causal-lm", 20),
        "train_sampling_strategy": "random",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = train(tmp_path, "causal-lm", "gpt2", **options)
    torch.rand(7)  # another process would be in another state
    resumed = tiny_trainer(tmp_path, "causal-lm", "gpt2", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop_at}"))
    assert resumed.state.global_step == 6
    assert resumed.pair.fused_heads.used
    assert whole.pair.fused_heads.used
    assert_same_pair(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_changes_no_loss(backend, tmp_path):
    options = {"train_dataset": tiny_data("masked-lm", 12, unscored=(4,)), "max_steps": 3, "logging_steps": 1}
    eager = train(tmp_path, "masked-lm", "bert", **options)
    compiled = train(tmp_path, "masked-lm", "bert", torch_compile=True, torch_compile_backend=backend, **options)
    assert compiled.pair.fused_heads.used
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    for log, expected in zip(compiled.state.log_history, eager.state.log_history, strict=True):
        losses = {name: value for name, value in expected.items() if name.endswith("loss")}
        assert {name: log[name] for name in losses} == pytest.approx(losses, rel=1e-5)


# ---- Evaluation ----

EVALUATED = {
    "masked-lm": ("bert", {}),
    "masked-lm, sparse": ("modernbert", {"sparse_prediction": True}),
    "causal-lm": ("llama", {}),
    "seq2seq-lm": ("bart", {}),
    "token-classification": ("deberta-v2", {}),
    "question-answering": ("bert", {}),
}


def make_alike(trainer):
    """Make the student the teacher's first layer with some noise: others would agree on next to nothing."""
    teacher, student = trainer.teacher_model.state_dict(), trainer.student_model.state_dict()
    trainer.student_model.load_state_dict({name: teacher[name] + 0.1 * student[name] for name in student})


def naive_agreement(head, models, rows):
    """Share of the scored positions at which both models have the same best outcome."""
    same = []
    for row in rows:
        batch = default_data_collator([row])
        outputs = [run_model(model, batch) for model in models]
        if head == "question-answering":
            real = batch["attention_mask"].bool()
            for name in ("start_logits", "end_logits"):
                best = [output[name][real].argmax() for output in outputs]
                same.append(best[0] == best[1])
            continue
        for position, label in enumerate(batch["labels"][0]):
            source = position - 1 if head == "causal-lm" else position
            if label != -100 and source >= 0:
                best = [output.logits[0, source].argmax() for output in outputs]
                same.append(best[0] == best[1])
    return sum(map(float, same)) / len(same)


@pytest.mark.parametrize("case", list(EVALUATED))
def test_evaluation_reports_what_trainer_reports_of_each_model_alone_and_how_often_they_agree(case, tmp_path):
    head = case.split(",")[0]
    family, settings = EVALUATED[case]
    rows = rows_of(tiny_batch(head, 12))
    trainer = tiny_trainer(tmp_path, head, family, model_settings=settings, eval_dataset=rows)
    make_alike(trainer)
    models = [copy.deepcopy(trainer.teacher_model), copy.deepcopy(trainer.student_model)]
    metrics = trainer.evaluate()
    for model, prefix in zip(models, ("", "student_"), strict=True):
        args = tiny_args(tmp_path)
        alone = Trainer(model, args, data_collator=default_data_collator).evaluate(rows)["eval_loss"]
        assert metrics[f"eval_{prefix}loss"] == pytest.approx(alone, rel=1e-6)
        perplexity = metrics.get(f"eval_{prefix}perplexity")
        assert perplexity == (pytest.approx(math.exp(alone), rel=1e-5) if head.endswith("lm") else None)
    for model in models:
        model.sparse_prediction = False
    expected = naive_agreement(head, models, rows)
    assert 0 < expected < 1
    assert metrics["eval_agreement"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("head", "family"), TOKEN_COUNTED)
def test_a_batch_of_an_evaluation_that_scores_nothing_does_not_count(head, family, tmp_path):
    """Trainer leaves out its loss, which is NaN (`logging_nan_inf_filter`)."""
    data = tiny_data(head, 15, unscored=range(5, 10))
    trainer = tiny_trainer(tmp_path, head, family, eval_dataset=data)
    metrics, scored = trainer.evaluate(), trainer.evaluate(data[:5] + data[10:])
    alone = Trainer(trainer.teacher_model, tiny_args(tmp_path), data_collator=default_data_collator).evaluate(data)
    if family != "gpt2":  # of which plain Trainer divides the loss by L tokens a row instead of L - 1
        assert metrics["eval_loss"] == pytest.approx(alone["eval_loss"], nan_ok=True)
    names = ["eval_student_loss", "eval_agreement"]
    if not math.isnan(alone["eval_loss"]):  # transformers 5.17 does not filter it, and so not the teacher's
        names.append("eval_loss")
    for name in names:
        assert metrics[name] == pytest.approx(scored[name])


@pytest.mark.parametrize(("head", "family"), TOKEN_COUNTED)
def test_no_logits_are_collected_where_no_metrics_need_them(head, family, tmp_path):
    collected = []

    class Watched(CoDistillationTrainer):
        def prediction_step(self, *args, **kwargs):
            collected.append(super().prediction_step(*args, **kwargs))
            return collected[-1]

        def evaluation_loop(self, *args, **kwargs):
            collected.append(super().evaluation_loop(*args, **kwargs))
            return collected[-1]

    trainer = tiny_trainer(tmp_path, head, family, Watched, eval_dataset=tiny_data(head, 12))
    metrics = trainer.evaluate()
    *steps, output = collected
    assert [step[1:] for step in steps] == [(None, None)] * 2 * 3
    assert output.predictions is output.student_predictions is output.label_ids is None
    assert {"eval_loss", "eval_student_loss", "eval_agreement"} <= metrics.keys()


@pytest.mark.parametrize(("head", "family"), TOKEN_COUNTED)
def test_metrics_see_only_what_preprocessing_makes_of_the_logits_of_each_batch(head, family, tmp_path):
    passed, seen = [], []

    def best(logits, labels):
        logits = logits[0] if isinstance(logits, tuple) else logits
        passed.append((len(logits), len(labels)))
        return logits.argmax(-1)

    def accuracy(prediction):
        seen.append(prediction.predictions)
        labels = prediction.label_ids
        return {"accuracy": (prediction.predictions == labels)[labels != -100].mean()}

    rows = tiny_data(head, 12)
    trainer = tiny_trainer(
        tmp_path,
        head,
        family,
        eval_dataset=rows,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=best,
    )
    metrics = trainer.evaluate()
    batches = [(5, 5), (5, 5), (2, 2)]
    assert sorted(passed) == sorted(batches * 2)
    batch = default_data_collator(rows)
    for model, predictions, prefix in zip(
        (trainer.teacher_model, trainer.student_model), seen, ("", "student_"), strict=True
    ):
        expected = run_model(model, batch).logits.argmax(-1)
        assert (predictions == expected.numpy()).all()
        scored = batch["labels"] != -100
        accuracy_of = (expected == batch["labels"])[scored].float().mean().item()
        assert metrics[f"eval_{prefix}accuracy"] == pytest.approx(accuracy_of)
    assert (seen[0] != seen[1]).any()


def test_a_custom_loss_is_called_for_heads_without_a_labels_column(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch):
        seen.append(labels)
        return outputs.start_logits.square().mean()

    rows = rows_of(tiny_batch("question-answering", 8))
    tiny_trainer(
        tmp_path, "question-answering", "bert", train_dataset=rows, compute_loss_func=loss, max_steps=1
    ).train()
    assert seen
    assert set(seen) == {None}


def test_metrics_may_ask_for_the_inputs_of_images(tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.inputs.shape)
        return {}

    data = {"eval_dataset": tiny_data("image-classification", 6), "compute_metrics": metrics}
    tiny_trainer(tmp_path, "image-classification", "vit", **data, include_for_metrics=["inputs"]).evaluate()
    assert [shape[0] for shape in shapes] == [6, 6]


def test_a_perplexity_of_the_user_keeps_its_name(tmp_path):
    rows = rows_of(tiny_batch("causal-lm", 5))
    family, settings = EVALUATED["causal-lm"]
    mine = {"perplexity": 8.0, "student_loss": 9.0}
    options = {"model_settings": settings, "eval_dataset": rows, "compute_metrics": lambda prediction: mine}
    metrics = tiny_trainer(tmp_path, "causal-lm", family, **options).evaluate()
    expected = {"perplexity": 8.0, "student_perplexity": 8.0, "student_loss": 9.0, "student_student_loss": 9.0}
    assert {name: metrics[f"eval_{name}"] for name in expected} == expected
