"""Folders with all learners: the output folder, the checkpoints, and the best student."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import wait_for_everyone
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from ..checks import check_prompts
from ..model_structure import is_peft_model, is_quantised
from ..pair.model import CoDistillationModel
from .atomic_folders import clean_up, place_to_write, put_in_place, remove
from .weights import converted_weights, saved_shapes

#: With `enable_jit_checkpoint`, Trainer puts this file into the folder of a checkpoint before it writes the others.
_INCOMPLETE = "checkpoint-is-incomplete.txt"
#: The projections of the feature loss of a learner, in a checkpoint only.
PROJECTIONS = "feature_projections_of_{}.safetensors"
#: `torch.save` raises a plain RuntimeError with one of these texts if it cannot write.
_TORCH_CANNOT_WRITE = ("inline_container", "iostream error", "PytorchStreamWriter")


@dataclass(eq=False)
class PairCheckpoints:
    """Writes and reads folders that hold all learners of a pair, whole or absent whenever the process is killed.

    Args:
        pair: The learners.
        args: The training arguments.
        processing_class_of: Returns the tokenizer or processor of a learner, by name, or `None`.
        write_cards: Writes the model cards into a folder of all learners, or of the only one that is named.

    Attributes:
        staging: The folder that stands for the output folder while a checkpoint is written; otherwise `None`.
    """

    pair: CoDistillationModel
    args: TrainingArguments
    processing_class_of: Callable[[str], Any]
    write_cards: Callable[[str | os.PathLike, str | None], None]
    staging: str | None = field(default=None, init=False)

    # ---- Writing ----

    @contextmanager
    def completed(self, folder: str) -> Iterator[None]:
        """Let Trainer save the models and its arguments, without the Hub token; add what Trainer leaves out."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            yield
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            for learner in self.pair.learners.keys() - {self.pair.primary}:
                self._save_processing_class(learner, self.pair.folder_of(learner, folder))
            self.write_cards(folder, None)

    @contextmanager
    def checkpoint(self, run_dir: str, state: TrainerState) -> Iterator[None]:
        """Let Trainer write the checkpoint of the present step into `staging`, and put it in place as in `whole`."""
        with self.whole(Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")) as written:
            self.staging = str(written.parent)
            try:
                yield
            finally:
                self.staging = None
            # Trainer has looked for the best checkpoint in `staging`, where only this one is.
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            if os.path.isdir(best) or state.best_global_step == state.global_step:
                state.best_model_checkpoint = best
            if self.args.should_save:
                self.pair.copies.save(written)
                state.save_to_json(str(written / TRAINER_STATE_NAME))
                for learner, projections in self._projections.items():
                    save_file(projections.state_dict(), str(written / PROJECTIONS.format(learner)), {"format": "pt"})

    @contextmanager
    def whole(self, final: Path) -> Iterator[Path]:
        """Write a folder beside `final` and move it there when all processes are done; after an error nothing is left.

        Raises:
            OSError: The folder could not be written. The former content of `final` is unchanged.
        """
        self.clean_up(final.parent)
        try:
            with self.pair.bases.staged():
                yield place_to_write(final)
            wait_for_everyone()
            if self.args.should_save:
                self.pair.bases.moved(place_to_write(final), final)
                put_in_place(final)
        except Exception as error:
            if self.args.should_save:
                clean_up(final.parent)
            if not _is_write_error(error):
                raise
            last = get_last_checkpoint(str(final.parent)) if final.parent.is_dir() else None
            raise OSError(
                f"{str(final)!r} could not be written: {error!r}. Earlier files are unchanged; the last checkpoint is "
                f"{last!r}. Make room or repair the cause, and go on with `resume_from_checkpoint=True`."
            ) from error
        wait_for_everyone()

    def save_alone(self, learner: str, final: Path, weights: dict[str, Tensor] | None) -> None:
        """Save one learner in a folder, which is replaced as a whole; `weights` are those of `weights_of`."""
        with self.whole(final) as written:
            if self.args.should_save:
                self.pair.bases.save(learner, self.pair.learners[learner], str(written), weights)
                self._save_processing_class(learner, str(written))
                self.write_cards(written, learner)

    def weights_of(self, learner: str, accelerator: Accelerator, wrapped: nn.Module) -> dict[str, Tensor] | None:
        """Gather the weights of a learner if they are divided among processes (FSDP, DeepSpeed); otherwise `None`.

        All processes must call it.
        """
        if all(getattr(accelerator.state, plugin, None) is None for plugin in ("fsdp_plugin", "deepspeed_plugin")):
            return None
        return self.pair.weights_of(learner, accelerator.get_state_dict(wrapped) or {})

    def _save_processing_class(self, learner: str, folder: str) -> None:
        processing_class = self.processing_class_of(learner)
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    @property
    def _projections(self) -> dict[str, nn.Module]:
        """The projections of the feature loss of each learner that has some."""
        return {name: links.projections for name, links in self.pair.feature_links.items() if len(links.projections)}

    # ---- Removing ----

    def clean_up(self, folder: Path) -> None:
        """Remove what a killed training has left of a checkpoint, and the marks of incomplete checkpoints.

        A marked checkpoint without all learners stays as it is: a Trainer of one model has written a part of it.
        """
        if self.args.should_save:
            clean_up(folder)
            for mark in list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_INCOMPLETE}")):
                checkpoint = mark.parent
                if [*checkpoint.iterdir()] == [mark]:
                    remove(checkpoint)
                elif all(os.path.isdir(self.pair.folder_of(name, str(checkpoint))) for name in self.pair.learners):
                    mark.unlink()  # the pair's folders are put in place whole; the one to replace it did not come
        wait_for_everyone()

    def remove_old(self, run_dir: str, limit: int | None, best: str | None) -> None:
        """Delete old checkpoints beyond `limit` (`None` and 0 keep all), but not the best.

        Unlike in Trainer, a kill leaves no half folder.
        """
        if not self.args.should_save or not limit or limit < 0:
            return
        checkpoints = sort_checkpoints(run_dir, use_mtime=True)
        kept = {Path(path) for path in (*checkpoints[-1:], best) if path is not None}
        removable = [path for path in map(Path, checkpoints) if path not in kept]
        for path in removable[: max(0, len(checkpoints) - max(limit, len(kept)))]:
            remove(path)

    def remove_all_but_best(self, run_dir: str, best: str | None) -> None:
        """At the end of a training with `save_total_limit=1`, keep the best checkpoint alone, as Trainer does."""
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None and os.path.isdir(best):
            for path in sort_checkpoints(run_dir):
                if not os.path.samefile(path, best):
                    remove(Path(path))

    # ---- Reading ----

    def load(self, checkpoint: str, load_plain: Callable[[str, nn.Module], None]) -> None:
        """Load all learners from a checkpoint, a plain model with Trainer's `_load_from_checkpoint` (`load_plain`).

        Raises:
            ValueError: The folder lacks a learner or holds other models. Nothing is loaded.
        """
        folders = {name: self.pair.folder_of(name, checkpoint) for name in self.pair.learners}
        for name, folder in folders.items():
            if not os.path.isdir(folder):
                raise ValueError(
                    f"The checkpoint {checkpoint!r} has no {name}: there is no folder {folder!r}. A trainer of one "
                    "model has written it. Resume from a checkpoint of both, or pass it as `model` to a new training."
                )
        features = {name: Path(checkpoint, PROJECTIONS.format(name)) for name in self._projections}
        for learner, path in features.items():
            here = {name: tuple(value.shape) for name, value in self._projections[learner].state_dict().items()}
            saved = saved_shapes(path.parent, path.name)
            if saved != here:
                raise ValueError(
                    f"The checkpoint {checkpoint!r} has the projections {saved} in {path.name!r}, and the feature "
                    f"loss of the {learner} has {here}. Resume with the arguments of that training (`feature_loss`, "
                    "`feature_layers`), or start a new training from the models in the checkpoint."
                )
        check_prompts(self.pair.learners, f"Resuming from {checkpoint!r}")
        learners = self.pair.learners
        adapted = {name: model for name, model in learners.items() if is_peft_model(model)}
        # Quantised weights are not trained, so they are still those that the model was loaded with.
        plain = {name: model for name, model in learners.items() if name not in adapted and not is_quantised(model)}
        converted = {name: converted_weights(model, Path(folders[name]), name) for name, model in plain.items()}
        self.pair.copies.load(Path(checkpoint))
        for learner, path in features.items():
            self._projections[learner].load_state_dict(load_file(path))
        for name, model in plain.items():
            if converted[name] is None:
                load_plain(folders[name], model)
            else:
                model.load_state_dict(converted[name], strict=False)
        for name, model in adapted.items():
            # Trainer would take the adapter in a learner's folder for a second one of the primary learner.
            for adapter in model.active_adapters:
                place = folders[name] if adapter == "default" else os.path.join(folders[name], adapter)
                model.load_adapter(place, adapter, is_trainable=name not in self.pair.frozen)


def _is_write_error(error: Exception) -> bool:
    """Tell whether the system refused to write a file; errors of memory, CUDA or another process keep their type."""
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    if type(error) is RuntimeError:
        return any(text in str(error) for text in _TORCH_CANNOT_WRITE)
    return isinstance(error, OSError) and error.errno is not None
