"""The arguments: defaults, the table of modes, the command line, and errors that name argument, value and remedy."""

import dataclasses
import json
import math
import pickle
from contextlib import nullcontext

import pytest
from transformers import HfArgumentParser, TrainingArguments

from ctcd_trainer import CoDistillationTrainingArguments
from ctcd_trainer.arguments import greater_is_better, learner_arguments
from ctcd_trainer.checks.arguments import check_arguments
from ctcd_trainer.graph import MODES, Edge
from ctcd_trainer.soft_losses import SOFT_LOSSES

EDGE_WEIGHTS = (
    "student_from_teacher_weight",
    "teacher_from_student_weight",
    "student_from_pretrained_weight",
    "teacher_from_pretrained_weight",
)


def make(tmp_path, **options):
    return CoDistillationTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_it_is_a_training_arguments_with_the_documented_defaults():
    assert issubclass(CoDistillationTrainingArguments, TrainingArguments)
    own = {f.name: f.default for f in dataclasses.fields(CoDistillationTrainingArguments)}
    for field in dataclasses.fields(TrainingArguments):
        del own[field.name]
    assert own == {
        "distillation_mode": "ctcd",
        "recipe": None,
        "teacher_hard_weight": 1.0,
        "student_hard_weight": 1.0,
        **dict.fromkeys(EDGE_WEIGHTS),
        **dict.fromkeys(name.replace("_weight", f"_{what}") for name in EDGE_WEIGHTS for what in ("schedule", "gate")),
        "edges": None,
        "ensemble": None,
        "ensemble_of": "logits",
        "average_decay": 0.999,
        "temperature": 1.0,
        "soft_loss": "kl",
        "soft_warmup_ratio": 0.0,
        "warm_start_epochs": None,
        "warm_start_steps": 0,
        "warm_start_learning_rate": None,
        "student_feature_weight": 0.0,
        "feature_loss": "hidden",
        "feature_layers": None,
        "feature_source": "teacher",
        "student_learning_rate": None,
        "student_weight_decay": None,
        "student_max_grad_norm": None,
        "share": None,
        "fused_lm_head": True,
        "pretrained_cache_dir": None,
        "student_metric_for_best_model": None,
        "student_greater_is_better": None,
        "student_hub_model_id": None,
    }


@pytest.mark.parametrize(
    ("mode", "weights", "trained"),
    [
        ("standalone", (0, 0, 0, 0), {"teacher", "student"}),
        ("kd", (1, 0, 0, 0), {"student"}),
        ("reversed", (0, 1, 0, 0), {"teacher"}),
        ("ctcd", (1, 1, 0, 0), {"teacher", "student"}),
        ("community", (1, 1, 1, 1), {"teacher", "student"}),
    ],
)
def test_the_mode_fills_the_weights_that_are_not_given(mode, weights, trained, tmp_path):
    args = make(tmp_path, distillation_mode=mode)
    assert tuple(getattr(args, name) for name in EDGE_WEIGHTS) == weights
    assert set(args.graph.trained) == trained


def test_a_weight_that_is_given_wins_over_the_mode(tmp_path):
    args = make(tmp_path, student_from_teacher_weight=0.25, teacher_from_student_weight=0.0)
    assert (args.student_from_teacher_weight, args.teacher_from_student_weight) == (0.25, 0.0)
    assert [(e.source, e.learner, e.weight) for e in args.graph.edges] == [("teacher", "student", 0.25)]


def test_it_parses_from_the_command_line(tmp_path):
    parser = HfArgumentParser(CoDistillationTrainingArguments)
    own = {"distillation_mode": "kd", "temperature": "2.5", "soft_loss": "js", "student_learning_rate": "1e-4"}
    common = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": "true"}
    line = [word for name, value in {**own, **common}.items() for word in (f"--{name}", value)]
    (args,) = parser.parse_args_into_dataclasses(line)
    assert (args.distillation_mode, args.temperature, args.soft_loss) == ("kd", 2.5, "js")
    assert (args.student_learning_rate, args.student_from_teacher_weight) == (1e-4, 1.0)


