"""Memory of trainings of models large enough to be seen: `python measured_memory.py FOLDER` writes JSON files."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from processes import run_forked
from tiny import tiny_args, tiny_trainer
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.students.costs import estimate_memory

ROWS, LENGTH, SCORED = 16, 128, 0.15
CASES: dict[str, dict[str, Any]] = {
    "classification": {},
    "masked-lm": {"head": BertForMaskedLM, "scored": SCORED},
    "recomputed": {"gradient_checkpointing": True},
    "one-way": {"distillation_mode": "kd"},
}


def model_of(layers: int, head: type = BertForSequenceClassification) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=20_000, hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=1024
    )
    return head(config)


def resident(name: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most so far) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(folder: Path, case: str, options: dict[str, Any]) -> None:
    options = dict(options)
    head, scored = options.pop("head", BertForSequenceClassification), options.pop("scored", 1.0)
    tiny_trainer(folder, max_steps=2).train()  # what is imported and set up at the first step
    before = resident("VmRSS")
    teacher, student = model_of(4, head), model_of(2, head)
    ids = torch.randint(20_000, (ROWS, LENGTH))
    labels = torch.zeros(ROWS, dtype=torch.long)
    if head is BertForMaskedLM:
        labels = ids.masked_fill(torch.rand(ids.shape) > SCORED, -100)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    trainer = CoDistillationTrainer(
        model=teacher,
        args=tiny_args(folder, max_steps=2, per_device_train_batch_size=ROWS, **options),
        train_dataset=rows,
        student_model=student,
    )
    trainer.train()
    measured = resident("VmHWM") - before
    expected = estimate_memory(teacher, student, batch_size=ROWS, sequence_length=LENGTH, scored=scored, **options)
    (folder / f"{case}.json").write_text(json.dumps({"measured": measured, "estimated": expected.total}))
    print(case, f"measured {measured / 1e6:.0f} MB, estimated {expected}")


if __name__ == "__main__":
    for case, options in CASES.items():
        run_forked(1, partial(measure, Path(sys.argv[1]), case, options))
