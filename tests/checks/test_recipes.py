"""Recipes set what the user has not set, and say so."""

from dataclasses import replace

import pytest
from tiny import tiny_args, tiny_bert, tiny_rows, tiny_trainer
from transformers import HfArgumentParser

from ctcd_trainer import CoDistillationTrainingArguments, DistillationArguments, create_student, make_pair
from ctcd_trainer.recipes import RECIPES


def parsed(tmp_path, *words):
    parser = HfArgumentParser(CoDistillationTrainingArguments)
    return parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *words])[0]


def test_the_best_recipe_warms_up_for_as_long_as_both_are_trained(tmp_path):
    args = parsed(tmp_path, "--recipe", "best", "--num_train_epochs", "5", "--do_eval")
    assert (args.warm_start_epochs, args.warm_start_steps, args.eval_strategy) == (5.0, 0, "epoch")
    assert args.teacher_from_student_weight == "auto"
    assert args.by_recipe == {"warm_start_epochs", "eval_strategy", "teacher_from_student_weight"}
    args = parsed(tmp_path, "--recipe", "best", "--max_steps", "7")
    assert (args.warm_start_epochs, args.warm_start_steps, args.eval_strategy) == (0.0, 7, "no")
    saved = ("--load_best_model_at_end", "--save_strategy", "steps", "--do_eval")
    assert parsed(tmp_path, "--recipe", "best", *saved).eval_strategy == "steps"


def test_what_the_user_sets_stays(tmp_path):
    args = parsed(tmp_path, "--recipe", "best", "--warm_start_epochs", "0", "--eval_strategy", "steps", "--do_eval")
    assert (args.warm_start, args.eval_strategy, args.by_recipe) == (False, "steps", {"teacher_from_student_weight"})
    assert args.recipe_log[0] == "`warm_start_epochs=0.0` is yours and stays; the recipe has 3.0."
    args = parsed(tmp_path, "--recipe", "best", "--warm_start_steps", "9", "--max_steps", "7")
    assert (args.warm_start_epochs, args.warm_start_steps) == (0.0, 9)
    args = parsed(tmp_path, "--recipe", "best", "--warm_start_epochs", "2", "--max_steps", "7")
    assert (args.warm_start_epochs, args.warm_start_steps) == (2.0, 0)
    assert not parsed(tmp_path, "--recipe", "best", "--warm_start_epochs", "0", "--max_steps", "7").warm_start
    args = parsed(tmp_path, "--recipe", "paper", "--distillation_mode", "kd")
    assert args.distillation_mode == "kd"


def test_the_best_recipe_lets_the_teacher_listen_only_where_that_can_be_judged(tmp_path):
    weight = "teacher_from_student_weight"
    for words, expected in (
        (["--eval_strategy", "steps", "--eval_steps", "5"], "auto"),
        ([], 1.0),
        (["--do_eval", "--teacher_from_student_weight", "0.3"], 0.3),
        (["--do_eval", "--distillation_mode", "kd"], 0.0),
        (["--do_eval", "--teacher_hard_weight", "0"], 1.0),
        (["--do_eval", "--edges", '{"student->teacher": {"weight": 0.2}}'], 0.2),
    ):
        assert getattr(parsed(tmp_path, "--recipe", "best", *words), weight) == expected


def test_the_papers_recipe_is_the_default_without_a_warm_start(tmp_path):
    args = parsed(tmp_path, "--recipe", "paper")
    assert args.graph == parsed(tmp_path).graph
    assert not args.warm_start


def test_every_setting_is_an_argument_and_has_a_reason(tmp_path):
    args = tiny_args(tmp_path)
    for recipe in RECIPES.values():
        assert recipe.summary
        for setting in recipe.settings:
            assert hasattr(args, setting.name)
            assert setting.reason
            assert not setting.reason.endswith(".")


def test_a_recipe_is_known_and_may_be_replaced(tmp_path):
    with pytest.raises(ValueError, match="`recipe='worst'` is unknown. Valid values: best, paper"):
        tiny_args(tmp_path, recipe="worst")
    assert DistillationArguments(recipe="best").by_recipe == set()
    args = replace(replace(tiny_args(tmp_path), recipe="best"), seed=1)
    assert (args.warm_start_steps, args.by_recipe) == (5, {"warm_start_steps"})
    assert not replace(args, warm_start_epochs=0.0, warm_start_steps=0).warm_start


def test_the_trainer_tells_what_the_recipe_has_set(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, recipe="best", student_model=lambda teacher: create_student(teacher, 2))
    assert (
        caplog.text.count("`recipe='best'` has set what you have not:\n  `warm_start_steps=5`: the student is m") == 1
    )
    assert trainer.train().metrics["warm_start_steps"] == 5


def test_without_a_function_the_warm_start_of_a_recipe_is_left_out(tmp_path, caplog):
    teacher = tiny_bert(3)
    trainer = tiny_trainer(tmp_path, recipe="best", model=teacher, student_model=create_student(teacher, 2))
    assert "The warm start of `recipe='best'` is left out: it needs a student that is made from the" in caplog.text
    assert "warm_start_steps" not in trainer.train().metrics
    args = tiny_args(tmp_path, recipe="best")
    assert make_pair(teacher, create_student(teacher, 2), args).student is not None
    tiny_trainer(tmp_path, recipe="best", eval_strategy="epoch", eval_dataset=tiny_rows(4))
