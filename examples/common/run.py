"""The course of a run, the same in all example scripts: train, evaluate, predict, write the cards, print a table."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.model_structure import count_parameters

from .arguments import DataArguments
from .tables import padded


def train(trainer: CoDistillationTrainer, checkpoint: str | bool | None) -> dict[str, float]:
    """Train, save both models, write `train_results.json` and `trainer_state.json`, and return the metrics."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if isinstance(trainer.train_dataset, Sized):
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def evaluate(
    trainer: CoDistillationTrainer,
    parts: Mapping[str, Dataset | IterableDataset] | None = None,
    more_metrics: Callable[[dict[str, float]], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Evaluate both models, write `eval_results.json`, and return the metrics.

    Args:
        trainer: The trainer.
        parts: The data sets by the end of the names of their metrics (`_mm` for MNLI's second one). By default the
            trainer's evaluation set, with nothing added to the names.
        more_metrics: Computes further metrics from the metrics of a data set.
    """
    combined: dict[str, float] = {}
    for suffix, dataset in (parts or {"": trainer.eval_dataset}).items():
        metrics = trainer.evaluate(eval_dataset=dataset)
        metrics |= more_metrics(metrics) if more_metrics is not None else {}
        if isinstance(dataset, Sized):
            metrics["eval_samples"] = len(dataset)
        metrics = {f"{key}{suffix}": value for key, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        combined |= metrics
    trainer.save_metrics("eval", combined)
    return combined


def finish(
    trainer: CoDistillationTrainer,
    metrics: Mapping[str, float],
    card: Mapping[str, Any],
    training: Mapping[str, float] | None = None,
) -> None:
    """Write the model cards or push both models (`--push_to_hub`), and print the models side by side.

    Args:
        trainer: The trainer.
        metrics: The metrics of `evaluate`; may be empty.
        card: Task and data for the model cards: arguments of `Trainer.create_model_card`.
        training: The metrics of `train`.
    """
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        print(f"\n{table(trainer, metrics)}")
        costs = training or {}
        if "warm_start_steps" in costs:
            print(
                f"\nThe teacher alone: {costs['warm_start_steps']} steps in {costs['warm_start_runtime']:.1f} s. Then "
                f"both: {trainer.state.global_step} steps in {costs['train_runtime']:.1f} s."
            )


def run(
    trainer: CoDistillationTrainer,
    checkpoint: str | bool | None,
    card: Mapping[str, Any],
    predict: Callable[[], None] | None = None,
    **evaluation: Any,
) -> None:
    """Do what the training arguments ask for, and finish.

    Args:
        trainer: The trainer.
        checkpoint: Checkpoint to resume from.
        card: See `finish`.
        predict: Writes the predictions of the test set.
        **evaluation: Further arguments of `evaluate`.
    """
    training = train(trainer, checkpoint) if trainer.args.do_train else None
    metrics = evaluate(trainer, **evaluation) if trainer.args.do_eval else {}
    if trainer.args.do_predict and predict is not None:
        predict()
    finish(trainer, metrics, card, training)


@contextmanager
def in_order(trainer: CoDistillationTrainer) -> Iterator[None]:
    """Keep Trainer from grouping the rows by length, which changes the order of predictions."""
    args = trainer.args
    trainer.args = copy.copy(args)
    trainer.args.train_sampling_strategy = "sequential"
    try:
        yield
    finally:
        trainer.args = args


def padding_multiple(training_args: TrainingArguments) -> int | None:
    """Pad batches to a multiple of 8 in half precision: tensor cores compute such sizes fastest."""
    return 8 if training_args.fp16 or training_args.bf16 else None


def card_of(data_args: DataArguments, task: str) -> dict[str, Any]:
    """Task, data and baseline for the model cards: arguments of `create_model_card`."""
    name, config = data_args.dataset_name, data_args.dataset_config_name
    card = {"tasks": task, "baseline": data_args.baseline}
    if name is None:
        return card
    card |= {"dataset": " ".join(filter(None, (os.path.basename(os.path.normpath(name)), config)))}
    if not os.path.isdir(name):  # on the Hub
        card |= {"dataset_tags": name, "dataset": " ".join(filter(None, (name, config)))}
        card |= {"dataset_args": config} if config is not None else {}
    return card


def table(trainer: CoDistillationTrainer, metrics: Mapping[str, float]) -> str:
    """The models side by side: parameters, each metric of the evaluation, and their agreement."""
    models = {"teacher": trainer.teacher_model, "student": trainer.student_model}
    models = {name: model for name, model in models.items() if model is not None}
    millions = (count_parameters(model) / 1e6 for model in models.values())
    rows = [["", *(models if len(models) > 1 else ["model"])], ["parameters (M)", *(f"{n:.2f}" for n in millions)]]
    skipped = ("eval_student_", "eval_runtime", "eval_samples", "eval_steps", "eval_model_preparation_time")
    for key, value in metrics.items():
        if key.startswith("eval_") and not key.startswith((*skipped, "eval_agreement")):
            student = metrics.get(key.replace("eval_", "eval_student_", 1))
            values = (value,) if student is None else (value, student)
            rows.append([key.removeprefix("eval_"), *(f"{x:.4f}" for x in values)])
    rows += [[k.removeprefix("eval_"), f"{v:.4f}"] for k, v in metrics.items() if k.startswith("eval_agreement")]
    return "\n".join("  ".join(line) for line in padded(rows, texts=1, width=10))
