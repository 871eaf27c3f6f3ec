"""A training to be killed, in a process of its own: `python killed_training.py` reads one output folder a line.

Each training runs in a fork of this process, which has everything imported and has computed nothing.
"""

import os
import sys
import traceback

import torch
from tiny import tiny_bert, tiny_rows, tiny_trainer

STEPS = 12


def train(folder: str) -> None:
    """Train from the last checkpoint there is, with dropout, accumulation, warm-up, and pushes if there is a Hub."""
    torch.set_num_threads(1)
    options = {}
    if os.environ.get("HF_ENDPOINT"):
        options = {"push_to_hub": True, "hub_model_id": "me/pair", "hub_strategy": "checkpoint"}
    trainer = tiny_trainer(
        folder,
        model=tiny_bert(3, seed=1, dropout=0.1),
        student_model=tiny_bert(2, seed=2, dropout=0.1),
        train_dataset=tiny_rows(),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        soft_warmup_ratio=0.5,
        student_learning_rate=5e-3,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=int(os.environ.get("SAVE_TOTAL_LIMIT", "2")),
        **options,
    )
    there = os.path.isdir(folder) and any(name.startswith("checkpoint-") for name in os.listdir(folder))
    trainer.train(resume_from_checkpoint=there or None)
    trainer.save_model()


def main() -> None:
    """Fork a training for each line; print its process number, and its exit status when it has ended."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                train(line.strip())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
