"""Memory of trainings whose models are large enough to be seen.

`python measured_memory.py FOLDER [CASE...]` writes a JSON file for each case.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from processes import run_forked
from tiny import tiny_args, tiny_trainer
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.students.costs import estimate_memory

ROWS, LENGTH, SCORED = 16, 128, 0.15
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}
CASES: dict[str, dict[str, Any]] = {
    "classification": {},
    "masked-lm": {"head": BertForMaskedLM, "scored": SCORED},
    "recomputed": {"gradient_checkpointing": True},
    "one-way": {"distillation_mode": "kd"},
    # Two processes with FSDP2, with the fused pass and with whole logits.
    "sharded-fused": {"head": BertForMaskedLM, "scored": SCORED, "fused_lm_head": True, **SHARDED},
    "sharded-whole": {"head": BertForMaskedLM, "scored": SCORED, "fused_lm_head": False, **SHARDED},
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
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "fsdp" in options:  # accelerate shards on accelerators alone
        AcceleratorState._reset_state(reset_partial_state=True)
    args = tiny_args(folder, max_steps=2, per_device_train_batch_size=ROWS, **options)
    if "fsdp" in options:
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    trainer = CoDistillationTrainer(
        model=teacher,
        args=args,
        train_dataset=rows * processes,
        student_model=student,
    )
    trainer.train()
    measured = resident("VmHWM") - before
    if "fsdp" in options:
        options = {"strategy": "fsdp", "processes": processes}
    teacher, student = model_of(4, head), model_of(2, head)  # whole, where the trained ones are sharded
    expected = estimate_memory(teacher, student, batch_size=ROWS, sequence_length=LENGTH, scored=scored, **options)
    if os.environ.get("RANK", "0") != "0":
        return
    (folder / f"{case}.json").write_text(json.dumps({"measured": measured, "estimated": expected.total}))
    print(case, f"measured {measured / 1e6:.0f} MB, estimated {expected}")


if __name__ == "__main__":
    for case in sys.argv[2:] or CASES:
        options = CASES[case]
        run_forked(2 if "fsdp" in options else 1, partial(measure, Path(sys.argv[1]), case, options))
