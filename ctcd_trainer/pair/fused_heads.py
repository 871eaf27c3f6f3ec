"""The decision to run language models without whole logits, and the output layers that this needs."""

from collections.abc import Mapping
from logging import INFO, WARNING
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers.utils import logging

from ..losses.head_tap import HeadTap, NoLinearHeadError, find_tap
from ..losses.objective import Objective
from ..model_structure import is_divided

logger = logging.get_logger(__name__)


class FusedHeads:
    """Decides, at the first batch with a scored position, whether the losses need whole logits.

    Attributes:
        used: Whether the models run without logits; `None` until that is decided.
        taps: The output layers of all models by name, if they do.
    """

    def __init__(self) -> None:
        self.used: bool | None = None
        self.taps: dict[str, HeadTap] = {}

    def decide(
        self,
        objective: Objective,
        models: Mapping[str, nn.Module],
        inputs: Mapping[str, Mapping[str, Any]],
        batch: Any,
    ) -> bool:
        """Tell whether the models run without logits; decides and logs it at the first batch that can tell.

        All processes decide at the same batch and alike, since with FSDP the trial runs gather parameters.

        Args:
            objective: The objective.
            models: All models by name, frozen sources included.
            inputs: The inputs of each model by name, with labels.
            batch: The batch.
        """
        if self.used is None:
            like = next(value for value in batch.values() if isinstance(value, Tensor))
            if _all_agree(objective.is_labelled(batch) and bool(objective.task.scored(batch).any()), like):
                reason = self._why_logits(objective, models, inputs)
                self.used = _all_agree(reason is None, like)
                self._log(objective, reason if reason is not None or self.used else "another process needs them")
        return bool(self.used)

    def _why_logits(
        self, objective: Objective, models: Mapping[str, nn.Module], inputs: Mapping[str, Mapping[str, Any]]
    ) -> str | None:
        """Return why the losses need whole logits, `None` if they do not; finds the output layers."""
        reasons = {
            "`fused_lm_head` is False": not objective.arguments.fused_lm_head,
            "`soft_loss_func` takes them": objective.soft_loss_func is not None,
            "`compute_loss_func` takes them": objective.compute_loss_func is not None,
            "`compute_loss` is overridden": objective.learner_loss is not None,
            "`label_smoothing_factor` is set": objective.label_smoother is not None,
            "a model has no config": not all(hasattr(model, "config") for model in models.values()),
            "DeepSpeed ZeRO-3 shards the heads": any(map(is_divided, models.values())),
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
        hard_weights = objective.arguments.graph.hard_weights
        for name, model in models.items():
            try:
                self.taps[name] = find_tap(model, objective.task, inputs[name], hard_weights.get(name, 0.0) > 0)
            except NoLinearHeadError as error:
                return f"of the {name}: {error}"
        return None

    def _log(self, objective: Objective, reason: str | None) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return
        path = "one fused pass over the scored positions" if reason is None else f"whole logits, because {reason}"
        unwanted = reason is not None and objective.arguments.fused_lm_head
        logger.log(WARNING if unwanted else INFO, "Losses of the language-model heads: %s.", path)
        if reason is not None and objective.arguments.pretrained_cache_dir is not None:
            logger.warning("`pretrained_cache_dir` keeps no whole logits, so the frozen teacher runs on every batch.")


def _all_agree(value: bool, like: Tensor) -> bool:
    """Tell whether a value is true on every process.

    Args:
        value: The value of this process.
        like: A tensor on the device that the processes communicate with.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    votes = torch.tensor(int(value), device=like.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)
