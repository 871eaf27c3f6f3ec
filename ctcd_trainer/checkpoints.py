"""Both models in the output folder and in checkpoints."""

import os
from typing import Any

from torch import nn

from .graph import STUDENT
from .metrics import LossMeter
from .optimization import PairOptimizationTrainer
from .wrapping import is_peft_model


class PairCheckpointTrainer(PairOptimizationTrainer):
    """What Trainer does for saving and loading, for two models."""

    _loss_meter: LossMeter

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the teacher in the folder as Trainer does, and the student complete in `student/`."""
        super()._save(output_dir, state_dict)
        if self.pair is None or not self.args.should_save:
            return
        folder = self.pair.folder_of(STUDENT, output_dir if output_dir is not None else self.args.output_dir)
        processing_class = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint of both models, unless a loss was not finite: the last good one stays the last one."""
        if self.pair is not None:
            self._loss_meter.check(self.accelerator.gather)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load both models from a checkpoint folder.

        Raises:
            ValueError: The folder has no student.
        """
        if self.pair is None or model is not None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        folders = {name: self.pair.folder_of(name, resume_from_checkpoint) for name in self.pair.learners}
        for name, folder in folders.items():
            if not os.path.isdir(folder):
                raise ValueError(
                    f"The checkpoint {resume_from_checkpoint!r} has no {name}: there is no folder {folder!r}. It was "
                    "written by a trainer of one model. Resume from a checkpoint of both, or load its model with "
                    "`from_pretrained`, pass it as `model` and start a new training."
                )
        for name, folder in folders.items():
            learner = self.pair.learners[name]
            if is_peft_model(learner):
                # Trainer would take the adapter in `student/` for a second one of the teacher.
                learner.load_adapter(folder, learner.active_adapter, is_trainable=name not in self.pair.frozen)
            else:
                super()._load_from_checkpoint(folder, learner)

    def _load_best_model(self) -> None:
        """Load both models of the best checkpoint."""
        there = os.path.isdir(self.state.best_model_checkpoint)  # if not, Trainer warns
        if self.pair is None or self.is_deepspeed_enabled or self.is_fsdp_enabled or not there:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)
