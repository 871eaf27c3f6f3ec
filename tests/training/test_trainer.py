"""What a user of Trainer relies on keeps working, for both models."""

import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import (
    assert_same_weights,
    changed,
    collate,
    tiny_args,
    tiny_bert,
    tiny_rows,
    tiny_trainer,
    train_alone,
    weights_of,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.cards.results import metrics_of


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def logits_of(model, rows, batch_size=5):
    model.eval()
    with torch.no_grad():
        parts = [model(**collate(rows[i : i + batch_size])).logits for i in range(0, len(rows), batch_size)]
    return torch.cat(parts).numpy()


# ---- The pair ----


def test_the_plain_models_are_at_hand_at_any_time(tmp_path):
    teacher, student = tiny_bert(3, 1), tiny_bert(2, 2)
    trainer = tiny_trainer(tmp_path, model=teacher, student_model=student)
    for _ in range(2):
        assert trainer.teacher_model is teacher
        assert trainer.student_model is student
        trainer.train()
    assert CoDistillationTrainer(teacher, TrainingArguments(tmp_path, use_cpu=True)).teacher_model is teacher
    assert CoDistillationTrainer(teacher, TrainingArguments(tmp_path, use_cpu=True)).student_model is None


def test_a_plain_training_arguments_with_a_student_means_the_defaults(tmp_path):
    plain = TrainingArguments(
        tmp_path, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows = tiny_rows(24)
    trainer = CoDistillationTrainer(tiny_bert(3, 1), plain, collate, rows, student_model=tiny_bert(2, 2))
    trainer.train()
    own = tiny_trainer(
        tmp_path,
        train_dataset=rows,
        max_steps=3,
        adam_epsilon=1e-8,
        per_device_train_batch_size=8,
        train_sampling_strategy="random",
    )
    own.train()
    assert trainer.args is plain
    assert_same_weights(trainer.student_model, own.student_model)


def test_models_are_given_by_path(tmp_path):
    for name, layers in (("teacher", 3), ("student", 2), ("pretrained", 2)):
        tiny_bert(layers, layers).save_pretrained(tmp_path / name)
    trainer = tiny_trainer(
        tmp_path / "out",
        model=str(tmp_path / "teacher"),
        student_model=str(tmp_path / "student"),
        pretrained_teacher=str(tmp_path / "pretrained"),
        distillation_mode="community",
    )
    assert_same_weights(trainer.teacher_model, tiny_bert(3, 3))
    assert_same_weights(trainer.student_model, tiny_bert(2, 2))
    trainer.train()


def test_model_init_and_student_model_init_make_both_models_anew_for_each_training(tmp_path):
    trainer = tiny_trainer(
        tmp_path, model_init=lambda: tiny_bert(3, 1), student_model_init=lambda trial: tiny_bert(2, 2)
    )
    trainer.train()
    first = weights_of(trainer.teacher_model), weights_of(trainer.student_model)
    trainer.train()
    assert_same_weights(trainer.teacher_model, first[0])
    assert_same_weights(trainer.student_model, first[1])
    expected = tiny_trainer(tmp_path)
    expected.train()
    assert_same_weights(trainer.student_model, expected.student_model)


def test_a_student_of_another_family_gets_only_the_inputs_that_it_takes(tmp_path):
    config = DistilBertConfig(vocab_size=48, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
    rows = [{**row, "token_type_ids": [0] * len(row["input_ids"]), "unused": 1} for row in tiny_rows()]
    seen = []

    def collate_types(batch):
        seen.append(set(batch[0]))
        return {**collate(batch), "token_type_ids": torch.tensor([row["token_type_ids"] for row in batch])}

    student = DistilBertForSequenceClassification(config)
    before = weights_of(student)
    trainer = tiny_trainer(tmp_path, student_model=student, train_dataset=rows, data_collator=collate_types)
    trainer.train()
    assert not torch.equal(before["classifier.weight"], student.state_dict()["classifier.weight"])
    assert seen[0] == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_a_frozen_teacher_gets_inputs_that_no_learner_takes(tmp_path):
    """Columns are kept for any of the models, and each gets its own."""
    config = DistilBertConfig(vocab_size=48, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
    seen = {}

    class Spy(type(tiny_bert())):
        def forward(self, input_ids=None, attention_mask=None, token_type_ids=None):
            seen["token_type_ids"] = token_type_ids
            return super().forward(input_ids, attention_mask, token_type_ids)

    data = Dataset.from_list([{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in tiny_rows()])
    trainer = tiny_trainer(
        tmp_path,
        model=DistilBertForSequenceClassification(config),
        student_model=DistilBertForSequenceClassification(config),
        pretrained_teacher=Spy(tiny_bert(2, 3).config),
        distillation_mode="community",
        train_dataset=data,
        data_collator=default_data_collator,
    )
    trainer.train()
    assert (seen["token_type_ids"] == 1).all()


def test_the_columns_of_the_student_are_kept_when_the_teacher_takes_fewer(tmp_path):
    config = DistilBertConfig(vocab_size=48, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
    rows = [{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in tiny_rows()]
    students = []
    for data in (rows, [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in rows]):
        torch.manual_seed(0)
        trainer = tiny_trainer(
            tmp_path,
            model=DistilBertForSequenceClassification(config),
            train_dataset=Dataset.from_list(data),
            data_collator=default_data_collator,
        )
        trainer.train()
        students.append(trainer.student_model.classifier.weight)
    assert not torch.equal(*students)


def test_special_tokens_of_both_configs_are_aligned_with_the_tokenizer(tmp_path):
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w5", unk_token="w1")
    trainer = tiny_trainer(tmp_path, processing_class=tokenizer)
    trainer.train()
    assert (trainer.teacher_model.config.pad_token_id, trainer.student_model.config.pad_token_id) == (5, 5)


def test_configs_of_the_other_models_keep_their_cache_setting_and_no_cache_is_made(tmp_path):
    def gpt2():
        return GPT2ForSequenceClassification(
            GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)
        )

    student, pretrained = gpt2(), gpt2()
    trainer = tiny_trainer(
        tmp_path, model=gpt2(), student_model=student, pretrained_teacher=pretrained, distillation_mode="community"
    )
    trainer.train()
    outputs = trainer.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert all(output.past_key_values is None for output in outputs.outputs.values())
    assert student.config.use_cache
    assert pretrained.config.use_cache


def test_bf16_autocast_trains_both_models_close_to_fp32(tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = tiny_trainer(tmp_path, bf16=bf16, learning_rate=1e-3, max_steps=6, logging_steps=6)
        trainer.train()
        losses.append(trainer.state.log_history[0])
    for name in ("teacher_hard_loss", "student_hard_loss", "student_from_teacher_loss", "teacher_from_student_loss"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.05)
        assert losses[1][name] != losses[0][name]


def test_auto_find_batch_size_trains_both_models_and_logs_the_components_of_the_attempt_that_fits(tmp_path):
    class OutOfMemoryOnce(TrainerCallback):
        weights = None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2 and self.weights is None:
                self.weights = weights_of(model)
                raise RuntimeError("CUDA out of memory.")

    once = OutOfMemoryOnce()
    trainer = tiny_trainer(tmp_path, auto_find_batch_size=True, max_steps=4, logging_steps=4, callbacks=[once])
    trainer.train()
    assert trainer._train_batch_size < trainer.args.per_device_train_batch_size
    assert {name.split(".")[1] for name in changed(trainer.pair, once.weights)} == {"teacher", "student"}
    logs = next(log for log in trainer.state.log_history if "loss" in log)
    parts = sum(value for name, value in logs.items() if name.endswith("_loss"))
    assert logs["loss"] == pytest.approx(parts, rel=1e-5)


def test_callbacks_receive_the_pair_with_the_teachers_config(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen["pair"], seen["config"] = model, model.config

    trainer = tiny_trainer(tmp_path, callbacks=[Look()])
    trainer.train()
    assert seen["pair"].student is trainer.student_model
    assert seen["config"] is trainer.teacher_model.config


# ---- Losses and optimisation ----


def test_label_smoothing_and_a_custom_loss_apply_to_both_models(tmp_path):
    """A custom loss that is the smoothed one gives the same training as `label_smoothing_factor`."""

    def smoothed(outputs, labels, num_items_in_batch=None):
        log_probs = torch.log_softmax(outputs.logits, -1)
        own = -log_probs.gather(-1, labels[:, None]).sum()
        return (0.8 * own - 0.2 * log_probs.sum() / log_probs.shape[-1]) / num_items_in_batch

    pairs = []
    for options in ({"label_smoothing_factor": 0.2}, {"compute_loss_func": smoothed}):
        trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=2, learning_rate=1e-3, **options)
        trainer.train()
        pairs.append(trainer)
    assert_same_weights(pairs[0].teacher_model, pairs[1].teacher_model, tolerance=1e-6)
    assert_same_weights(pairs[0].student_model, pairs[1].student_model, tolerance=1e-6)
    plain = tiny_trainer(tmp_path, gradient_accumulation_steps=2, learning_rate=1e-3)
    plain.train()
    assert not torch.allclose(
        plain.student_model.classifier.weight, pairs[0].student_model.classifier.weight, atol=1e-5
    )


def test_a_loss_function_of_later_holds_at_once(tmp_path):
    trainer, batch = tiny_trainer(tmp_path), collate(tiny_rows(4))
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 0.0 * outputs.logits.sum() + 7.0
    assert trainer.prediction_step(trainer.model, batch, True)[0].item() == pytest.approx(7.0)
    assert trainer.compute_loss(trainer.model, batch).item() > 14.0


def test_arguments_of_later_hold_and_their_token_is_not_saved(tmp_path):
    trainer = tiny_trainer(tmp_path / "first")
    trainer.args = copy.copy(trainer.args)
    trainer.args.hub_token, trainer.args.output_dir = "hf_secret", str(tmp_path / "second")
    trainer.save_model()
    assert torch.load(tmp_path / "second" / "training_args.bin", weights_only=False).hub_token is None
    assert trainer.args.hub_token == "hf_secret"


def test_a_models_own_loss_is_used(tmp_path):
    """A user's model that weighs its loss in `forward` trains as it does with Trainer alone."""

    class Doubled(type(tiny_bert())):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            outputs = super().forward(input_ids, attention_mask, labels=labels)
            outputs["loss"] = 2 * outputs["loss"]
            return outputs

    def doubled():
        model = Doubled(tiny_bert(2, 2).config)
        model.load_state_dict(tiny_bert(2, 2).state_dict())
        return model

    options = {"optim": "sgd", "max_grad_norm": 0.0}
    pair = tiny_trainer(tmp_path, student_model=doubled(), distillation_mode="standalone", **options)
    pair.train()
    assert_same_weights(pair.student_model, train_alone(doubled(), tmp_path, **options))
    single = train_alone(tiny_bert(2, 2), tmp_path, **options)
    assert not torch.equal(pair.student_model.classifier.weight, single.classifier.weight)


def test_an_optimizer_and_a_scheduler_of_the_user_train_both_models(tmp_path):
    teacher, student = tiny_bert(3, 1), tiny_bert(2, 2)
    optimizer = torch.optim.SGD([*teacher.parameters(), *student.parameters()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    trainer = tiny_trainer(tmp_path, model=teacher, student_model=student, optimizers=(optimizer, scheduler))
    trainer.train()
    expected = tiny_trainer(tmp_path, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant")
    expected.train()
    assert_same_weights(teacher, expected.teacher_model)
    assert_same_weights(student, expected.student_model)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_optimizers_of_trainer_give_each_model_what_they_give_it_alone(optim, tmp_path):
    options = {"optim": optim, "weight_decay": 0.1}
    pair = tiny_trainer(tmp_path, distillation_mode="standalone", **options)
    pair.train()
    assert_same_weights(pair.teacher_model, train_alone(tiny_bert(3, 1), tmp_path, **options))
    assert_same_weights(pair.student_model, train_alone(tiny_bert(2, 2), tmp_path, **options))


def test_an_optimizer_class_of_the_user_is_built_for_each_model(tmp_path):
    trainer = tiny_trainer(
        tmp_path, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.01}), student_learning_rate=0.02
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adagrad)
    rates = {group["learner"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"teacher": 0.01, "student": 0.02}


def test_gradient_checkpointing_and_neftune_hold_for_both_models(tmp_path):
    plain = tiny_trainer(tmp_path)
    plain.train()
    checkpointing = tiny_trainer(tmp_path, gradient_checkpointing=True)
    checkpointing.train()
    assert_same_weights(plain.student_model, checkpointing.student_model, tolerance=1e-6)
    assert checkpointing.student_model.is_gradient_checkpointing
    # Without soft losses, through which the noise of one would reach the other.
    plain, noisy = (
        tiny_trainer(tmp_path, distillation_mode="standalone", neftune_noise_alpha=alpha) for alpha in (None, 5.0)
    )
    plain.train()
    noisy.train()
    for name in ("teacher", "student"):
        own, noisy_own = plain.pair.learners[name], noisy.pair.learners[name]
        assert not torch.equal(own.classifier.weight, noisy_own.classifier.weight)
        assert not noisy_own.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_every_sampling_strategy_trains_on_every_row(strategy, tmp_path):
    rows = tiny_rows(22, ragged=True)
    seen = []

    def spy(batch):
        seen.extend(tuple(row["input_ids"]) for row in batch)
        return collate(batch)

    trainer = tiny_trainer(
        tmp_path,
        train_dataset=Dataset.from_list(rows),
        data_collator=spy,
        train_sampling_strategy=strategy,
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train()
    assert sorted(seen) == sorted(tuple(row["input_ids"]) for row in rows)


# ---- Logs ----


def test_logs_carry_the_mean_of_each_component_and_both_gradient_norms(tmp_path):
    rows = tiny_rows(16, ragged=True)
    options = {"train_dataset": rows, "max_steps": 2, "logging_steps": 2, "learning_rate": 0.0, "temperature": 2.0}
    trainer = tiny_trainer(
        tmp_path, gradient_accumulation_steps=2, student_hard_weight=0.5, student_learning_rate=0.0, **options
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    batch = collate(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        z_t, z_s = (model.eval()(**batch).logits for model in (trainer.teacher_model, trainer.student_model))
    p, q = (torch.softmax(z / 2, -1) for z in (z_t, z_s))
    expected = {
        "teacher_hard_loss": torch.nn.functional.cross_entropy(z_t, labels).item(),
        "student_hard_loss": torch.nn.functional.cross_entropy(z_s, labels).item(),
        "student_from_teacher_loss": 4 * (p * (p / q).log()).sum(-1).mean().item(),
        "teacher_from_student_loss": 4 * (q * (q / p).log()).sum(-1).mean().item(),
    }
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value, rel=1e-4), name
    total = expected["teacher_hard_loss"] + 0.5 * expected["student_hard_loss"]
    total += expected["student_from_teacher_loss"] + expected["teacher_from_student_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-4)
    assert logs["grad_norm"] == pytest.approx(np.hypot(logs["teacher_grad_norm"], logs["student_grad_norm"]))
    assert logs["student_learning_rate"] == 0.0


def test_components_are_averaged_since_the_last_log(tmp_path):
    whole = tiny_trainer(tmp_path, max_steps=4, logging_steps=4)
    whole.train()
    each = tiny_trainer(tmp_path, max_steps=4, logging_steps=1)
    each.train()
    values = [log["student_from_teacher_loss"] for log in each.state.log_history if "loss" in log]
    assert len(values) == 4
    assert whole.state.log_history[0]["student_from_teacher_loss"] == pytest.approx(np.mean(values))


def test_the_students_learning_rate_is_logged_like_the_teachers(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4, logging_steps=1, student_learning_rate=2e-2)
    trainer.train()
    rates = [
        (log["learning_rate"], log["student_learning_rate"]) for log in trainer.state.log_history if "loss" in log
    ]
    assert rates == [pytest.approx((1e-2 * share, 2e-2 * share)) for share in (1.0, 0.75, 0.5, 0.25)]


# ---- Evaluation and prediction ----


@pytest.mark.parametrize("with_metrics", [True, False])
def test_an_evaluation_gives_each_model_what_trainer_gives_it_alone(with_metrics, tmp_path):
    rows = tiny_rows(13, ragged=True)
    compute_metrics = accuracy if with_metrics else None
    pair = [tiny_bert(layers, seed, initializer_range=1.5) for layers, seed in ((3, 1), (2, 2))]
    trainer = tiny_trainer(
        tmp_path, model=pair[0], student_model=pair[1], eval_dataset=rows, compute_metrics=compute_metrics
    )
    metrics = trainer.evaluate()
    for prefix, model in zip(("eval_", "eval_student_"), pair, strict=True):
        alone = Trainer(
            model, tiny_args(tmp_path), data_collator=collate, eval_dataset=rows, compute_metrics=compute_metrics
        ).evaluate()
        assert metrics[f"{prefix}loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
        if with_metrics:
            assert metrics[f"{prefix}accuracy"] == alone["eval_accuracy"]
    first, second = (logits_of(model, rows) for model in pair)
    assert metrics["eval_agreement"] == pytest.approx((first.argmax(-1) == second.argmax(-1)).mean())
    assert 0 < metrics["eval_agreement"] < 1
    assert [name for name in metrics if "student" in name and name.endswith("loss")] == ["eval_student_loss"]


def test_agreement_counts_labels_for_multi_label_and_is_left_out_for_regression(tmp_path):
    rows = tiny_rows(9, "multi_label")
    metrics = tiny_trainer(tmp_path, "multi_label", eval_dataset=rows).evaluate()
    first, second = logits_of(tiny_bert(3, 1, "multi_label"), rows), logits_of(tiny_bert(2, 2, "multi_label"), rows)
    assert metrics["eval_agreement"] == pytest.approx(((first > 0) == (second > 0)).mean())
    metrics = tiny_trainer(tmp_path, "regression", eval_dataset=tiny_rows(9, "regression")).evaluate()
    assert "eval_agreement" not in metrics
    assert "eval_student_loss" in metrics


def test_several_evaluation_sets_have_their_names_in_the_keys(tmp_path):
    sets = {"first": tiny_rows(6), "second": tiny_rows(7, seed=1)}
    metrics = tiny_trainer(tmp_path, eval_dataset=sets, compute_metrics=accuracy).evaluate()
    for name in sets:
        assert {
            f"eval_{name}_{key}" for key in ("loss", "student_loss", "accuracy", "student_accuracy", "agreement")
        } <= set(metrics)


def test_predict_gives_the_teachers_predictions_and_the_students_when_asked(tmp_path):
    rows = tiny_rows(13, ragged=True)
    trainer = tiny_trainer(tmp_path, compute_metrics=accuracy)
    predictions, labels, metrics = trainer.predict(rows)
    np.testing.assert_allclose(predictions, logits_of(tiny_bert(3, 1), rows), atol=1e-6)
    assert labels.tolist() == [row["labels"] for row in rows]
    assert {"test_loss", "test_accuracy", "test_student_loss", "test_student_accuracy", "test_agreement"} <= set(
        metrics
    )
    output = trainer.predict(rows, student_predictions=True)
    np.testing.assert_allclose(output.student_predictions, logits_of(tiny_bert(2, 2), rows), atol=1e-6)
    np.testing.assert_array_equal(output.predictions, predictions)


def test_predict_works_without_labels(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in tiny_rows(6)]
    output = tiny_trainer(tmp_path).predict(rows)
    assert output.label_ids is None
    assert "test_loss" not in output.metrics
    assert 0 <= output.metrics["test_agreement"] <= 1


def test_logits_are_preprocessed_per_model_before_the_metrics(tmp_path):
    rows = tiny_rows(11)
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=rows,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions == p.label_ids).mean()),
            "ndim": p.predictions.ndim,
        },
    )
    metrics = trainer.evaluate()
    expected = tiny_trainer(tmp_path, eval_dataset=rows, compute_metrics=accuracy).evaluate()
    assert (metrics["eval_ndim"], metrics["eval_student_ndim"]) == (1, 1)
    for name in ("eval_accuracy", "eval_student_accuracy", "eval_agreement"):
        assert metrics[name] == expected[name]


def test_metrics_may_see_inputs_and_each_models_own_losses(tmp_path):
    rows = tiny_rows(7)
    seen = []

    def look(prediction):
        seen.append((prediction.inputs, prediction.losses))
        return {}

    trainer = tiny_trainer(tmp_path, eval_dataset=rows, compute_metrics=look, include_for_metrics=["inputs", "loss"])
    metrics = trainer.evaluate()
    (teacher_inputs, teacher_losses), (student_inputs, student_losses) = seen
    np.testing.assert_array_equal(teacher_inputs, student_inputs)
    assert teacher_losses.mean() == pytest.approx(metrics["eval_loss"])
    assert student_losses.mean() == pytest.approx(metrics["eval_student_loss"])
    assert len(student_losses) == len(teacher_losses) == 7


class RunningAccuracy:
    """Keeps counts between its calls, as `batch_eval_metrics` asks for."""

    def __init__(self):
        self.right, self.seen = 0, 0

    def __call__(self, prediction, compute_result):
        self.right += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
        self.seen += len(prediction.label_ids)
        return {"accuracy": self.right / self.seen} if compute_result else {}


def test_batched_metrics_keep_a_state_for_each_model(tmp_path):
    rows = tiny_rows(13)
    expected = tiny_trainer(tmp_path, eval_dataset=rows, compute_metrics=accuracy).evaluate()
    trainer = tiny_trainer(tmp_path, eval_dataset=rows, compute_metrics=RunningAccuracy(), batch_eval_metrics=True)
    metrics = trainer.evaluate()
    for name in ("eval_accuracy", "eval_student_accuracy"):
        assert metrics[name] == pytest.approx(expected[name])
    first = trainer.compute_metrics.right, trainer.evaluation._stateful["student"].right
    trainer.evaluate()  # this object never starts anew, so both go on, each from its own counts
    assert (trainer.compute_metrics.right, trainer.evaluation._stateful["student"].right) == (
        2 * first[0],
        2 * first[1],
    )


def test_unconcatenated_batches_reach_the_metrics_per_model(tmp_path):
    shapes = []

    def look(prediction):
        shapes.append([batch.shape for batch in prediction.predictions])
        return {}

    tiny_trainer(tmp_path, eval_dataset=tiny_rows(7), compute_metrics=look, eval_do_concat_batches=False).evaluate()
    assert shapes == [[(5, 3), (2, 3)]] * 2


def test_a_metric_of_the_user_keeps_its_name(tmp_path):
    """Also if it is the name of one of ours."""

    def mine(prediction):
        return {"agreement": -1.0, "loss": -2.0, "student_accuracy": -3.0, **accuracy(prediction)}

    trainer = tiny_trainer(tmp_path, eval_dataset=tiny_rows(6), compute_metrics=mine)
    metrics = trainer.evaluate()
    values = {
        "agreement": -1.0,
        "student_agreement": -1.0,
        "loss": -2.0,
        "student_loss": -2.0,
        "student_accuracy": -3.0,
    }
    assert {name: metrics[f"eval_{name}"] for name in values} == values
    divided = metrics_of(metrics, ["teacher", "student"])
    assert [divided[name]["agreement_metric"] for name in ("teacher", "student")] == [-1.0, -1.0]


# ---- Schedules ----


FLOORS = [
    ("ctcd", "cosine_with_min_lr", {"min_lr": 1e-3}, 2),
    ("ctcd", "cosine_warmup_with_min_lr", {"min_lr": 1e-3}, 0),
    ("ctcd", "cosine_warmup_with_min_lr", {"min_lr": 1e-3, "warmup_lr_rate": 0.1}, 2),
    ("ctcd", "polynomial", {"lr_end": 1e-3, "power": 2.0}, 2),
    ("kd", "polynomial", {"lr_end": 1e-3}, 0),
    ("ctcd", "linear", None, 0),
    ("ctcd", "reduce_lr_on_plateau", {"min_lr": 1e-3, "patience": 0, "factor": 0.3}, 0),
]


@pytest.mark.parametrize(("mode", "kind", "options", "warmup"), FLOORS)
def test_the_students_learning_rate_follows_the_schedule_of_a_training_alone(mode, kind, options, warmup, tmp_path):
    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options, "warmup_steps": warmup}
    settings["eval_strategy"] = "steps"  # for `reduce_lr_on_plateau`
    rows = tiny_rows(4)

    def rates_of(trainer):
        trainer.create_optimizer_and_scheduler(7)
        steps = []
        for _ in range(8):
            steps.append({group.get("learner"): group["lr"] for group in trainer.optimizer.param_groups})
            assert trainer.lr_scheduler.get_last_lr() == [group["lr"] for group in trainer.optimizer.param_groups]
            trainer.optimizer.step()
            trainer.lr_scheduler.step(*[1.0] * (kind == "reduce_lr_on_plateau"))
        return steps

    own = {"student_learning_rate": 4e-3, "distillation_mode": mode}
    pair = rates_of(tiny_trainer(tmp_path, eval_dataset=rows, **own, **settings))
    for learner in pair[0]:
        args = tiny_args(tmp_path, learning_rate=4e-3 if learner == "student" else 1e-2, **settings)
        alone = rates_of(Trainer(tiny_bert(2), args, eval_dataset=rows))
        assert [step[learner] for step in pair] == [step[None] for step in alone]


def test_a_floor_above_the_students_learning_rate_is_refused(tmp_path):
    floor = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3}}
    with pytest.raises(
        ValueError, match=r"`student_learning_rate=0.0005` with `lr_scheduler_type='polynomial'` and .*0.001}"
    ):
        tiny_trainer(tmp_path, student_learning_rate=5e-4, **floor).create_optimizer_and_scheduler(5)


# ---- Choosing and stopping ----


@pytest.mark.parametrize("metric", ["loss", "student_loss", "eval_student_accuracy", "agreement"])
def test_the_best_model_by_any_metric_is_loaded_for_both(metric, tmp_path):
    rows = tiny_rows(24)
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=tiny_rows(15, seed=3),
        train_dataset=rows,
        compute_metrics=accuracy,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better="loss" not in metric,
        learning_rate=5e-2,
    )
    trainer.train()
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = [log[key] for log in trainer.state.log_history if key in log]
    best = max(values) if "loss" not in metric else min(values)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()[key] == pytest.approx(best)
    step = trainer.state.best_global_step
    for model, folder in ((trainer.teacher_model, ""), (trainer.student_model, "student")):
        saved = type(model).from_pretrained(tmp_path / f"checkpoint-{step}" / folder)
        assert_same_weights(model, saved)


def test_early_stopping_watches_the_students_metric(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=tiny_rows(6),
        max_steps=20,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="student_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train()
    assert trainer.state.global_step == 4


def test_save_total_limit_treats_the_two_models_as_one(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    kept = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-5"]
    assert (tmp_path / "checkpoint-5" / "student" / "model.safetensors").is_file()


# ---- Data ----


def test_a_datasets_dataset_with_a_tokenizer_and_the_default_collator(tmp_path):
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    data = Dataset.from_dict({"text": ["a b", "c", "d e f", "g h a b"] * 4, "label": [0, 1, 2, 0] * 4})
    data = data.map(lambda row: tokenizer(row["text"]))
    models_ = [tiny_bert(n, n, vocab_size=10) for n in (3, 2)]
    trainer = CoDistillationTrainer(
        models_[0],
        tiny_args(tmp_path, train_sampling_strategy="group_by_length"),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        student_model=models_[1],
    )
    assert isinstance(trainer.data_collator, DataCollatorWithPadding)
    trainer.train()
    assert "eval_student_loss" in trainer.evaluate()


def test_a_pair_can_be_saved_and_counted_like_a_model(tmp_path):
    trainer = tiny_trainer(tmp_path)
    pair = trainer.model
    assert pair.num_parameters() == trainer.teacher_model.num_parameters() + trainer.student_model.num_parameters()
    pair.save_pretrained(tmp_path / "saved")
    assert_same_weights(type(trainer.student_model).from_pretrained(tmp_path / "saved" / "student"), tiny_bert(2, 2))


def test_keys_that_already_have_the_prefix_get_it_once(tmp_path):
    metrics = tiny_trainer(tmp_path, eval_dataset=tiny_rows(4), compute_metrics=lambda p: {"eval_f1": 0.5}).evaluate()
    assert (metrics["eval_f1"], metrics["eval_student_f1"]) == (0.5, 0.5)


def test_a_best_checkpoint_that_is_gone_is_a_warning_as_with_trainer(tmp_path):
    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == args.max_steps:
                control.should_save = False

        def on_save(self, args, state, control, **kwargs):
            shutil.rmtree(state.best_model_checkpoint)

    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=tiny_rows(4),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        callbacks=[Remove()],
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_training_logs_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, eval_dataset=tiny_rows(5), save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.evaluate()
        tiny_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [record.message for record in caplog.records if "ctcd_trainer" in record.name] == []
