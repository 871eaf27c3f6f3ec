"""Parts of the benchmarks: an optimizer step, timing in turns, the command line and the report."""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, default_data_collator

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments
from ctcd_trainer.students.costs import cpu_name
from examples.common.tables import format_table

#: Columns of `comparison_row`.
COMPARISON_HEADER = [
    *("work", "compared with", "ours (s)", "theirs (s)", "ratio (min to max)", "target"),
    *("ours (MB)", "theirs (MB)", "ratio", "target", "verdict"),
]


def make_trainer(
    models: Sequence[PreTrainedModel], rows: list[dict[str, torch.Tensor]], folder: str, **arguments: Any
) -> Trainer:
    """A trainer of two models (`CoDistillationTrainer`) or of one (plain `Trainer`), which saves and prints nothing.

    Args:
        models: Teacher and student, or one model.
        rows: The data; a batch takes all rows unless `arguments` say otherwise.
        folder: Output folder that Trainer asks for.
        **arguments: Further training arguments.
    """
    settings = {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    data = {"train_dataset": rows, "data_collator": default_data_collator}
    if len(models) == 1:
        trainer = Trainer(models[0], TrainingArguments(**settings), **data)
    else:
        args = CoDistillationTrainingArguments(**settings)
        trainer = CoDistillationTrainer(models[0], args, student_model=models[1], **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def optimizer_step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> None:
    """One optimizer step as the loop of Trainer does it (`Trainer._run_epoch`)."""
    batches, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    model = trainer.model_wrapped
    trainer.training_step(model, batches[0], num_items)
    trainer._get_grad_norm(model, grad_norm=trainer._clip_grad_norm(model))
    trainer.optimizer.step()
    model.zero_grad()


def in_turns(
    actions: dict[str, Callable[[], object]], rounds: int, warmup: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time actions one after the other in rounds, in reverse order in every second round; return seconds.

    Args:
        actions: The actions by name.
        rounds: Number of timed rounds.
        warmup: Number of rounds before them that are not timed.
        device: Where the actions compute; a GPU has to finish before the clock is read.

    Returns:
        The times of the rounds by name.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(-warmup, rounds):
        for name in list(actions)[:: -1 if number % 2 else 1]:
            wait()
            start = time.perf_counter()
            actions[name]()
            wait()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def format_ratio(ratios: Sequence[float]) -> str:
    """The median, with the smallest and the largest."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def verdict(*values_and_targets: tuple[float, float | None]) -> str:
    """The verdict: `pass` if every value with a target is within it."""
    judged = [value <= target for value, target in values_and_targets if target is not None]
    if not judged:
        return "-"
    return "pass" if all(judged) else "above target"


def comparison_row(
    work: str,
    other: str,
    seconds: tuple[Sequence[float], Sequence[float]],
    time_target: float | None = None,
    memory: tuple[float, float] | None = None,
    memory_target: float | None = None,
) -> list[str]:
    """Write a line under `COMPARISON_HEADER`: our time and peak memory against those of another implementation.

    Args:
        work: Name of the work.
        other: Name of the implementation to compare with.
        seconds: Our times and theirs, by round.
        time_target: The ratio of times to stay within; `None` if there is none.
        memory: Our peak memory and theirs, in MB; `None` if it is not compared.
        memory_target: The ratio of peaks to stay within; `None` if there is none.
    """
    ratios = [ours / theirs for ours, theirs in zip(*seconds, strict=True)]
    peaks = ["-", "-", "-"]
    judged = [(statistics.median(ratios), time_target)]
    if memory is not None:
        peaks = [f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{memory[0] / memory[1]:.3f}"]
        judged.append((memory[0] / memory[1], memory_target))
    targets = ["-" if target is None else f"<= {target:.2f}" for target in (time_target, memory_target)]
    medians = [f"{statistics.median(own):.4g}" for own in seconds]
    return [work, other, *medians, format_ratio(ratios), targets[0], *peaks, targets[1], verdict(*judged)]


def describe_machine(device: str = "cpu") -> str:
    """Processor, cores and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}; " if device == "cuda" else ""
    return (
        f"{gpu}{cpu_name()}, {cores} cores, {torch.get_num_threads()} torch threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


# ---- Command line and report ----


def parser_of(description: str, rounds: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks have.

    Args:
        description: Docstring of the benchmark.
        rounds: Text about `--rounds`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test whose figures mean nothing")
    parser.add_argument("--rounds", type=int, help=rounds)
    parser.add_argument("--markdown", action="store_true", help="print the report as Markdown")
    return parser


def print_table(title: str, lines: Sequence[Sequence[str]], markdown: bool) -> None:
    """Print a table with its title."""
    print(f"{'### ' if markdown else ''}{title}\n\n{format_table(lines, markdown)}\n", flush=True)


def print_notes(notes: Sequence[str], markdown: bool, device: str = "cpu") -> None:
    """Print notes on a measurement, then the machine and the command."""
    command = f"{datetime.date.today().isoformat()}: {' '.join(['python', *sys.argv])}"
    for note in (*notes, describe_machine(device), command):
        print(f"{'- ' if markdown else ''}{note}")
