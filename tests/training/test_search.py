"""Hyperparameter search: every value of a trial has the effect that it has in a training with that argument."""

import os
import sys

import pytest
from tiny import assert_same_weights, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from transformers import Trainer
from transformers.trainer_utils import default_compute_objective

from ctcd_trainer.arguments import DistillationArguments
from ctcd_trainer.training.search import DEFAULT_SPACE, default_space, objective

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def models(**options) -> dict:
    return {
        "model_init": lambda: tiny_bert(3, seed=1),
        "student_model_init": lambda: tiny_bert(2, seed=2),
        "eval_dataset": tiny_rows(seed=1),
        **options,
    }


def searched(folder, space=None, n_trials=1, **options):
    """The trainer after a search, the best run, and the models and metrics of the trials in turn."""
    trials = []
    compute_objective = options.pop("compute_objective", None)
    direction = options.pop("direction", None)
    trainer = tiny_trainer(folder, **models(**options))
    evaluate = trainer.evaluate

    def remember(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        trials.append((trainer.pair, metrics))
        return metrics

    trainer.evaluate = remember
    best = trainer.hyperparameter_search(
        space, compute_objective, n_trials, direction, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    return trainer, best, trials


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_from_teacher_weight", 0.3),
        ("teacher_from_student_weight", 0.0),
        ("student_hard_weight", 0.25),
        ("temperature", 3.0),
        ("soft_warmup_ratio", 0.5),
        ("student_learning_rate", 1e-3),
        ("learning_rate", 1e-3),
        ("distillation_mode", "standalone"),
        ("distillation_mode", "kd"),
        ("soft_loss", "js"),
    ],
)
def test_a_trial_equals_a_training_with_its_value(name, value, tmp_path):
    _, best, ((pair, metrics),) = searched(tmp_path, lambda trial: {name: trial.suggest_categorical(name, [value])})
    assert best.hyperparameters == {name: value}
    expected = tiny_trainer(tmp_path / "expected", **models(), **{name: value})
    expected.train()
    assert_same_weights(pair, expected.pair)
    plain = tiny_trainer(tmp_path / "plain", **models())
    plain.train()
    assert expected.evaluate()["eval_student_loss"] != pytest.approx(plain.evaluate()["eval_student_loss"]) or (
        expected.evaluate()["eval_loss"] != pytest.approx(plain.evaluate()["eval_loss"])
    )
    assert metrics["eval_loss"] == expected.evaluate()["eval_loss"]


def test_a_whole_number_does_not_round_the_values_of_a_trial(tmp_path):
    space = lambda trial: {"temperature": trial.suggest_categorical("temperature", [2.7])}  # noqa: E731
    trainer, _, _ = searched(tmp_path, space, temperature=2, max_steps=1)
    assert trainer.args.temperature == 2.7


def test_the_weights_that_are_not_searched_follow_the_mode(tmp_path):
    space = lambda trial: {"student_from_teacher_weight": trial.suggest_float("student_from_teacher_weight", 0.1, 0.9)}  # noqa: E731
    trainer, _, _ = searched(tmp_path, space, n_trials=2)
    assert trainer.args.teacher_from_student_weight == 1.0
    weights = {edge.weight_name: edge.weight for edge in trainer.graph.edges}
    assert 0.1 <= weights["student_from_teacher_weight"] <= 0.9


@pytest.mark.parametrize(
    ("options", "objective", "better"),
    [
        ({}, lambda m: m["eval_loss"] + m["eval_student_loss"], min),
        ({"distillation_mode": "kd"}, lambda m: m["eval_student_loss"], min),
        ({"metric_for_best_model": "student_loss", "greater_is_better": False}, lambda m: m["eval_student_loss"], min),
        ({"metric_for_best_model": "agreement", "greater_is_better": True}, lambda m: m["eval_agreement"], max),
        ({"compute_objective": lambda m: -m["eval_loss"], "direction": "maximize"}, lambda m: -m["eval_loss"], max),
    ],
)
def test_the_objective_is_of_either_model_or_of_both(options, objective, better, tmp_path):
    _, best, trials = searched(tmp_path, n_trials=3, **options)
    assert len(trials) == 3
    values = [objective(metrics) for _, metrics in trials]
    assert len(set(values)) > 1
    assert best.objective == pytest.approx(better(values))


@pytest.mark.parametrize(
    ("mode", "without"),
    [
        ("ctcd", {"student_from_pretrained_weight", "teacher_from_pretrained_weight"}),
        ("kd", {"learning_rate", "teacher_from_student_weight"}),
        ("standalone", {"temperature", "soft_warmup_ratio", "student_from_teacher_weight"}),
    ],
)
def test_the_default_space_is_of_what_has_an_effect(mode, without, tmp_path):
    trainer, best, _ = searched(tmp_path, distillation_mode=mode)
    assert not without & best.hyperparameters.keys()
    assert {"student_learning_rate"} <= best.hyperparameters.keys() <= DEFAULT_SPACE.keys()
    for name, value in best.hyperparameters.items():
        assert DEFAULT_SPACE[name].low <= value <= DEFAULT_SPACE[name].high
        assert getattr(trainer.args, name) == value


def test_the_default_space_leaves_settings_of_edges_alone(tmp_path):
    edges = {"teacher->student": {"temperature": 2.0, "schedule": "fall:0.4"}, "student->teacher": {"weight": 0.3}}
    edges["student->teacher"] |= {"temperature": 1.0, "schedule": "constant"}
    args = tiny_args(tmp_path, edges=edges, student_from_teacher_weight="auto")
    assert default_space(args.graph, args).keys() == {"learning_rate", "student_learning_rate"}


