"""What do the head and all losses of a co-distillation cost, without the models below them?

Two language-model heads of one vocabulary, with their hidden states at the scored positions; forward and backward of
both cross-entropies and of the KL divergence in both directions, to the gradients of hidden states and heads:

- ours: `ctcd_trainer.losses.fused_linear.linear_losses`;
- naive: the logits of all positions, `F.cross_entropy` of each head, and `F.kl_div` both ways;
- plain: `F.cross_entropy` of each head, one after the other, without distillation;
- products: only the three matrix products of each head, which every variant needs.

A ratio is the median over rounds in which all variants take turns, with the smallest and the largest. Peak memory is
that of a separate process that does the work once, with weights, hidden states and gradients. `--growth` and `--plot`
show the growth of both with the positions and with the vocabulary, and `--chunk_size` compares chunk sizes of ours.
The benchmark is no test: it exits with 0 whatever it measures.

Examples:
    python examples/benchmarks/bench_fused_linear.py --markdown --plot growth.png
    python examples/benchmarks/bench_fused_linear.py --markdown --chunk_size 32 64 128 256 512
    python examples/benchmarks/bench_fused_linear.py --markdown --growth --device cuda --dtype bfloat16
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whose package `examples` this is in


import math
import os
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ctcd_trainer.graph import MODES, STUDENT, TEACHER
from ctcd_trainer.losses.fused_linear import LinearHead, linear_losses
from examples.benchmarks.measuring import (
    COMPARISON_HEADER,
    comparison_row,
    in_turns,
    parser_of,
    print_notes,
    print_table,
)
from examples.benchmarks.peaks import peak_memory_of

NAMES = (TEACHER, STUDENT)
OURS, NAIVE, PLAIN = COMPARED = ("ours", "naive", "plain")
PRODUCTS = "products"
PRODUCT_CHUNKS = (None, 64, 512)  # positions at a time; the fastest counts
NAIVE_TARGETS, PLAIN_TARGETS, PRODUCTS_TARGET = (0.52, 0.25), (0.95, 0.60), 1.35
LOGITS_HELD = {OURS: 0, NAIVE: 12, PLAIN: 5}  # tensors of positions x vocabulary at the peak, in fp32, about


@dataclass(frozen=True)
class Size:
    """The sizes of a head, and the device.

    Attributes:
        positions: Scored positions.
        vocabulary: Number of token ids.
        widths: Hidden sizes of the teacher and of the student.
        device: `cpu` or `cuda`.
        dtype: Name of the dtype of hidden states and weights; the losses are in fp32.
    """

    positions: int
    vocabulary: int
    widths: tuple[int, int] = (384, 256)
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def unavoidable(self) -> float:
        """MB of weights and hidden states, and of their gradients."""
        itemsize = getattr(torch, self.dtype).itemsize
        return 2 * sum(self.widths) * (self.positions + self.vocabulary) * itemsize / 1e6

    def fits(self, variant: str) -> bool:
        """Tell whether a variant fits into the free memory."""
        needed = self.unavoidable * 1e6 + LOGITS_HELD[variant] * self.positions * self.vocabulary * 4
        if self.device == "cuda":
            return needed < 0.9 * torch.cuda.mem_get_info()[0]
        return needed < 0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Problem:
    """The heads, the hidden states and the labels of one size, and what is done with them.

    Args:
        size: The size.
    """

    def __init__(self, size: Size) -> None:
        generator = torch.Generator(size.device).manual_seed(0)
        options = {"device": size.device, "generator": generator, "dtype": getattr(torch, size.dtype)}
        self.hidden = [torch.randn(size.positions, width, **options).requires_grad_() for width in size.widths]
        self.weights = [
            torch.randn(size.vocabulary, width, **options).div_(math.sqrt(width)).requires_grad_()
            for width in size.widths
        ]
        self.labels = torch.randint(size.vocabulary, (size.positions,), device=size.device, generator=generator)

    def run(self, variant: str, chunk_size: int | None = None) -> Tensor | None:
        """Compute the gradients of all tensors anew.

        Args:
            variant: One of `COMPARED`, or `PRODUCTS`.
            chunk_size: Positions at a time, of ours or of the products.

        Returns:
            The loss, detached; `None` for the products.
        """
        for tensor in self.hidden + self.weights:
            tensor.grad = None
        if variant == PRODUCTS:
            return self._products(chunk_size)
        if variant == PLAIN:
            return sum(self._plain(hidden, weight) for hidden, weight in zip(self.hidden, self.weights, strict=True))
        loss = self._ours(chunk_size) if variant == OURS else self._naive()
        loss.backward()
        return loss.detach()

    def _ours(self, chunk_size: int | None) -> Tensor:
        heads = {name: LinearHead(*own) for name, *own in zip(NAMES, self.hidden, self.weights, strict=True)}
        hard_weights = dict.fromkeys(NAMES, 1.0)
        total, _ = linear_losses(heads, self.labels, hard_weights, MODES["ctcd"].edges, chunk_size=chunk_size)
        return total / len(self.labels)

    def _naive(self) -> Tensor:
        logits = [(hidden @ weight.t()).float() for hidden, weight in zip(self.hidden, self.weights, strict=True)]
        loss = sum(F.cross_entropy(own, self.labels) for own in logits)
        first, second = (F.log_softmax(own, dim=-1) for own in logits)
        loss = loss + F.kl_div(first, second.detach(), reduction="batchmean", log_target=True)
        return loss + F.kl_div(second, first.detach(), reduction="batchmean", log_target=True)

    def _plain(self, hidden: Tensor, weight: Tensor) -> Tensor:
        loss = F.cross_entropy((hidden @ weight.t()).float(), self.labels)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _products(self, chunk_size: int | None) -> None:
        for hidden, weight in zip(self.hidden, self.weights, strict=True):
            weight.grad, hidden.grad = torch.zeros_like(weight), torch.empty_like(hidden)
            chunks = (tensor.split(chunk_size or len(hidden)) for tensor in (hidden, hidden.grad))
            for rows, grad in zip(*chunks, strict=True):
                logits = rows @ weight.t()
                torch.mm(logits, weight, out=grad)
                weight.grad.addmm_(logits.t(), rows)


def run_once(size: Size, variant: str, chunk_size: int | None = None) -> None:
    """Run a variant once, in the process whose peak memory is measured."""
    Problem(size).run(variant, chunk_size)


def measure(
    size: Size, actions: dict[str, tuple[str, int | None]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each action by round; an action is a variant with its chunk size."""
    problem = Problem(size)
    return in_turns(
        {name: lambda own=action: problem.run(*own) for name, action in actions.items()}, rounds, warmup, size.device
    )


