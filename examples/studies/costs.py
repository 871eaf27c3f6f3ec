"""Costs of the variants of a study: parameters, latency, and time and memory of a step of training.

The rows are random tokens of one length. Three things are measured on the CPU:

1. The latency of the students and of the teacher for one sequence, all of them in turns. Adapters are merged first.
2. One optimizer step of each variant, in turns with a step of the reference, so that other work of the machine slows
   both equally. The reference against itself shows the noise.
3. The peak memory of a few steps of each variant, in a separate process, without that of the imports.

Example:
    python -m examples.studies.costs examples/studies/choices.yaml --reference "first 3 layers" \
        --output docs/results/choices-costs.json
"""

import argparse
import copy
import datetime
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    default_data_collator,
)

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments
from ctcd_trainer.graph import TEACHER
from ctcd_trainer.model_structure import count_parameters, is_peft_model
from ctcd_trainer.students.costs import measure_latencies
from examples.benchmarks.measuring import describe_machine, in_turns, optimizer_step
from examples.benchmarks.peaks import peak_memory_of
from examples.common.arguments import LabelledModelArguments
from examples.common.models import load_model, load_models

from .study import load_study

MEMORY_STEPS = 3


def make_trainer(arguments: Mapping[str, Any], tokens: int, steps: int, folder: str) -> CoDistillationTrainer:
    """A trainer of the models that the arguments choose, on random rows.

    Args:
        arguments: Arguments of `run_glue_ctcd.py`; arguments of the data have no effect.
        tokens: Length of the rows.
        steps: Number of optimizer steps of a training.
        folder: Output folder that Trainer asks for; nothing is saved.
    """
    own = {"output_dir": folder, "max_steps": steps, "logging_strategy": "no", "dataloader_pin_memory": False}
    parser = HfArgumentParser((LabelledModelArguments, CoDistillationTrainingArguments))
    model_args, training_args = parser.parse_dict({**arguments, **own, "do_eval": False}, allow_extra_keys=True)

    load = partial(
        load_model, auto_class=AutoModelForSequenceClassification, model_args=model_args, seed=training_args.seed
    )
    models = load_models(model_args, training_args, load)
    generator = torch.Generator().manual_seed(0)
    count, vocabulary = training_args.per_device_train_batch_size, models["model"].config.vocab_size
    rows = [
        {
            "input_ids": torch.randint(vocabulary, (tokens,), generator=generator),
            "attention_mask": torch.ones(tokens, dtype=torch.long),
            "labels": index % 2,
        }
        for index in range(count)
    ]
    trainer = CoDistillationTrainer(
        **models, args=training_args, train_dataset=rows, data_collator=default_data_collator
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(arguments: Mapping[str, Any], tokens: int) -> None:
    """A short training, whose peak memory is measured."""
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(arguments, tokens, MEMORY_STEPS, folder).train()


def parameters_of(trainer: CoDistillationTrainer) -> dict[str, int]:
    """Numbers of parameters: of each model as it is deployed, of both in memory, and of those that are trained."""
    held = {id(each): each for model in trainer.pair.learners.values() for each in model.parameters()}
    return {
        **{name: count_parameters(merged(model)) for name, model in trainer.pair.learners.items()},
        "both": sum(each.numel() for each in held.values()),
        "trained": sum(each.numel() for each in held.values() if each.requires_grad),
    }


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is deployed: with its adapters, if it has any, merged into a copy."""
    return copy.deepcopy(model).merge_and_unload() if is_peft_model(model) else model


def measure_times(
    arguments: Mapping[str, Mapping[str, Any]], reference: str, tokens: int, rounds: int, latency_tokens: int
) -> dict[str, dict[str, Any]]:
    """Parameters of each variant, time of a step and latency of the student, by name; latency of the teacher as well.

    Args:
        arguments: The arguments of each variant, by its name.
        reference: Name of the variant that all others are timed against.
        tokens: Length of the rows of the training.
        rounds: Number of timed steps.
        latency_tokens: Length of the sequence of the latency.
    """
    costs: dict[str, dict[str, Any]] = {}
    deployed: dict[str, PreTrainedModel] = {}
    with tempfile.TemporaryDirectory() as folder:

        def ready(variant: str) -> CoDistillationTrainer:
            trainer = make_trainer(arguments[variant], tokens, 1, folder)
            trainer.train()  # makes the optimizer
            return trainer

        against = ready(reference)
        batch = against.data_collator(against.train_dataset)
        for variant in arguments:
            print(f"{variant}: time of a step", flush=True)
            trainer = ready(variant)
            actions = {
                "own": partial(optimizer_step, trainer, batch),
                "theirs": partial(optimizer_step, against, batch),
            }
            times = in_turns(actions, rounds, warmup=1)
            ratios = [own / theirs for own, theirs in zip(times["own"], times["theirs"], strict=True)]
            costs[variant] = {
                "parameters": parameters_of(trainer),
                "step_s": statistics.median(times["own"]),
                "step_ratio": statistics.median(ratios),
                "step_ratio_range": [min(ratios), max(ratios)],
            }
            deployed.setdefault(TEACHER, merged(trainer.pair.teacher).eval())
            deployed[variant] = merged(trainer.pair.student).eval()
        del trainer, against
    latencies = measure_latencies([*deployed.values()], latency_tokens, repeats=30)
    for name, milliseconds in zip(deployed, latencies, strict=True):
        costs.setdefault(name, {})["latency_ms"] = milliseconds
    return costs


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file")
    parser.add_argument("--reference", required=True, help="the variant against which the others are timed")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--tokens", type=int, default=32, help="length of the rows of the training")
    parser.add_argument("--rounds", type=int, default=8, help="number of timed steps")
    parser.add_argument("--latency_tokens", type=int, default=128, help="length of the sequence of the latency")
    args = parser.parse_args(argv)
    study = load_study(args.study)
    if args.reference not in study.variants:
        parser.error(f"--reference {args.reference!r} is none of the variants {list(study.variants)}.")
    transformers.logging.set_verbosity_error()
    task = next(iter(study.tasks))  # all cost the same here
    arguments = {variant: study.arguments(variant, task) for variant in study.variants}
    costs = measure_times(arguments, args.reference, args.tokens, args.rounds, args.latency_tokens)
    for variant, own in arguments.items():
        print(f"{variant}: memory", flush=True)
        costs[variant]["peak_mb"] = peak_memory_of(train, own, args.tokens, live=True)
    conditions = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "reference": args.reference,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "latency_tokens": args.latency_tokens,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"conditions": conditions, "costs": costs}, indent=1) + "\n")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
