"""What does a checkpoint of two models cost, compared with two checkpoints of one model each?

A checkpoint of `CoDistillationTrainer` takes turns with one of a plain `transformers.Trainer` for the teacher and one
for the student (weights, AdamW state, scheduler, random states, state of the trainer), in one process. Each replaces
the one before (`save_total_limit=1`), as in a training. Trainer leaves what it has written in the memory of the
system, which a crash of the machine loses, while a checkpoint of ours is on the disk when it gets its name. So the two
are compared with both on the disk (Trainer's with the same wait added), with both in memory (ours without the wait),
and as they are.

Example:
    python examples/benchmarks/bench_checkpoints.py --markdown
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whose package `examples` this is in


import tempfile
from collections.abc import Callable
from unittest.mock import patch

import transformers
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from ctcd_trainer.saving import atomic_folders
from examples.benchmarks.bench_sequence_classification import CO_TRAINING, STUDENT, TEACHER, VARIANTS, Workload
from examples.benchmarks.measuring import (
    COMPARISON_HEADER,
    comparison_row,
    in_turns,
    parser_of,
    print_notes,
    print_table,
)

TARGET = 1.10


def make_trainers(workload: Workload, folder: str) -> dict[str, Trainer]:
    """The three trainers after a step, so that their optimizers have a state."""
    trainers = {variant: workload.make_trainer(variant) for variant in VARIANTS}
    for variant, trainer in trainers.items():
        trainer.args.max_steps = 1
        trainer.train()
        trainer.args.save_total_limit = 1
        trainer.args.output_dir = str(Path(folder, variant))
    return trainers


def save(trainer: Trainer) -> None:
    """A checkpoint of the next step."""
    trainer.state.global_step += 1
    trainer._save_checkpoint(trainer.model, trial=None)


def wait_for_disk(trainer: Trainer) -> None:
    """Wait until a checkpoint is on the disk, as the trainer does for a pair."""
    atomic_folders._sync(Path(get_last_checkpoint(trainer.args.output_dir)))


def measure(trainers: dict[str, Trainer], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way to save, by round."""
    alone = [trainers[TEACHER], trainers[STUDENT]]

    def without_wait() -> None:
        with patch.object(atomic_folders, "_sync", lambda folder: None):
            save(trainers[CO_TRAINING])

    def both(*actions: Callable[[Trainer], None]) -> None:
        for trainer in alone:
            for action in actions:
                action(trainer)

    actions = {
        "ours": lambda: save(trainers[CO_TRAINING]),
        "ours, no wait": without_wait,
        "both alone": lambda: both(save),
        "both alone, wait": lambda: both(save, wait_for_disk),
    }
    return in_turns(actions, rounds, warmup=1)


def main() -> None:
    """Measure, and print the report."""
    parser = parser_of(__doc__, "rounds (default 10, quick 2)")
    parser.add_argument("--folder", help="where to write (default: the system's folder for temporary files)")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 10)
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        workload = Workload(args.quick, 1, folder)
        trainers = make_trainers(workload, folder)
        times = measure(trainers, rounds)
        written = Path(get_last_checkpoint(trainers[CO_TRAINING].args.output_dir))
        size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())

    rows = [
        comparison_row(f"a checkpoint ({own})", f"Trainer's two ({other})", (times[ours], times[theirs]), target)
        for own, other, ours, theirs, target in (
            ("on the disk", "on the disk", "ours", "both alone, wait", TARGET),
            ("in memory", "in memory", "ours, no wait", "both alone", TARGET),
            ("on the disk", "in memory", "ours", "both alone", None),
        )
    ]
    columns = [0, 1, 2, 3, 4, 5, 10]
    lines = [[line[i] for i in columns] for line in [COMPARISON_HEADER, *rows]]
    print_table("A checkpoint of two models against two checkpoints", lines, args.markdown)
    print_notes([f"{workload}; {size / 1e6:.0f} MB", f"{rounds} rounds; medians"], args.markdown)


if __name__ == "__main__":
    main()