def test_the_help_of_the_command_line_names_every_mode_and_soft_loss():
    text = HfArgumentParser(CoDistillationTrainingArguments).format_help()
    assert f"{{{','.join(MODES)}}}" in text
    assert f"{{{','.join(SOFT_LOSSES)}}}" in text
    text = " ".join(text.split())
    for entry in (*MODES.values(), *SOFT_LOSSES.values()):
        assert entry.summary in text
    with pytest.raises(SystemExit):
        HfArgumentParser(CoDistillationTrainingArguments).parse_args(["--distillation_mode", "mutual"])


@pytest.mark.parametrize("name", ["temperature", "soft_warmup_ratio", "student_hard_weight", "student_learning_rate"])
def test_whole_numbers_become_floats_as_a_search_gives_new_values_the_type_of_the_old(name, tmp_path):
    """Trainer casts the value of a trial with `type(old)`: 2.7 became 2 where the temperature was given as 2."""
    args = make(tmp_path, **{name: 1})
    assert type(getattr(args, name)) is float
    assert isinstance(make(tmp_path, student_from_teacher_weight=2).student_from_teacher_weight, float)


def test_every_own_argument_has_a_help_text():
    for field in dataclasses.fields(CoDistillationTrainingArguments):
        if field.name not in TrainingArguments.__dataclass_fields__:
            assert len(field.metadata["help"]) > 20


@pytest.mark.parametrize("name", ["teacher_hard_weight", "student_hard_weight", *EDGE_WEIGHTS])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_negative_or_not_finite_weights_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"`{name}={value}` is not valid: it must be a finite number of 0 or more"):
        make(tmp_path, **{name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match=rf"`temperature={value}` is not valid: .* above 0"):
        make(tmp_path, temperature=value)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_warmup_ratio_outside_of_0_to_1_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match=rf"`soft_warmup_ratio={value}` is not valid: .* from 0 to 1"):
        make(tmp_path, soft_warmup_ratio=value)


def test_an_unknown_mode_lists_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="'mutual'` is unknown.*community, ctcd, kd, reversed, standalone"):
        make(tmp_path, distillation_mode="mutual")


def test_an_unknown_soft_loss_lists_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="'cosine'` is unknown.*js, kl, mse, reverse_kl"):
        make(tmp_path, soft_loss="cosine")


def test_all_weights_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Nothing would be trained.*'ctcd'.*teacher, student.*above 0"):
        make(
            tmp_path,
            teacher_hard_weight=0,
            student_hard_weight=0,
            student_from_teacher_weight=0,
            teacher_from_student_weight=0,
        )
    with pytest.raises(ValueError, match="Nothing would be trained.*'kd'"):
        make(tmp_path, distillation_mode="kd", student_hard_weight=0, student_from_teacher_weight=0)


def test_a_weight_into_a_model_that_the_mode_freezes_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`teacher_from_student_weight=0.5` has no effect.*'kd'` freezes the teacher"
    ):
        make(tmp_path, distillation_mode="kd", teacher_from_student_weight=0.5)


def test_arguments_of_a_learner_are_a_view_that_leaves_the_users_object_alone(tmp_path):
    args = make(tmp_path, learning_rate=1e-3, student_learning_rate=2e-3, student_max_grad_norm=0.0)
    view = learner_arguments(args, "student")
    assert (view.learning_rate, view.weight_decay, view.max_grad_norm) == (2e-3, args.weight_decay, 0.0)
    assert args.learning_rate == 1e-3
    assert learner_arguments(args, "teacher") is args


def test_weights_that_the_mode_filled_follow_the_mode(tmp_path):
    args = make(tmp_path, student_from_teacher_weight=0.5)
    kd = dataclasses.replace(args, distillation_mode="kd")
    assert (kd.student_from_teacher_weight, kd.teacher_from_student_weight) == (0.5, 0.0)
    args.distillation_mode = "standalone"  # as a hyperparameter search sets it
    assert [(edge.source, edge.learner, edge.weight) for edge in args.graph.edges] == [("teacher", "student", 0.5)]
    json.dumps(args.to_dict())
    assert pickle.loads(pickle.dumps(args)).graph == args.graph


def test_a_hard_weight_of_a_model_that_the_mode_freezes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`teacher_hard_weight=5.0` has no effect.*'kd'` freezes the teacher"):
        make(tmp_path, distillation_mode="kd", teacher_hard_weight=5.0)
    make(tmp_path, distillation_mode="kd", teacher_hard_weight=0.0)