def compare(size: Size, rounds: int) -> list[list[str]]:
    """The lines under `COMPARISON_HEADER`: ours against everything else."""
    products = {f"products, {chunk or 'all'} positions at a time": (PRODUCTS, chunk) for chunk in PRODUCT_CHUNKS}
    memory = {name: peak_memory_of(run_once, size, name, device=size.device) for name in COMPARED}
    seconds = measure(size, {name: (name, None) for name in COMPARED} | products, rounds, warmup=1)
    fastest = min(products, key=lambda name: statistics.median(seconds[name]))
    work = "head and losses"
    return [
        *(
            comparison_row(
                work, name, (seconds[OURS], seconds[other]), targets[0], (memory[OURS], memory[other]), targets[1]
            )
            for name, other, targets in (
                ("naive co-distillation", NAIVE, NAIVE_TARGETS),
                ("plain cross-entropy of both", PLAIN, PLAIN_TARGETS),
            )
        ),
        comparison_row(work, f"matrix {fastest}", (seconds[OURS], seconds[fastest]), PRODUCTS_TARGET),
    ]


def compare_chunks(size: Size, rounds: int, chunk_sizes: list[int]) -> list[list[str]]:
    """The header and one line per chunk size of ours, the default first."""
    actions = {str(chunk or "default"): (OURS, chunk) for chunk in [None, *chunk_sizes]}
    memory = {name: peak_memory_of(run_once, size, *action, device=size.device) for name, action in actions.items()}
    seconds = measure(size, actions, rounds, warmup=1)
    return [
        ["chunk size", "ours (s)", "min to max (s)", "ours (MB)"],
        *(
            [name, f"{statistics.median(own):.4g}", f"{min(own):.4g} to {max(own):.4g}", f"{memory[name]:.0f}"]
            for name, own in seconds.items()
        ),
    ]


@dataclass(frozen=True)
class Sweep:
    """Measurements for sizes that grow along one axis.

    Attributes:
        axis: The attribute of `Size` that grows.
        sizes: The sizes.
        seconds: Median times by variant, `nan` where it does not fit into memory.
        memory: Peak memory by variant, likewise.
    """

    axis: str
    sizes: list[Size]
    seconds: dict[str, list[float]]
    memory: dict[str, list[float]]

    @property
    def values(self) -> list[int]:
        """The values along the axis."""
        return [getattr(size, self.axis) for size in self.sizes]

    @property
    def fixed(self) -> str:
        """The size that does not grow, in words."""
        other = "vocabulary" if self.axis == "positions" else "positions"
        return f"{other} {getattr(self.sizes[0], other)}"

    def exponent(self, variant: str) -> float:
        """`e` of the power law `time ~ measure^e` through the times, by least squares: 1 is linear."""
        pairs = [(math.log(x), math.log(y)) for x, y in zip(self.values, self.seconds[variant], strict=True) if y > 0]
        return statistics.linear_regression(*zip(*pairs, strict=True)).slope

    def lines(self) -> list[list[str]]:
        """The header and a line per size."""
        header = [self.axis, *(f"{name} (s)" for name in COMPARED), *(f"{name} (MB)" for name in COMPARED)]
        columns = [
            *([f"{value:.3g}" for value in self.seconds[name]] for name in COMPARED),
            *([f"{value:.0f}" for value in self.memory[name]] for name in COMPARED),
            [f"{peak - size.unavoidable:.0f}" for peak, size in zip(self.memory[OURS], self.sizes, strict=True)],
        ]
        rows = zip(map(str, self.values), *columns, strict=True)
        return [[*header, "ours above weights etc. (MB)"], *map(list, rows)]


