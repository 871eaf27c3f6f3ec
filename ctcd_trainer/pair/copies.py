"""Frozen copies of learners as sources: an average of a learner's weights, or its weights at the last epoch's end.

Averages: mean teachers (Tarvainen and Valpola 2017, arXiv 1703.01780). Snapshots: the stale predictions of
codistillation (Anil et al. 2018, arXiv 1804.03235).
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..graph import AVERAGE, SNAPSHOT, copied_learner
from ..model_structure import is_quantised

#: The file of a checkpoint with the weights of the copies.
FILE = "copies.safetensors"


class Copies(TrainerCallback):
    """Keeps the copies of learners from which edges start, and brings them up to date during a training.

    An average is `d * average + (1 - d) * weights` after each step, with the decay `d = min(decay, (1 + step) /
    (10 + step))`: in short trainings, too, it forgets the weights of the start.

    Args:
        learners: The learners by name.
        names: Names of the sources that the graph uses; those that are no copies are left out.
        decay: Decay of averages.
    """

    def __init__(self, learners: Mapping[str, nn.Module], names: set[str], decay: float) -> None:
        self._learners, self._decay = learners, decay
        self.models: dict[str, nn.Module] = {}
        for name in sorted(names):
            learner = copied_learner(name)
            if learner is not None:
                model = copy.deepcopy(learners[learner]).eval().requires_grad_(False)
                # In half precision the small steps of an average would be lost in rounding.
                average = name.endswith(AVERAGE) and not is_quantised(model)
                self.models[name] = model.float() if average else model

    @torch.no_grad()
    def _update(self, kind: str, decay: float) -> None:
        for name, model in self.models.items():
            if not name.endswith(kind):
                continue
            new = self._learners[copied_learner(name)].state_dict()
            for key, value in model.state_dict().items():
                if value.is_floating_point() and decay:
                    value.lerp_(new[key].to(value.dtype), 1.0 - decay)
                else:
                    value.copy_(new[key])

    def restart(self) -> None:
        """Copy the weights that the learners have now."""
        for kind in (AVERAGE, SNAPSHOT):
            self._update(kind, 0.0)

    def after_step(self, step: int) -> None:
        """Update the averages after an optimizer step; in a loop of your own you call it.

        Args:
            step: Number of steps that are complete.
        """
        self._update(AVERAGE, min(self._decay, (1 + step) / (10 + step)))

    def after_epoch(self) -> None:
        """Take new snapshots after an epoch; in a loop of your own you call it."""
        self._update(SNAPSHOT, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the snapshots that a checkpoint at the end of an epoch lacks: it is saved before the epoch ends."""
        if state.global_step and state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-6:
            self.after_epoch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the averages."""
        self.after_step(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take new snapshots."""
        self.after_epoch()

    def save(self, folder: Path) -> None:
        """Write the weights of the copies into a checkpoint."""
        if self.models:
            tensors = {
                f"{name}.{key}": value.contiguous().clone()
                for name, model in self.models.items()
                for key, value in model.state_dict().items()
            }
            save_file(tensors, folder / FILE)

    def load(self, checkpoint: Path) -> None:
        """Read the weights of the copies from a checkpoint.

        Raises:
            ValueError: The checkpoint has not all of them. Nothing is loaded.
        """
        if not self.models:
            return
        tensors = load_file(checkpoint / FILE) if (checkpoint / FILE).is_file() else {}
        for name, model in self.models.items():
            missing = [key for key in model.state_dict() if f"{name}.{key}" not in tensors]
            if missing:
                raise ValueError(
                    f"The checkpoint {str(checkpoint)!r} has no {name}, from which this training learns: a training "
                    "with other edges has written it. Resume with the same `edges`, or start a new training from its "
                    "models."
                )
        for name, model in self.models.items():
            model.load_state_dict({key: tensors[f"{name}.{key}"] for key in model.state_dict()})