@pytest.mark.parametrize("value", ["5e-5", True])
def test_what_is_no_number_is_refused_and_shown_as_it_is(value, tmp_path):
    with pytest.raises(ValueError, match=f"`student_learning_rate={value!r}` is not valid"):
        make(tmp_path, student_learning_rate=value)


# ---- The direction of a metric ----


@pytest.mark.parametrize(
    ("greater", "metrics"),
    [
        (True, "accuracy eval_student_accuracy mnli_mm_accuracy f1 f1_macro eval_second_student_f1-weighted roc_auc"),
        (True, "matthews_correlation spearmanr combined_score rougeL bleu4 recall@10 map_50 exact_match HasAns_f1"),
        (True, "agreement r2_score top_5_accuracy win_rate log_likelihood"),
        (False, "loss eval_loss second_student_loss logloss perplexity student_perplexity eval_ppl nll wer cer ter"),
        (False, "error_rate word_error_rate mean_squared_error mse RMSE mae brier_score bits_per_byte eer hamming"),
        (False, "negative_log_likelihood hinge_loss kl_divergence"),
        (
            None,
            "score rate neg_mean_squared_error neg_log_loss accuracy_std error_reduction loss_gap my_number matches",
        ),
    ],
)
def test_the_direction_of_a_metric_is_known_by_its_name_or_not_at_all(greater, metrics):
    assert {name: greater_is_better(name) for name in metrics.split()} == dict.fromkeys(metrics.split(), greater)


def test_the_best_model_has_the_smallest_perplexity(tmp_path):
    args = make(tmp_path, metric_for_best_model="student_perplexity")
    assert args.greater_is_better is False
    assert make(tmp_path, metric_for_best_model="perplexity", greater_is_better=True).greater_is_better is True
    assert make(tmp_path, metric_for_best_model="score", greater_is_better=True).greater_is_better is True
    assert (
        make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps").metric_for_best_model
        == "loss"
    )


@pytest.mark.parametrize("prefix", ["", "student_"])
def test_a_metric_of_unknown_direction_asks_for_it(prefix, tmp_path):
    message = rf"`{prefix}metric_for_best_model='score'`.*`{prefix}greater_is_better` to True or False"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **{f"{prefix}metric_for_best_model": "score"})


@pytest.mark.parametrize(
    ("metric", "later", "refused"),
    [
        (
            "perplexity",
            None,
            "`greater_is_better=True`: a smaller value is the better one. Set .*=False`",
        ),
        (None, "accuracy", "`greater_is_better=None`: a larger value is"),
        (None, "score", "`greater_is_better=None`: it is not known"),
        ("score", None, None),  # with `TrainingArguments`, it may be the user who has said it
        (None, "perplexity", None),  # None counts as False
    ],
)
def test_a_wrong_guess_of_trainer_is_refused_for_a_pair(metric, later, refused, tmp_path):
    args = TrainingArguments(str(tmp_path), metric_for_best_model=metric, use_cpu=True)
    args.metric_for_best_model = later or metric
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        check_arguments(args)


def test_settings_of_edges_are_read_from_python_json_and_the_command_line(tmp_path):
    settings = {"student -> teacher": {"rows": "all", "temperature": 2.0, "soft_loss": "js", "gate": "wsl"}}
    settings["teacher->student"] = {"weight": "auto", "schedule": "fall:0.4"}
    args = make(tmp_path, edges=settings, teacher_from_student_weight=0.3)
    parser = HfArgumentParser(CoDistillationTrainingArguments)
    line = ["--output_dir", str(tmp_path), "--edges", json.dumps(settings), "--teacher_from_student_weight", "0.3"]
    parsed = parser.parse_args_into_dataclasses(line)[0]
    short = parser.parse_dict(
        {
            "output_dir": str(tmp_path),
            "edges": {"student->teacher": {"rows": "all", "temperature": 2.0, "soft_loss": "js"}},
            "teacher_from_student_gate": "wsl",
            "student_from_teacher_weight": "auto",
            "student_from_teacher_schedule": "fall:0.4",
            "teacher_from_student_weight": "0.3",
        }
    )[0]
    expected = (
        Edge("teacher", "student", 1.0, auto=True, schedule="fall:0.4"),
        Edge("student", "teacher", 0.3, gate="wsl", temperature=2.0, soft_loss="js"),
    )
    for each in (args, parsed, short, dataclasses.replace(args), pickle.loads(pickle.dumps(parsed))):
        assert each.graph.edges == expected
        assert each.student_from_teacher_weight == "auto"
        assert each.teacher_from_student_weight == 0.3
        json.dumps(each.to_dict())
    changed = dataclasses.replace(args, edges={"teacher->student": {"weight": 0.5}})
    assert (changed.student_from_teacher_weight, changed.teacher_from_student_weight) == (0.5, 0.3)
    assert dataclasses.replace(parsed, edges=None).student_from_teacher_weight == 1.0