def sweep(axis: str, values: list[int], size: Size, rounds: int) -> Sweep:
    """Measure ours, naive and plain while one measure of the size grows."""
    sizes = [replace(size, **{axis: value}) for value in values]
    result = Sweep(axis, sizes, {name: [] for name in COMPARED}, {name: [] for name in COMPARED})
    for own in sizes:
        actions = {name: (name, None) for name in COMPARED if own.fits(name)}
        seconds = measure(own, actions, rounds, warmup=0)
        for name in COMPARED:
            fits = name in actions
            result.seconds[name].append(statistics.median(seconds[name]) if fits else math.nan)
            result.memory[name].append(peak_memory_of(run_once, own, name, device=own.device) if fits else math.nan)
    return result


def plot(sweeps: list[Sweep], path: Path) -> None:
    """Draw time (above) and peak memory (below) of each sweep, all axes logarithmic."""
    from examples.common.figures import draw_legend, figure_of, value_style  # needs matplotlib

    with figure_of(path, 2, len(sweeps), height=6, width=9, dpi=150) as (figure, axes):
        for column, grown in zip(axes.T, sweeps, strict=True):
            panels = zip(column, (grown.seconds, grown.memory), ("seconds", "peak memory (MB)"), strict=True)
            for panel, values, label in panels:
                for index, name in enumerate(COMPARED):
                    panel.plot(grown.values, values[name], label=name, **value_style(index))
                panel.set_xscale("log", base=2)
                panel.set(yscale="log", ylabel=label, xlabel=grown.axis)
            unavoidable = [size.unavoidable for size in grown.sizes]
            column[1].plot(grown.values, unavoidable, "k:", label="weights, hidden states and their gradients")
            column[0].set_title(grown.fixed)
        draw_legend(figure, axes)


def main() -> None:
    """Measure, and print the report."""
    parser = parser_of(__doc__, "rounds of the comparison (default 5, quick 2); a third for growth")
    parser.add_argument("--chunk_size", type=int, nargs="+", default=[], help="chunk sizes of ours to compare as well")
    parser.add_argument("--growth", action="store_true", help="also measure growth with positions and vocabulary")
    parser.add_argument("--plot", metavar="FILE", help="draw the growth (which this then measures)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of states and weights")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 5)
    where = {"device": args.device, "dtype": args.dtype}
    size = Size(32, 500, (16, 8), **where) if args.quick else Size(1024, 128256, **where)
    positions = [2**power for power in (range(3, 5) if args.quick else range(8, 14))]  # to 8,192
    vocabularies = [2**power for power in (range(6, 8) if args.quick else range(13, 19))]  # to 262,144

    print_table("Head and losses alone", [COMPARISON_HEADER, *compare(size, rounds)], args.markdown)
    if args.chunk_size:
        print_table("Chunk sizes of ours", compare_chunks(size, rounds, args.chunk_size), args.markdown)
    notes = []
    if args.growth or args.plot:
        few = max(2, rounds // 3)  # the comparison has warmed up
        sweeps = [
            sweep("positions", positions, replace(size, vocabulary=100 if args.quick else 30522), few),
            sweep("vocabulary", vocabularies, size, few),
        ]
        for grown in sweeps:
            print_table(f"Growth with the {grown.axis}, {grown.fixed}", grown.lines(), args.markdown)
            notes.append(f"Ours takes time ~ {grown.axis}^{grown.exponent(OURS):.2f}")
        if args.plot:
            plot(sweeps, Path(args.plot))
    notes += [
        f"{size.positions} positions, vocabulary {size.vocabulary}, widths {size.widths[0]} and {size.widths[1]}, "
        f"{args.dtype}; {rounds} rounds in turns; medians",
        "Peak memory of a process that does it once, less that of Python with its imports",
    ]
    print_notes(notes, args.markdown, args.device)


if __name__ == "__main__":
    main()
