"""What does a co-distillation of language models cost, compared with no distillation and with a naive one?

A step is a whole optimizer step (forward, backward, clipping, AdamW, zeroing) on random tokens, from random weights.
`CoDistillationTrainer` takes its steps in turns, in one process, with

1. two plain `transformers.Trainer`, one for the teacher and one for the student, without any distillation. Times are
   compared with the sum of both, and peak memory with the larger of the two;
2. co-distillation as one writes it by hand (`NaiveTrainer`): both models' own forward with labels, full logits, and
   `F.kl_div` both ways at the scored positions;
3. itself with `fused_lm_head=False`, for information.

A ratio is the median over the rounds, with the smallest and the largest. Peak memory is that of a separate process.
The benchmark is no test: it exits with 0 whatever it measures.

Examples:
    python examples/benchmarks/bench_language_models.py --markdown
    python examples/benchmarks/bench_language_models.py --markdown --device cuda --bf16 --works bert-base masked causal
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whose package `examples` this is in


import statistics
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    default_data_collator,
)

from examples.benchmarks.measuring import (
    COMPARISON_HEADER,
    comparison_row,
    in_turns,
    make_trainer,
    optimizer_step,
    parser_of,
    print_notes,
    print_table,
)
from examples.benchmarks.peaks import peak_memory_of

OURS, UNFUSED, TEACHER, STUDENT, NAIVE = VARIANTS = ("ours", "unfused", "teacher alone", "student alone", "naive")
SCORED_SHARE = 0.15  # of the tokens, in masked language modelling


@dataclass(frozen=True)
class Work:
    """A pair of models and their batch, with the ratios of time and memory to stay within.

    Attributes:
        title: Name of the pair in the table.
        causal: Whether the models are causal, like GPT-2; otherwise masked, like BERT.
        layers: Layers of the teacher and of the student.
        width: Hidden size of both.
        heads: Attention heads of both.
        vocabulary: Number of token ids.
        batch: Sequences and tokens of each.
        dropout: Probability of every dropout, 0.1 by default of both configs.
        plain_targets: Ratios of time and of peak memory against the two plain steps.
        naive_targets: The same against the naive co-distillation.
    """

    title: str
    causal: bool
    layers: tuple[int, int]
    width: int
    heads: int
    vocabulary: int
    batch: tuple[int, int]
    dropout: float = 0.1
    plain_targets: tuple[float | None, float | None] = (None, None)
    naive_targets: tuple[float | None, float | None] = (None, None)

    def quick(self) -> "Work":
        """The same in a size that shows that it works and nothing else."""
        return replace(self, layers=(2, 1), width=32, heads=2, vocabulary=100, batch=(4, 16))

    def models(self) -> list[PreTrainedModel]:
        """The teacher and the student, the same at each call."""
        torch.manual_seed(0)
        return [self._model(layers) for layers in self.layers]

    def _model(self, layers: int) -> PreTrainedModel:
        if self.causal:
            config = GPT2Config(
                vocab_size=self.vocabulary,
                n_embd=self.width,
                n_layer=layers,
                n_head=self.heads,
                resid_pdrop=self.dropout,
                embd_pdrop=self.dropout,
                attn_pdrop=self.dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
            return GPT2LMHeadModel(config)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )
        return BertForMaskedLM(config)

    def rows(self) -> list[dict[str, Tensor]]:
        """The sequences of one batch, the same at each call."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, self.batch, generator=generator)
        labels = ids
        if not self.causal:
            scored = torch.rand(self.batch, generator=generator) < SCORED_SHARE
            labels = ids.where(scored, -100)
            ids = torch.randint(self.vocabulary, self.batch, generator=generator).where(scored, ids)
        mask = torch.ones(self.batch[1], dtype=torch.long)
        return [
            {"input_ids": own, "attention_mask": mask, "labels": label} for own, label in zip(ids, labels, strict=True)
        ]

    def __str__(self) -> str:
        family = "GPT-2" if self.causal else "BERT"
        first, second = self.layers
        return (
            f"{self.title}: {family} of {first} and {second} layers, hidden size {self.width}, {self.heads} heads, "
            f"vocabulary {self.vocabulary}, dropout {self.dropout:g}; batch {self.batch[0]} x {self.batch[1]} tokens"
            + ("" if self.causal else f", {SCORED_SHARE:.0%} scored")
        )


WORKS = {
    "masked": Work(
        "masked LM", False, (6, 4), 384, 12, 30522, (16, 128), plain_targets=(0.48, 1.10), naive_targets=(0.36, 0.60)
    ),
    "causal": Work(
        "causal LM", True, (6, 4), 256, 4, 50257, (8, 256), plain_targets=(0.90, 1.10), naive_targets=(0.45, 0.40)
    ),
    "bert-base": Work("masked LM, BERT-base", False, (12, 6), 768, 12, 30522, (64, 128)),
}