def test_a_trial_may_let_held_out_rows_set_a_weight(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "model_init": lambda: tiny_bert(1)}
    options |= {"student_model_init": lambda: tiny_bert(1), "eval_dataset": tiny_rows(6)}
    trainer = tiny_trainer(tmp_path, **options)

    def space(trial):
        names = {"teacher_from_student_weight": ["auto"], "student_from_teacher_schedule": ["fall:1.0"]}
        names["edges"] = ['{"student->teacher": {"gate": "wsl"}}']
        return {name: trial.suggest_categorical(name, values) for name, values in names.items()}

    trainer.hyperparameter_search(space, n_trials=1, backend="optuna", direction="minimize")
    assert [(e.auto, e.schedule, e.gate) for e in trainer.graph.edges] == [
        *((False, "fall:1.0", "none"), (True, "constant", "wsl")),
    ]
    assert "teacher_from_student" in trainer.pair.objective.held_out.weights


def test_a_trial_can_choose_the_size_of_the_student(tmp_path):
    layers = lambda trial: tiny_bert(2 if trial is None else trial.suggest_int("layers", 1, 1), seed=2)  # noqa: E731
    _, best, ((pair, _),) = searched(tmp_path, lambda trial: {}, student_model_init=layers)
    assert pair.student.config.num_hidden_layers == 1
    assert best.hyperparameters == {"layers": 1}


def test_values_that_are_not_valid_end_the_search(tmp_path):
    with pytest.raises(ValueError, match=r"`temperature=0.0` is not valid"):
        searched(tmp_path, lambda trial: {"temperature": trial.suggest_categorical("temperature", [0.0])})


def test_a_metric_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(KeyError, match=r"metric_for_best_model='student_f1'.*eval_student_f1.*eval_student_loss"):
        searched(tmp_path, metric_for_best_model="student_f1")


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize(("direction", "better"), [("maximize", max), ("minimize", min)])
def test_by_default_all_metrics_of_both_models_are_summed(direction, better, tmp_path):
    space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 3e-1, log=True)}  # noqa: E731
    options = {"compute_metrics": accuracy, "eval_dataset": tiny_rows(30, seed=1), "max_steps": 4}
    _, best, trials = searched(tmp_path, space, n_trials=3, direction=direction, **options)
    values = [metrics["eval_accuracy"] + metrics["eval_student_accuracy"] for _, metrics in trials]
    assert len(set(values)) > 1
    assert best.objective == pytest.approx(better(values))
    with pytest.raises(ValueError, match=r"`direction` is None.*'maximize' or 'minimize'"):
        searched(tmp_path, space, **options)


def test_the_default_objective_is_trainers_without_our_own_metrics():
    users = {"eval_f1": 0.5, "eval_student_f1": 0.25, "eval_hinge_loss": 3.0}
    ours = {"eval_loss": "teacher", "eval_student_loss": "student", "eval_agreement": None, "eval_perplexity": None}
    metrics = dict.fromkeys(ours, 100.0) | {"epoch": 2.0, "eval_runtime": 7.0, "eval_samples_per_second": 9.0}
    graph = DistillationArguments().graph
    assert objective(metrics | users, None, graph, ours) == default_compute_objective(users) == 3.75
    assert objective(metrics, None, graph, ours) == 200.0
    assert objective(metrics, None, DistillationArguments(distillation_mode="kd").graph, ours) == 100.0
    with pytest.raises(KeyError, match="no metric and no loss"):
        objective({"epoch": 1.0}, None, graph, ours)


def test_without_a_student_it_is_trainers_search(tmp_path):
    from ctcd_trainer import CoDistillationTrainer

    found = []
    for cls in (Trainer, CoDistillationTrainer):
        args = tiny_args(tmp_path, distillation_mode="standalone")
        trainer = cls(
            args=args, model_init=lambda: tiny_bert(2), train_dataset=tiny_rows(), eval_dataset=tiny_rows(seed=1)
        )
        space = {"learning_rate": 1e-3}
        best = trainer.hyperparameter_search(lambda trial, space=space: dict(space), n_trials=1, backend="optuna")
        found.append(best.objective)
    assert found[0] == found[1]


@pytest.mark.slow
def test_ray_searches_the_default_space_and_a_trial_equals_a_training_with_its_values(tmp_path, monkeypatch):
    """In processes of its own, to which trainer, models and data are sent."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: whatever else runs would come first
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the modules of the tests, over there
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.tune")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        settings = {"max_steps": 2, "metric_for_best_model": "student_loss", "greater_is_better": False}
        trainer = tiny_trainer(tmp_path / "out", **models(), **settings)
        best = trainer.hyperparameter_search(
            n_trials=2, backend="ray", storage_path=str(tmp_path / "ray"), reuse_actors=True, verbose=0
        )
    finally:
        ray.shutdown()
    without = {"student_from_pretrained_weight", "teacher_from_pretrained_weight"}
    assert best.hyperparameters.keys() == DEFAULT_SPACE.keys() - without
    for name, value in best.hyperparameters.items():
        assert DEFAULT_SPACE[name].low <= value <= DEFAULT_SPACE[name].high
    trials = best.run_summary.results_df
    assert len(trials) == 2
    assert best.objective == trials["objective"].min()
    expected = tiny_trainer(tmp_path / "expected", **models(), **settings, **best.hyperparameters)
    expected.train()
    assert best.objective == pytest.approx(expected.evaluate()["eval_student_loss"], rel=1e-5)
