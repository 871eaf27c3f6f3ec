"""Train a teacher and a student in a training loop of your own, without a Trainer.

The pair computes its loss, so this is the loop of a single model. Two causal language models read the bytes of a text.
Several processes run it with `accelerate launch examples/plain_loop.py ...`.
"""

import argparse
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from ctcd_trainer import CoDistillationModel, DistillationArguments, make_pair

LENGTH = 32


def scored_items(pair: CoDistillationModel, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator) -> Tensor:
    """Count the items with a label in batches of all processes: rows, or tokens of a language model."""
    return accelerator.reduce(sum((pair.task.counted(batch) != -100).sum() for batch in batches), "sum")


def train(pair: nn.Module, optimizer: Optimizer, loader: Iterable, accumulate: int, by: Accelerator) -> None:
    """Train for an epoch, with an optimizer step for every `accumulate` batches."""
    pair.train()
    rest = iter(loader)
    while batches := list(islice(rest, accumulate)):
        # The mean over the tokens of all batches is not the mean of their means: the pair divides by this number.
        items = scored_items(by.unwrap_model(pair), batches, by)
        losses: dict[str, float] = {}
        for number, batch in enumerate(batches, start=1):
            with by.no_sync(pair) if number < len(batches) else nullcontext():
                output = pair(**batch, num_items_in_batch=items)
                by.backward(output.loss * by.num_processes)  # DDP takes the mean over the processes
            losses = {name: losses.get(name, 0.0) + loss.item() for name, loss in output.losses.items()}
        optimizer.step()
        optimizer.zero_grad()
        by.print(losses)


@torch.no_grad()
def evaluate(pair: nn.Module, loader: Iterable, by: Accelerator) -> dict[str, float]:
    """Return the loss of each learner alone."""
    pair.eval()
    plain, batches, losses = by.unwrap_model(pair), list(loader), {}
    items = scored_items(plain, batches, by)
    for name in plain.learners:
        loss = sum(pair(learner=name, **batch, num_items_in_batch=items).loss for batch in batches)
        losses[name] = by.reduce(loss, "sum").item()
    return losses


def language_model(layers: int) -> GPT2LMHeadModel:
    """Make a small GPT-2 that reads bytes. Any two models of one task will do, e.g. of `from_pretrained`."""
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_positions=LENGTH, n_embd=64, n_head=4, n_layer=layers, **tokens))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and save a pair; returns the losses of both models on rows that are kept back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of the teacher; the student is in its `student/`")
    parser.add_argument("--text", type=Path, help="a text file; by default, sums such as 3+4=7")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2, help="batches of an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    sums = " ".join(f"{a}+{b}={a + b}" for a, b in torch.randint(50, (500, 2)).tolist()).encode()
    text = sums if options.text is None else options.text.read_bytes()
    tokens = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    by = Accelerator()
    pair = make_pair(language_model(4), language_model(2), DistillationArguments(temperature=options.temperature))
    optimizer = AdamW(pair.parameters(), lr=options.learning_rate)
    loaders = DataLoader(rows[16:], options.batch_size, shuffle=True), DataLoader(rows[:16], options.batch_size)
    pair, optimizer, training, evaluation = by.prepare(pair, optimizer, *loaders)
    for _ in range(options.epochs):
        train(pair, optimizer, training, options.accumulate, by)
    losses = evaluate(pair, evaluation, by)
    by.print(losses)
    by.unwrap_model(pair).save_pretrained(options.output_dir, by.is_main_process)
    return losses


if __name__ == "__main__":
    main()
