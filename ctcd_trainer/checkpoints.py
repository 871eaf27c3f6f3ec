"""Both models in the output folder and in checkpoints."""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints

from .best_student import BEST_STUDENT, BestStudent
from .graph import STUDENT
from .metrics import LossMeter
from .model_card import save_model_cards
from .optimization import PairOptimizationTrainer
from .saved_weights import check_weights
from .whole_folders import PARTIAL, clean_up, put_in_place
from .wrapping import is_peft_model


class PairCheckpointTrainer(PairOptimizationTrainer):
    """What Trainer does for saving and loading, for two models."""

    _loss_meter: LossMeter
    #: Folder in which a checkpoint is put together, while that is done.
    _staging: str | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the teacher in the folder as Trainer does, and the student complete in `student/`."""
        if self.pair is None:
            return super()._save(output_dir, state_dict)
        token, self.args.hub_token = self.args.hub_token, None  # Trainer saves its arguments as well
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        self._save_processing_class(self.pair.folder_of(STUDENT, folder))
        save_model_cards(self, folder)

    def _save_processing_class(self, folder: str) -> None:
        """Save the tokenizer beside a student, so that its folder is complete."""
        processing_class = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `Trainer.train`. What a killed training has left of a checkpoint is removed first."""
        if self.pair is not None and self.is_world_process_zero():
            clean_up(Path(self.args.output_dir))
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint of both models, whole or not at all.

        Raises:
            FloatingPointError: A loss was not finite; the last good checkpoint stays the last one.
            OSError: The checkpoint could not be written; the ones before are as they were.
        """
        if self.pair is None:
            return super()._save_checkpoint(model, trial)
        self._loss_meter.check(self.accelerator.gather)
        run_dir = self._get_output_dir(trial)
        final = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._staging = os.path.join(run_dir, PARTIAL)
        written = Path(self._staging, final.name)
        try:
            super()._save_checkpoint(model, trial)
            # Trainer looks for the best checkpoint among the ones beside this one.
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if os.path.isdir(best) or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(written, final)
        except Exception as error:
            if self.args.should_save:
                clean_up(Path(run_dir))
            last = get_last_checkpoint(run_dir) if os.path.isdir(run_dir) else None
            raise OSError(
                f"The checkpoint {str(final)!r} could not be written: {error!r}. The ones before it are as they were, "
                f"the last is {last!r}. Make room or mend what is named, and `resume_from_checkpoint=True`."
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the checkpoint will be the best one; keeps the student if it is its own best."""
        # Resuming may have put another object in the place of the one that was added.
        best = next((each for each in self.callback_handler.callbacks if isinstance(each, BestStudent)), None)
        if best is not None and best.improved(metrics, self.state.global_step):
            run_dir = Path(self._get_output_dir(trial))
            written = run_dir / PARTIAL / BEST_STUDENT
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.student_model.save_pretrained(written)
                self._save_processing_class(str(written))
                save_model_cards(self, written, only=STUDENT)
                put_in_place(written, run_dir / BEST_STUDENT)
        return super()._determine_best_metric(metrics, trial)

    def _get_output_dir(self, trial: Any) -> str:
        """Folder of the checkpoints; while one is written, the folder in which it is put together."""
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint, but not before it is in its place."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load both models from a checkpoint folder.

        Raises:
            ValueError: The folder has no student, or the models of another pair; nothing was loaded.
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
            if not is_peft_model(self.pair.learners[name]):
                check_weights(self.pair.learners[name], Path(folder), name)
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
