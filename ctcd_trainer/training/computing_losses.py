"""Trainer's hooks for the loss."""

from typing import Any

import torch
from torch import Tensor, nn

from ..losses.objective import Progress
from ..pair.model import LearnerView
from .evaluation import PairEvaluationTrainer


class PairLossTrainer(PairEvaluationTrainer):
    """What Trainer does for the loss, for two models."""

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Count the scored items of the accumulated batch on all processes.

        Returns:
            The number; for tasks of whole rows `(2,)` with the number of labelled rows and of compared rows.
        """
        if self.task is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = [{"labels": self.task.counted(batch)} for batch in batch_samples]
        number = super()._get_num_items_in_batch(counted, device)
        if number is None or not self.task.per_row:
            return number
        rows = [{"labels": self.task.distilled(batch).long()} for batch in batch_samples]
        return torch.stack([number, super()._get_num_items_in_batch(rows, device)])

    def compute_loss(
        self,
        model: nn.Module | LearnerView,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss that the pair computes in its forward; see `CoDistillationModel.forward`.

        Args:
            model: The pair, wrapped or not; or a `LearnerView`, for the hard loss of one learner.
            inputs: The batch.
            return_outputs: Whether to return the outputs as well.
            num_items_in_batch: Scored items in the accumulated batch of all processes.
        """
        if self.pair is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.pair.objective.progress = Progress(self.state.global_step, self.state.max_steps, self.state.epoch or 0.0)
        whole = {"return_logits": True} if return_outputs and not isinstance(model, LearnerView) else {}
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, **whole)
        loss = outputs.get("loss")
        if loss is None:
            raise ValueError(
                f"The models have computed no loss for a batch of {sorted(inputs)}: name the label column 'label' or "
                "'labels', or pass a `data_collator` that makes them."
            )
        # DDP averages gradients over the processes, while `num_items_in_batch` counts the items of all of them.
        average = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes if average else 1
        loss = loss * scale if scale > 1 else loss
        if not isinstance(model, LearnerView):
            self._loss_meter.add(outputs["losses"], self.state.global_step + 1, scale)
        return (loss, outputs) if return_outputs else loss
