"""One optimizer for all learners, each with its own rate, decay and clipping."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.constants import OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from ..arguments import DistillationArguments, learner_arguments
from ..graph import STUDENT, Graph
from ..hub.repositories import PairHubTrainer
from .sharding import clip_grad_norm


class PairOptimizationTrainer(PairHubTrainer):
    """What Trainer does for the optimizer and for gradients, for two models."""

    distillation: DistillationArguments
    _grad_norms: dict[str, Tensor]
    _student_rates: list[float]

    @property
    def graph(self) -> Graph:
        """Who learns from whom, with which weights."""
        return self.distillation.graph

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer with the parameter groups that Trainer would make for each learner alone.

        A group carries the name of its learner under the key `"learner"`. Frozen learners have none. What the student
        has in common with the teacher (`share`) is the teacher's.
        """
        if self.pair is not None and self.pair.frozen != set(self.graph.frozen):
            raise ValueError(
                f"`distillation_mode={self.distillation.distillation_mode!r}` and its weights freeze "
                f"{sorted(self.graph.frozen)}, and the trainer was made for arguments that freeze "
                f"{sorted(self.pair.frozen)}. Make a new trainer for other arguments."
            )
        if self.pair is None or self.optimizer is not None:
            return super().create_optimizer(model)
        merged = None
        for learner, learner_model in self.pair.trained.items():
            self.optimizer = None
            with self._arguments_of(learner):
                optimizer = super().create_optimizer(learner_model)
            own_rate = getattr(self.args, f"{learner}_learning_rate", None)
            own = {id(parameter) for parameter in self.pair.own_parameters(learner).values()}
            for group in optimizer.param_groups:
                group["learner"] = learner
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]
                if own_rate is not None:  # `optimizer_cls_and_kwargs` brings a rate for both
                    group["lr"] = own_rate
                if merged is not None:
                    merged.add_param_group(group)
            if merged is None:
                merged = optimizer
            else:
                merged.state.update(optimizer.state)  # some optimizers (Adagrad) fill it when they are made
        self.optimizer = merged
        return merged

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of the optimizer; see `Trainer`.

        Raises:
            ValueError: It is of other learners.
        """
        if self.pair is None or checkpoint is None or self.optimizer is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        own = [group.get("learner") for group in self.optimizer.param_groups]
        shards = os.path.isdir(os.path.join(checkpoint, f"{OPTIMIZER_NAME}_0"))
        if shards and self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            # accelerate loads shards into the state that there is, and a new optimizer has none. To ask torch for it
            # makes it; accelerate does so with FSDP2 alone.
            get_optimizer_state_dict(self.model, self.optimizer.optimizer)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(self._of_other_learners(checkpoint, own, str(error))) from error
        saved = [group.get("learner") for group in self.optimizer.param_groups]
        if saved != own:
            raise ValueError(self._of_other_learners(checkpoint, own, f"its groups are of {saved}"))

    def _of_other_learners(self, checkpoint: str, own: list[str | None], why: str) -> str:
        return (
            f"The optimizer of the checkpoint {checkpoint!r} is of another training: {why}, and with "
            f"`distillation_mode={self.distillation.distillation_mode!r}` the groups are of {own}. Resume with the "
            "mode and the optimizer that it was written with, or start a new training from the models in it."
        )

    @contextmanager
    def _arguments_of(self, learner: str) -> Iterator[None]:
        """Let Trainer see the arguments of one learner, without a change to the user's object."""
        args = self.args
        self.args = learner_arguments(args, learner)
        try:
            yield
        finally:
            self.args = args

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        """Clip each learner by its own norm; one norm over both would couple them. Returns the norm over both.

        DeepSpeed has clipped by the norm over both, in its engine.
        """
        if self.pair is None or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        fsdp1 = self.model if isinstance(self.model, FullyShardedDataParallel) else None
        self._grad_norms = {
            name: clip_grad_norm(
                list(self.pair.own_parameters(name).values()),
                learner_arguments(self.args, name).max_grad_norm or float("inf"),
                fsdp1,
            )
            for name in self.pair.trained
        }
        # Trainer logs the learning rate of the step that is about to be made.
        self._student_rates = [group["lr"] for group in self.optimizer.param_groups if group.get("learner") == STUDENT]
        return torch.stack(list(self._grad_norms.values())).norm()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The norm over both; clips here if only the student is to be clipped."""
        if self.pair is not None and grad_norm is None and not self.is_deepspeed_enabled:
            return self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm)