def test_by_default_a_teacher_learns_from_its_student_on_labelled_rows(tmp_path):
    rows = lambda **options: {edge.name: edge.rows for edge in make(tmp_path, **options).graph.edges}  # noqa: E731
    community = rows(distillation_mode="community")
    assert {name for name, kind in community.items() if kind == "labelled"} == {"teacher_from_student"}
    assert set(rows(teacher_hard_weight=0.0).values()) == {"all"}


def test_the_warm_up_is_the_schedule_of_all_edges_without_another_one(tmp_path):
    args = make(tmp_path, soft_warmup_ratio=0.1, student_from_teacher_schedule="constant")
    assert [edge.schedule for edge in args.graph.edges] == ["constant", "rise:0.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": "{"}, r"`edges='{'` is not valid. Give settings .*\"student->teacher\""),
        ({"edges": ["student"]}, "is not valid. Give settings"),
        (
            {"edges": {"a->b": {}}},
            "unknown edge 'a->b'. Valid names: teacher->student, student->teacher, pretrained->",
        ),
        (
            {"edges": {"student->teacher": {"gates": "wsl"}}},
            "unknown setting 'gates'. Valid names: weight, schedule, g",
        ),
        ({"edges": {"student->teacher": {"gate": "x"}}}, r"\['gate'\]='x'` is not valid. Valid values: none, correct"),
        ({"edges": {"student->teacher": {"gate": []}}}, "Valid values: none, correct, wsl, confident"),
        ({"edges": {"student->teacher": {"rows": "some"}}}, "Valid values: all, labelled, unlabelled"),
        ({"edges": {"student->teacher": {"temperature": 0}}}, "Valid values: a number above 0"),
        ({"edges": {"student->teacher": {"soft_loss": "l1"}}}, "Valid values: js, kl, mse, reverse_kl"),
        ({"edges": {"student->teacher": {"weight": -1}}}, "Valid values: a number of 0 or more, or 'auto'"),
        ({"edges": {"student->teacher": {"schedule": "up"}}}, "'up' is no schedule. Valid forms.*window:0.1-0.5"),
        ({"teacher_from_student_schedule": "fall:2"}, "`teacher_from_student_schedule='fall:2'` is not valid"),
        ({"teacher_from_student_gate": "all"}, "`teacher_from_student_gate='all'` is not valid"),
        ({"teacher_from_student_weight": "much"}, "'much'` is not valid: .* of 0 or more, or 'auto'"),
        (
            {"edges": {"student->teacher": {"gate": "wsl"}}, "teacher_from_student_gate": "correct"},
            r"`teacher_from_student_gate='correct'` contradicts `edges\['student->teacher'\]\['gate'\]='wsl'`",
        ),
        (
            {"edges": {"student->teacher": {"weight": 0.5}}, "teacher_from_student_weight": "auto"},
            "`teacher_from_student_weight='auto'` contradicts",
        ),
        (
            {"distillation_mode": "kd", "edges": {"student->teacher": {"gate": "wsl"}}},
            r"`edges\['student->teacher'\]` has no effect: `teacher_from_student_weight` is 0 .*'kd'.*->student",
        ),
        ({"distillation_mode": "kd", "teacher_from_student_weight": "auto"}, "freezes the teacher"),
        ({"student_from_pretrained_schedule": "fall:0.5"}, "`student_from_pretrained_schedule` has no effect"),
        (
            {"teacher_from_student_weight": "auto", "teacher_hard_weight": 0.0},
            "`teacher_from_student_weight='auto'` is a multiple of `teacher_hard_weight`, which is 0",
        ),
    ],
)
def test_settings_of_edges_that_are_not_valid_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)
