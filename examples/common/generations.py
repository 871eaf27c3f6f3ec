"""Generations of pairs in the example scripts: `--generations N`."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from ctcd_trainer import (
    CoDistillationTrainer,
    CoDistillationTrainingArguments,
    Generation,
    train_generations,
)
from ctcd_trainer.generations import metric_key
from ctcd_trainer.graph import STUDENT, TEACHER

from .arguments import STUDENT_SIZES, ModelArguments
from .models import load_models
from .tables import padded


def make_or_train(
    make_trainer: Callable[[Mapping[str, Any], CoDistillationTrainingArguments], CoDistillationTrainer],
    models: Mapping[str, Any],
    load: Callable[..., PreTrainedModel],
    model_args: ModelArguments,
    training_args: CoDistillationTrainingArguments,
) -> CoDistillationTrainer:
    """Make the trainer; with several generations, train them first and make the trainer of their best models.

    Every generation is trained with the arguments of the script. From the second one on, the frozen best teacher of
    the earlier ones teaches both models, with weights of 1. The best models are saved in the output folder.

    Args:
        make_trainer: Makes a trainer of models, by the argument that takes them, and of arguments.
        models: The models of the script.
        load: Loads a model, given the name of the argument that names it, whether it is frozen, and `model_args`.
        model_args: The arguments.
        training_args: The arguments.
    """
    if model_args.generations == 1 or not training_args.do_train:
        return make_trainer(models, training_args)

    def make(generation: Generation) -> CoDistillationTrainer:
        args = replace(training_args, output_dir=generation.output_dir, push_to_hub=False)
        if args.pretrained_cache_dir is not None:  # of one frozen teacher
            folder = os.path.join(args.pretrained_cache_dir, f"generation-{generation.number}")
            args = replace(args, pretrained_cache_dir=folder)
        own = model_args
        if generation.source is not None:
            own = replace(model_args, pretrained_teacher_name_or_path=generation.source)
            args = replace(args, **{f"{learner}_from_pretrained_weight": 1.0 for learner in args.graph.trained})
        return make_trainer(load_models(own, args, partial(load, model_args=own)), args)

    metric = training_args.metric_for_best_model or "loss"
    found = train_generations(
        make, model_args.generations, training_args.output_dir, metric, training_args.greater_is_better
    )
    sizes = {f"student_{name}": None for name in STUDENT_SIZES}
    best = replace(
        model_args,
        **sizes,
        student_layers="uniform",
        student_init="copy",
        model_name_or_path=found.folders[TEACHER],
        student_model_name_or_path=found.folders.get(STUDENT),
    )
    no_warm_start = {"warm_start_epochs": 0.0, "warm_start_steps": 0, "warm_start_learning_rate": None}
    args = replace(training_args, do_train=False, **no_warm_start)
    trainer = make_trainer(load_models(best, args, partial(load, model_args=best)), args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        rows = [["generation", "teacher", "student"]]
        for number, metrics in enumerate(found.metrics, 1):
            keys = {learner: metric_key(metric, learner, metrics) for learner in (TEACHER, STUDENT)}
            marks = {learner: "*" if found.best.get(learner) == number else "" for learner in keys}
            rows.append([str(number), *(f"{metrics[k]:.4f}{marks[n]}" for n, k in keys.items() if k in metrics)])
        lines = "\n".join("  ".join(row) for row in padded(rows, texts=1))
        print(f"\n{metric} of each generation (* the best)\n{lines}")
    return trainer