class NaiveTrainer(Trainer):
    """Co-distillation as one writes it by hand, for an `nn.ModuleDict` of a teacher and a student."""

    def compute_loss(
        self, model: nn.ModuleDict, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Both models' own losses, and the KL divergence of each from the other."""
        outputs = {name: model[name](**inputs) for name in ("teacher", "student")}
        teacher, student = (
            F.log_softmax(_scored(output.logits, inputs["labels"], self.causal).float(), dim=-1)
            for output in outputs.values()
        )
        loss = outputs["teacher"].loss + outputs["student"].loss
        loss = loss + F.kl_div(student, teacher.detach(), reduction="batchmean", log_target=True)
        loss = loss + F.kl_div(teacher, student.detach(), reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss

    @property
    def causal(self) -> bool:
        """True if the logits of a position predict the next token."""
        return isinstance(self.model["teacher"], GPT2LMHeadModel)


def _scored(logits: Tensor, labels: Tensor, causal: bool) -> Tensor:
    return logits[:, :-1].flatten(0, 1) if causal else logits[labels != -100]


def trainer_of(work: Work, variant: str, folder: str, device: str = "cpu", bf16: bool = False) -> Trainer:
    """Make the trainer of a variant for one step; all variants start from the same weights.

    Args:
        work: The models and the data.
        variant: One of `VARIANTS`.
        folder: Output folder that Trainer asks for; nothing is saved.
        device: Where to train.
        bf16: Whether to train in mixed precision.
    """
    teacher, student = work.models()
    arguments = {"use_cpu": device == "cpu", "bf16": bf16, "remove_unused_columns": False}
    if variant in (OURS, UNFUSED):
        return make_trainer((teacher, student), work.rows(), folder, fused_lm_head=variant == OURS, **arguments)
    trainer = make_trainer((teacher if variant != STUDENT else student,), work.rows(), folder, **arguments)
    if variant == NAIVE:
        pair = nn.ModuleDict({"teacher": teacher, "student": student})
        data = {"train_dataset": trainer.train_dataset, "data_collator": trainer.data_collator}
        trainer = NaiveTrainer(pair, trainer.args, **data)
        trainer.remove_callback(PrinterCallback)
    return trainer


def batch_of(work: Work, device: str = "cpu") -> dict[str, Tensor]:
    """The batch on which every step is taken."""
    return {name: value.to(device) for name, value in default_data_collator(work.rows()).items()}


def measure_steps(work: Work, rounds: int, device: str, bf16: bool) -> dict[str, list[float]]:
    """Seconds of one optimizer step of each variant, by round."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {variant: trainer_of(work, variant, folder, device, bf16) for variant in VARIANTS}
        for trainer in trainers.values():
            trainer.train()  # makes the optimizer, and warms up
        batch = batch_of(work, device)
        actions = {variant: lambda own=trainer: optimizer_step(own, batch) for variant, trainer in trainers.items()}
        return in_turns(actions, rounds, warmup=1, device=device)


def train_variant(work: Work, variant: str, device: str, bf16: bool) -> None:
    """Train a variant shortly, in the process whose peak memory is measured."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(work, variant, folder, device, bf16)
        trainer.train()
        batch = batch_of(work, device)
        for _ in range(2):
            optimizer_step(trainer, batch)


def make_rows(work: Work, seconds: dict[str, list[float]], memory: dict[str, float]) -> list[list[str]]:
    """The lines of one work under `COMPARISON_HEADER`."""
    plain = [sum(alone) for alone in zip(seconds[TEACHER], seconds[STUDENT], strict=True)]
    others = (
        ("the two plain steps", plain, max(memory[TEACHER], memory[STUDENT]), work.plain_targets),
        ("naive co-distillation", seconds[NAIVE], memory[NAIVE], work.naive_targets),
        ("fused_lm_head=False", seconds[UNFUSED], memory[UNFUSED], (None, None)),
    )
    return [
        comparison_row(
            work.title, other, (seconds[OURS], theirs), targets[0], (memory[OURS], their_memory), targets[1]
        )
        for other, theirs, their_memory, targets in others
    ]


def main() -> None:
    """Measure, and print the report."""
    parser = parser_of(__doc__, "rounds of the steps (default 7, quick 2)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["masked", "causal"], help="what to measure")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the models; most pre-training is without")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--live_memory", action="store_true", help="leave out freed memory that glibc has kept")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 7)
    transformers.logging.set_verbosity_error()

    lines, notes = [COMPARISON_HEADER], []
    works = [replace(WORKS[name], dropout=args.dropout) for name in args.works]
    for work in [work.quick() for work in works] if args.quick else works:
        options = (args.device, args.bf16)
        memory = {
            variant: peak_memory_of(train_variant, work, variant, *options, device=args.device, live=args.live_memory)
            for variant in VARIANTS
        }
        seconds = measure_steps(work, rounds, *options)
        lines += make_rows(work, seconds, memory)
        speed = work.batch[0] * work.batch[1] / statistics.median(seconds[OURS])
        notes.append(f"{work}; ours {speed:.0f} tokens per second")

    print_table("Co-distillation of language models, one optimizer step", lines, args.markdown)
    notes += [
        f"{'bf16 mixed precision' if args.bf16 else 'fp32'}; {rounds} rounds in turns; medians",
        "Peak memory of a process that takes three steps, less that of Python with its imports; for the two plain "
        f"steps, the larger of both{'; without freed memory that glibc has kept' if args.live_memory else ''}",
    ]
    print_notes(notes, args.markdown, args.device)


if __name__ == "__main__":
    main()
