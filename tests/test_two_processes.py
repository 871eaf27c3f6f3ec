"""Language models without logits under DDP: two processes train as one, also with parameters that nothing uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments

VOCAB_SIZE, LENGTH, BATCH = 97, 10, 8


def make(num_layers, seed):
    torch.manual_seed(seed)
    # Untied, BERT has a bias that its forward does not use.
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=False,
    )
    return BertForMaskedLM(config)


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def train(folder):
    """Two steps; writes the losses and the sum of all weights."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(2 * BATCH):
        ids = torch.randint(VOCAB_SIZE, (LENGTH,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids.where(torch.rand(LENGTH, generator=generator) < 0.4, -100)})
    args = CoDistillationTrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-2,
        adam_epsilon=1e-4,
        per_device_eval_batch_size=2 // int(os.environ.get("WORLD_SIZE", "1")),
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = CoDistillationTrainer(
        make(3, 1), args, data_collator=collate, train_dataset=rows, student_model=make(2, 2)
    )
    trainer.train()
    assert trainer._fused
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result = {name: [log[name] for log in logs] for name in logs[0] if "loss" in name}
    # Rows that one process has alone, and that score nothing, must not raise the loss of the other process.
    rows[1]["labels"] = rows[2]["labels"] = torch.full((LENGTH,), -100)
    result |= {name: value for name, value in trainer.evaluate(rows[:6]).items() if "loss" in name or "agree" in name}
    result["weights"] = [parameter.double().abs().sum().item() for parameter in trainer.pair.parameters()]
    if trainer.is_world_process_zero():
        Path(folder, "result.json").write_text(json.dumps(result))
    return result


def test_two_processes_give_the_losses_and_weights_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    two = json.loads((tmp_path / "result.json").read_text())
    one = train(str(tmp_path))
    assert two.keys() == one.keys()
    for name, values in one.items():
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(values), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    train(sys.argv[1])
