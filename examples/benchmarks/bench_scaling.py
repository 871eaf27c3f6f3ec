"""What do two processes gain over one, and how much data do they exchange?

Two gloo processes (DDP) take turns with one process. All have one thread and the same number of rows, and none ends
before the others. The work is an optimizer step of a co-training of two BERT-like sequence classifiers
with random weights and random tokens, at fp32, and for comparison that of a plain `Trainer` for the teacher alone.
Samples per second count the rows of both processes. The volume is counted where DDP hands gradients over to be summed
(a communication hook), in one step, for both models and for the teacher alone.

It needs a machine with two free cores. The benchmark is no test: it exits with 0 whatever it measures.

Example:
    python examples/benchmarks/bench_scaling.py --markdown
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whose package `examples` this is in


import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist
import transformers
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import Trainer

from examples.benchmarks.bench_sequence_classification import CO_TRAINING, TEACHER, Workload
from examples.benchmarks.measuring import format_ratio, in_turns, optimizer_step, parser_of, print_notes, print_table

TARGET = 1.7
#: The teacher alone, and the pair.
COMPARED = (TEACHER, CO_TRAINING)

#: The trainers and batches of this process.
_trainers: dict[str, Trainer] = {}
_batches: dict[str, dict[str, torch.Tensor]] = {}
_sent: dict[str, int] = {}


def set_up(rank: int, count: int, folder: str, quick: bool) -> None:
    """Make the trainers of one of `count` processes, wrapped and with a step behind them."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in names.items()}
        store = f"file://{Path(folder).absolute()}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    workload = Workload(quick, count, folder)  # as many rows as a step of all processes takes
    for variant in COMPARED:
        trainer = _trainers[variant] = workload.make_trainer(variant, ddp_find_unused_parameters=False)
        trainer.args.max_steps = 1
        trainer.train()
        _batches[variant], _sent[variant] = workload.batch, 0
        if count > 1:
            trainer.model_wrapped.register_comm_hook(variant, count_and_sum)


def count_and_sum(variant: str, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum gradients over the processes as DDP does without a hook, and count their bytes."""
    _sent[variant] += bucket.buffer().nbytes
    return allreduce_hook(dist.group.WORLD, bucket)


def step(variant: str) -> int:
    """An optimizer step of this process; returns the bytes of the gradients that it gave to the others."""
    before = _sent[variant]
    optimizer_step(_trainers[variant], _batches[variant])
    return _sent[variant] - before


def parameter_bytes(variant: str) -> int:
    """Bytes of the trained parameters of a variant."""
    return sum(p.numel() * p.element_size() for p in _trainers[variant].model.parameters() if p.requires_grad)


def start(stack: ExitStack, count: int, folder: str, quick: bool) -> list[ProcessPoolExecutor]:
    """Start as many processes, which end with the stack; a process of several is in one group with the others."""
    context = multiprocessing.get_context("forkserver")  # imports once for all
    context.set_forkserver_preload(["ctcd_trainer"])
    return [
        stack.enter_context(
            ProcessPoolExecutor(1, mp_context=context, initializer=set_up, initargs=(rank, count, folder, quick))
        )
        for rank in range(count)
    ]


def in_all(processes: list[ProcessPoolExecutor], function: Callable[[str], int], variant: str) -> list[int]:
    """Run a function in all processes at once, and return the results."""
    return [future.result() for future in [process.submit(function, variant) for process in processes]]


def main() -> None:
    """Measure, and print the report."""
    args = parser_of(__doc__, "rounds (default 8, quick 2)").parse_args()
    rounds = args.rounds or (2 if args.quick else 8)

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workload = Workload(args.quick, 1, folder)
        one, two = (start(stack, count, folder, args.quick) for count in (1, 2))
        actions = {
            (variant, len(group)): partial(in_all, group, step, variant)
            for variant in COMPARED
            for group in (one, two)
        }
        times = in_turns(actions, rounds, warmup=1)
        sent = {variant: in_all(two, step, variant)[0] for variant in COMPARED}
        sizes = {variant: in_all(one, parameter_bytes, variant)[0] for variant in COMPARED}

    rows = []
    for variant in COMPARED:
        alone, together = times[variant, 1], times[variant, 2]
        ratios = [2 * single / double for single, double in zip(alone, together, strict=True)]
        speeds = (count * workload.batch_size / statistics.median(times[variant, count]) for count in (1, 2))
        passed = "pass" if statistics.median(ratios) >= TARGET else "below target"
        judged = [f">= {TARGET:.2f}", passed] if variant == CO_TRAINING else ["-", "-"]
        volume = [f"{each[variant] / 1e6:.3f}" for each in (sent, sizes)]
        more = f"{sent[variant] / sent[TEACHER]:.3f}"
        rows.append([variant, *(f"{speed:.3f}" for speed in speeds), format_ratio(ratios), *judged, *volume, more])
    header = [
        *("work", "one process (samples/s)", "two processes (samples/s)", "ratio (min to max)", "target", "verdict"),
        *("gradients sent (MB a step)", "parameters (MB)", "of the teacher's"),
    ]
    print_table("Two processes against one", [header, *rows], args.markdown)
    notes = [f"{workload} for each process", f"{rounds} rounds in turns; medians; DDP with gloo, one thread a process"]
    print_notes(notes, args.markdown)


if __name__ == "__main__":
    main()
