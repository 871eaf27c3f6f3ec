"""A training on two processes, where a user's callback logs on the main process alone.

`python logging_callback.py FILE` writes the logs of the main process to the file.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from processes import run_forked
from tiny import tiny_trainer
from transformers import TrainerCallback

from ctcd_trainer import CoDistillationTrainer


class Logging(TrainerCallback):
    """Logs before every step on the main process; after a step, Trainer itself would take its own log for done."""

    trainer: CoDistillationTrainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.log({"loss": 1.5, "own": state.global_step + 1})


def train(file: Path) -> None:
    """Train on one of the processes."""
    callback = Logging()
    callback.trainer = tiny_trainer(file.parent, callbacks=[callback], max_steps=3, logging_steps=1)
    callback.trainer.train()
    if callback.trainer.is_world_process_zero():
        file.write_text(json.dumps(callback.trainer.state.log_history))


if __name__ == "__main__":
    run_forked(2, partial(train, Path(sys.argv[1])))
