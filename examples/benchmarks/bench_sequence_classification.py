"""What does co-training cost, compared with training the same two models one after the other?

Three things are measured on the CPU for BERT-like sequence classifiers with random weights and random tokens, at fp32:

1. One optimizer step (forward, backward, clipping, AdamW, zeroing) of `CoDistillationTrainer` against the sum of the
   same step of a plain `transformers.Trainer` for the teacher and one for the student. The three take turns, step by
   step, in one process, so that other work of the machine slows all of them equally.
2. A whole `trainer.train()` against the two plain ones in sequence, on the same data, from the same initial weights.
3. The peak memory of each of the three, in separate processes.

A ratio is the median over the rounds of co-training / (teacher alone + student alone), with the smallest and the
largest one. The benchmark is no test: it exits with 0 whatever it measures.

Example:
    python examples/benchmarks/bench_sequence_classification.py --markdown
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whose package `examples` this is in


import copy
import statistics
import tempfile
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, default_data_collator

from examples.benchmarks.measuring import (
    format_ratio,
    in_turns,
    make_trainer,
    optimizer_step,
    parser_of,
    print_notes,
    print_table,
    verdict,
)
from examples.benchmarks.peaks import peak_memory_of

CO_TRAINING, TEACHER, STUDENT = VARIANTS = ("co-training", "teacher alone", "student alone")
STEP_TARGET, TRAIN_TARGET = 1.03, 1.0


class Workload:
    """The models, the data and the arguments that all measurements share.

    Args:
        quick: Whether to use tiny models and batches, only to show that the benchmark runs.
        steps: Optimizer steps of one `trainer.train()`.
        folder: Output folder that Trainer asks for; nothing is saved.
    """

    def __init__(self, quick: bool, steps: int, folder: str) -> None:
        self.batch_size, self.length = (4, 16) if quick else (32, 128)
        self.teacher_layers, self.student_layers = (2, 1) if quick else (6, 3)
        self.hidden = 32 if quick else 384
        self.heads = 2 if quick else 12
        self.vocabulary = 100 if quick else 30522
        self.steps = steps
        self.folder = folder
        torch.manual_seed(0)
        self.models = [self._make_model(layers) for layers in (self.teacher_layers, self.student_layers)]
        self.rows = [
            {
                "input_ids": torch.randint(self.vocabulary, (self.length,)),
                "attention_mask": torch.ones(self.length, dtype=torch.long),
                "labels": index % 2,
            }
            for index in range(self.batch_size * steps)
        ]
        self.batch = default_data_collator(self.rows[: self.batch_size])

    def _make_model(self, layers: int) -> BertForSequenceClassification:
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
        )
        return BertForSequenceClassification(config)

    def make_trainer(self, variant: str, **arguments: Any) -> Trainer:
        """A trainer of one variant, with new copies of the same models and further training arguments."""
        teacher, student = copy.deepcopy(self.models)
        models = {CO_TRAINING: (teacher, student), TEACHER: (teacher,), STUDENT: (student,)}[variant]
        sizes = {"max_steps": self.steps, "per_device_train_batch_size": self.batch_size}
        return make_trainer(models, self.rows, self.folder, **sizes, **arguments)

    def __str__(self) -> str:
        return (
            f"BERT of {self.teacher_layers} and {self.student_layers} layers, hidden size {self.hidden}, "
            f"{self.heads} heads, vocabulary {self.vocabulary}; batch {self.batch_size} x {self.length} tokens; fp32"
        )


def measure_steps(workload: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of one optimizer step of each variant, by round."""
    trainers = {variant: workload.make_trainer(variant) for variant in VARIANTS}
    for trainer in trainers.values():
        trainer.args.max_steps = 1
        trainer.train()  # makes the optimizer, and warms up
    actions = {
        variant: lambda trainer=trainer: optimizer_step(trainer, workload.batch)
        for variant, trainer in trainers.items()
    }
    return in_turns(actions, rounds, warmup=1)


def measure_trainings(workload: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of `trainer.train()` of each variant, by round; each from the same models in a new trainer."""
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        actions = {variant: workload.make_trainer(variant).train for variant in VARIANTS}
        for variant, own in in_turns(actions, rounds=1, warmup=0).items():
            times[variant] += own
    return times


def train_variant(variant: str, quick: bool, steps: int) -> None:
    """Train a variant shortly, in the process whose peak memory is measured."""
    with tempfile.TemporaryDirectory() as folder:
        Workload(quick, steps, folder).make_trainer(variant).train()


def measure_memory(quick: bool, steps: int) -> dict[str, float]:
    """Peak memory in MB of a short training of each variant in a new process, above what the imports take."""
    return {variant: peak_memory_of(train_variant, variant, quick, steps) for variant in VARIANTS}


def make_rows(
    steps: dict[str, list[float]], trainings: dict[str, list[float]], memory: dict[str, float]
) -> list[list[str]]:
    """The lines of the report: what, the three medians, ratio, target, verdict."""
    rows = []
    for what, times, target in (
        ("one step (s)", steps, STEP_TARGET),
        ("trainer.train() (s)", trainings, TRAIN_TARGET),
    ):
        ratios = [both / (teacher + student) for both, teacher, student in zip(*map(times.get, VARIANTS), strict=True)]
        rows.append(
            [
                what,
                *(f"{statistics.median(times[variant]):.3f}" for variant in VARIANTS),
                format_ratio(ratios),
                f"<= {target:.2f}",
                verdict((statistics.median(ratios), target)),
            ]
        )
    alone = [memory[TEACHER], memory[STUDENT]]
    for what, base in (("of the sum", sum(alone)), ("of the larger", max(alone))):
        values = (f"{memory[variant]:.0f}" for variant in VARIANTS)
        rows.append([f"peak memory (MB), ratio {what}", *values, f"{memory[CO_TRAINING] / base:.3f}", "-", "-"])
    return rows


def main() -> None:
    """Measure, and print the report."""
    parser = parser_of(__doc__, "rounds of the steps (default 10, quick 2); a third for train()")
    parser.add_argument("--steps", type=int, help="optimizer steps of one train() (default 6, quick 2)")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 10)
    steps = args.steps or (2 if args.quick else 6)
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as folder:
        memory = measure_memory(args.quick, min(steps, 3))
        workload = Workload(args.quick, steps, folder)
        step_times = measure_steps(workload, rounds)
        training_times = measure_trainings(workload, max(2, rounds // 3))

    header = ["", *VARIANTS, "ratio (min to max)", "target", "verdict"]
    lines = [header, *make_rows(step_times, training_times, memory)]
    print_table("Co-training against two trainings, sequence classification", lines, args.markdown)
    notes = [
        str(workload),
        f"{rounds} rounds of one step, {max(2, rounds // 3)} rounds of train() over {steps} steps; medians",
        "Peak memory of a process that trains for a few steps, less that of Python with its imports",
    ]
    print_notes(notes, args.markdown)


if __name__ == "__main__":
    main()
