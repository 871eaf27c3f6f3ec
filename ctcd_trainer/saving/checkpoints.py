"""Both models in the output folder and in checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, sort_checkpoints

from ..cards.card import save_model_cards
from ..checks.models import check_prompts
from ..graph import STUDENT
from ..model_structure import is_peft_model, is_quantised
from ..training.meters import LossMeter
from ..training.optimizer import PairOptimizationTrainer
from .atomic_folders import clean_up, place_to_write, put_in_place, remove
from .best_student import BEST_STUDENT, BestStudent
from .weights import converted_weights

#: File of Trainer's in the place of a checkpoint that is being written (`enable_jit_checkpoint`).
_INCOMPLETE = "checkpoint-is-incomplete.txt"


class PairCheckpointTrainer(PairOptimizationTrainer):
    """What Trainer does for saving and loading, for two models."""

    _loss_meter: LossMeter
    #: Folder in which a checkpoint is put together, while that is done.
    _staging: str | None = None
    #: The student's tokenizer, if it is not the teacher's.
    student_processing_class: Any = None

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
        save_model_cards(self._card_facts(), folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save both models; see `Trainer.save_model`.

        They are whole also where checkpoints hold shards (FSDP's `SHARDED_STATE_DICT`), which Trainer leaves to a tool
        that knows of one model only.
        """
        shards = self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if shards and self.pair is not None and self._staging is None:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def processing_class_of(self, learner: str) -> Any:
        """The tokenizer or processor of a learner; `None` if none is known."""
        own = self.student_processing_class if learner == STUDENT else None
        return own or self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def _save_processing_class(self, folder: str) -> None:
        """Save the tokenizer beside a student, so that its folder is complete."""
        processing_class = self.processing_class_of(STUDENT)
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `Trainer.train`. What a killed training has left of a checkpoint is removed first."""
        if self.pair is not None:
            self._clean_up(Path(self.args.output_dir))
        return super().train(*args, **kwargs)

    def _clean_up(self, folder: Path) -> None:
        if self.args.should_save:
            clean_up(folder)
            # `enable_jit_checkpoint` marks the place of a checkpoint before that is written; a whole one of the same
            # step may be there.
            for mark in list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_INCOMPLETE}")):
                if [*mark.parent.iterdir()] == [mark]:
                    remove(mark.parent)
                else:
                    mark.unlink()
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _whole(self, final: Path) -> Iterator[Path]:
        """A folder that all processes write, and that is then in the place of `final`, or after an error nowhere.

        Raises:
            OSError: It could not be written; what was there is as it was.
        """
        self._clean_up(final.parent)
        try:
            yield place_to_write(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(final)
        except Exception as error:
            if self.args.should_save:
                clean_up(final.parent)
            if not isinstance(error, (OSError, SafetensorError, RuntimeError)):  # the last is what `torch.save` raises
                raise
            last = get_last_checkpoint(str(final.parent)) if final.parent.is_dir() else None
            raise OSError(
                f"{str(final)!r} could not be written: {error!r}. What was there before is as it was; the last "
                f"checkpoint is {last!r}. Make room or mend what is named, and `resume_from_checkpoint=True`."
            ) from error
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch; not if a training is resumed that was at its end (Trainer would do one step more)."""
        if self.pair is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

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
        try:
            with self._whole(final) as written:
                self._staging = str(written.parent)
                super()._save_checkpoint(model, trial)
                # Trainer looks for the best checkpoint among the ones beside this one.
                best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
                if os.path.isdir(best) or self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = best
                if self.args.should_save:
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        finally:
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            self._remove_checkpoints(run_dir, self.args.save_total_limit or 0)

    def _remove_checkpoints(self, run_dir: str, limit: int) -> None:
        """Keep so many checkpoints, if a limit is set, as Trainer does; which, if killed, would leave halves."""
        checkpoints = sort_checkpoints(run_dir, use_mtime=True)
        kept = {Path(path) for path in (*checkpoints[-1:], self.state.best_model_checkpoint) if path is not None}
        removable = [path for path in map(Path, checkpoints) if path not in kept]
        if limit > 0:
            for path in removable[: max(0, len(checkpoints) - max(limit, len(kept)))]:
                remove(path)

    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        """End the training; see `Trainer`."""
        best = self.state.best_model_checkpoint
        removes = self.pair is not None and self.args.should_save and self.args.save_total_limit == 1
        if removes and best is not None and os.path.isdir(best):
            # As Trainer does below, which would leave halves if it is killed.
            for path in sort_checkpoints(self._get_output_dir(trial)):
                if not os.path.samefile(path, best):
                    remove(Path(path))
        return super()._finalize_training(trial, *args)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the checkpoint will be the best one; keeps the student if it is its own best."""
        # Resuming may have put another object in the place of the one that was added.
        best = next((each for each in self.callback_handler.callbacks if isinstance(each, BestStudent)), None)
        if best is not None and best.improved(metrics, self.state.global_step):
            with self._whole(Path(self._get_output_dir(trial), BEST_STUDENT)) as written:
                state = self._whole_weights(STUDENT)
                if self.args.should_save:
                    self.student_model.save_pretrained(written, state_dict=state)
                    self._save_processing_class(str(written))
                    save_model_cards(self._card_facts(), written, only=STUDENT)
        return super()._determine_best_metric(metrics, trial)

    def _whole_weights(self, learner: str) -> dict[str, Tensor] | None:
        """The weights of a learner, gathered by all processes if each has a part; `None` if none is needed."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        prefix = f"learners.{learner}."
        state = self.accelerator.get_state_dict(self.model_wrapped) or {}
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

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
            ValueError: The folder has no student, or the models of another pair, or FSDP is to go on with what was
                written without it; nothing was loaded.
        """
        if self.pair is None or model is not None:
            sharded = self.pair is not None and self.is_fsdp_enabled
            if sharded and not [*Path(resume_from_checkpoint).glob("pytorch_model_fsdp*")]:
                raise ValueError(
                    f"The checkpoint {resume_from_checkpoint!r} was written without FSDP, and this training is with "
                    "it: FSDP keeps the state of the optimizer in another form. Resume without FSDP, or start a new "
                    "training from the models in it."
                )
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        folders = {name: self.pair.folder_of(name, resume_from_checkpoint) for name in self.pair.learners}
        for name, folder in folders.items():
            if not os.path.isdir(folder):
                raise ValueError(
                    f"The checkpoint {resume_from_checkpoint!r} has no {name}: there is no folder {folder!r}. It was "
                    "written by a trainer of one model. Resume from a checkpoint of both, or load its model with "
                    "`from_pretrained`, pass it as `model` and start a new training."
                )
        check_prompts(self.pair.learners, f"Resuming from {resume_from_checkpoint!r}")
        learners = self.pair.learners.items()
        # Quantised weights are not trained: they are those that the model was loaded with.
        folders = {name: folders[name] for name, each in learners if is_peft_model(each) or not is_quantised(each)}
        plain = {name: each for name, each in learners if name in folders and not is_peft_model(each)}
        converted = {name: converted_weights(learner, Path(folders[name]), name) for name, learner in plain.items()}
        for name, folder in folders.items():
            learner = self.pair.learners[name]
            if name not in plain:
                # Trainer would take the adapter in `student/` for a second one of the teacher.
                for adapter in learner.active_adapters:
                    there = folder if adapter == "default" else os.path.join(folder, adapter)
                    learner.load_adapter(there, adapter, is_trainable=name not in self.pair.frozen)
            elif converted[name] is not None:
                learner.load_state_dict(converted[name], strict=False)
            else:
                super()._load_from_checkpoint(folder, learner)

    def _load_best_model(self) -> None:
        """Load both models of the best checkpoint."""
        best = self.state.best_model_checkpoint
        if self.pair is None or self.is_deepspeed_enabled or self.is_fsdp_enabled or not os.path.isdir(best):
            return super()._load_best_model()  # if the folder is gone, Trainer warns
        self._load_from_checkpoint(best)
