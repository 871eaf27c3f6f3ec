"""The loss of a step: what each model is run on, what is compared, and with which share of the accumulated batch."""

from logging import INFO, WARNING
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..graph import PRETRAINED
from ..losses.fused_linear import ScoredPositions
from ..losses.head_tap import HeadTap, NoLinearHeadError, find_tap
from ..losses.objective import SoftLossFunction, fused_losses, separate_losses
from ..losses.teacher_cache import PretrainedCache
from ..model_structure import base_model
from ..pair.model import LearnerView
from ..tasks.labels import IGNORE_INDEX
from ..tasks.two_tokenizers import inputs_of_learner
from .evaluation import PairEvaluationTrainer

logger = logging.get_logger(__name__)


class PairLossTrainer(PairEvaluationTrainer):
    """What Trainer does for the loss, for two models."""

    soft_loss_func: SoftLossFunction | None
    pretrained_teacher: PreTrainedModel | None
    #: Whether language models run without logits; `None` until that is decided.
    _fused: bool | None
    _pretrained_tap: HeadTap | None
    _pretrained_cache: PretrainedCache | None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Count what the task scores, over the whole accumulated batch and all processes.

        Returns:
            The number; where rows without a label are compared, `(2,)` with the number of rows that are.
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
        """The weighted sum of the hard and the soft losses of all learners.

        Each term is the mean over the scored positions of this micro-batch, times the share of the micro-batch in the
        scored positions of the whole accumulated batch and of all processes.

        Args:
            model: The pair, wrapped or not; or a `LearnerView`, for which it is the task loss of that learner alone.
            inputs: The batch.
            return_outputs: Whether to return the outputs as well.
            num_items_in_batch: Number of scored positions in the accumulated batch of all processes.

        Returns:
            The loss, 0-dimensional; with `return_outputs` also the outputs by name of the learner, or of the view.
        """
        if self.pair is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(model, LearnerView):
            outputs = self._outputs(model, inputs)
            loss = self._hard_loss(outputs, inputs, self._hard_share(inputs, num_items_in_batch), num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

        warmup = self.distillation.soft_weight_factor(self.state.global_step, self.state.max_steps)
        outputs = None
        if not return_outputs and self._skips_logits(inputs):
            loss, values = self._fused_losses(model, inputs, num_items_in_batch, warmup)
        else:
            outputs = self._outputs(model, inputs)
            hard_share = self._hard_share(inputs, num_items_in_batch)
            sources = dict(outputs)
            if self.pretrained_teacher is not None:
                sources[PRETRAINED] = self._pretrained_outputs(inputs)
            loss, values = separate_losses(
                self.task,
                self.distillation,
                sources,
                inputs,
                hard_loss=lambda output: self._hard_loss(output, inputs, hard_share, num_items_in_batch),
                share=self._share_of_batch(self.task.distilled(inputs), num_items_in_batch, -1),
                warmup=warmup,
                soft_loss_func=self.soft_loss_func,
            )
        self._loss_meter.add(values, self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss

    def _outputs(self, model: nn.Module | LearnerView, inputs: dict[str, Tensor | Any]) -> Any:
        """Outputs of the models, which get labels only if they compute the hard loss themselves."""
        if "labels" in inputs and (self.label_smoother is not None or self.compute_loss_func is not None):
            return model(**inputs, labelled=False)
        return model(**{**inputs, **self.task.trainable_labels(inputs)})

    def _hard_share(self, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """Share of this micro-batch in the labelled items; see `_share_of_batch`."""
        return self._share_of_batch(self.task.counted(inputs).ne(IGNORE_INDEX), num_items_in_batch, 0)

    def _share_of_batch(self, counted: Tensor, num_items_in_batch: Tensor | int | None, which: int) -> Tensor:
        """Share of this micro-batch in the accumulated batch, times the processes that gradients average over.

        Args:
            counted: What counts in this micro-batch, bool.
            num_items_in_batch: Numbers for the whole batch; see `_get_num_items_in_batch`.
            which: Which of the numbers, 0 for the labelled ones and -1 for the compared ones.
        """
        if num_items_in_batch is None:
            return counted.sum().clamp(max=1) / self._micro_batches()
        number = torch.as_tensor(num_items_in_batch).reshape(-1)[which]
        return self._process_scale() * counted.sum() / number.clamp(min=1)

    def _micro_batches(self) -> int:
        """Number of micro-batches that gradients are summed over, for a mean without the count of their items."""
        return getattr(self, "current_gradient_accumulation_steps", 1) if self.pair.training else 1

    def _process_scale(self) -> int:
        """DDP averages gradients over the processes, while `num_items_in_batch` counts the items of all of them."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _hard_loss(
        self,
        outputs: Any,
        inputs: dict[str, Tensor | Any],
        share: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Task loss of one learner: the user's function, the smoothed one, or the one of the model itself."""
        if self.compute_loss_func is not None:
            number = num_items_in_batch
            number = number.reshape(-1)[0] if isinstance(number, Tensor) else number
            loss = self.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=number)
            return loss * self._process_scale() if number is not None else loss
        if "labels" in inputs and self.label_smoother is not None:
            labels = self.task.trainable_labels(inputs)["labels"]
            return self.label_smoother(outputs, labels, shift_labels=self.task.shifts_labels) * share
        loss = self.task.hard_loss(outputs, inputs)
        if loss is None:
            raise ValueError(
                f"The model has computed no loss for a batch of {sorted(inputs)}: name the label column 'label' or "
                "'labels', or pass a `data_collator` that makes them."
            )
        return loss * share

    def _pretrained_outputs(
        self, inputs: dict[str, Tensor | Any], tap: HeadTap | None = None, head_at: ScoredPositions | None = None
    ) -> Any:
        """What is compared of the outputs of the frozen teacher; it runs at most once per batch."""
        model, cache = self.pretrained_teacher, self._pretrained_cache
        inputs = inputs_of_learner(PRETRAINED, inputs, self.task.label_names, self.pair.known_inputs)

        def run(inputs: dict[str, Tensor | Any], head_at: ScoredPositions | None) -> Any:
            labelled = self.task.needs_labels(base_model(model), inputs)
            with torch.no_grad(), self.accelerator.autocast():
                return self.pair.run(model, inputs, labelled, tap, head_at)

        if cache is None or (self.task.language_model and tap is None):  # whole logits would fill the disk
            return run(inputs, head_at)
        taken = self.pair.inputs_of(model, self.task.unlabelled(base_model(model), inputs))
        return cache.outputs(run, inputs, taken, tap, head_at, self.state.epoch or 0.0)

    # ---- Language models without logits ----

    def _fused_losses(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None, warmup: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of language models in one pass over the scored positions, see `fused_linear.py`."""
        scored = ScoredPositions(self.task.targets(inputs))
        heads = dict(model(**inputs, head_at=scored))
        if self._pretrained_tap is not None:
            heads[PRETRAINED] = self._pretrained_outputs(inputs, self._pretrained_tap, scored)
        with self.accelerator.autocast():
            loss, values = fused_losses(self.distillation, heads, warmup=warmup, labels=scored.labels)
        if num_items_in_batch is None:
            scale = 1.0 / (max(len(scored.labels), 1) * self._micro_batches())
        else:
            scale = self._process_scale() / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
        return loss * scale, {name: value * scale for name, value in values.items()}

    def _skips_logits(self, inputs: dict[str, Tensor | Any]) -> bool:
        """Whether the models run without logits; decided, and logged, at the first batch in which any is scored."""
        if not self.task.language_model:
            return False
        if self._fused is None and "labels" in inputs and bool(self.task.scored(inputs).any()):
            reason = self._why_logits(inputs)
            self._fused = reason is None
            path = "one fused pass over the scored positions" if reason is None else f"whole logits, because {reason}"
            unwanted = reason is not None and self.distillation.fused_lm_head
            if self.is_world_process_zero():
                logger.log(WARNING if unwanted else INFO, "Losses of the language-model heads: %s.", path)
                if reason is not None and self._pretrained_cache is not None:
                    logger.warning(
                        "Whole logits are not kept in `pretrained_cache_dir`: the frozen teacher runs always."
                    )
        return bool(self._fused)

    def _why_logits(self, inputs: dict[str, Tensor | Any]) -> str | None:
        """Why the losses need the whole logits of the models; `None` if they do not."""
        reasons = {
            "`fused_lm_head` is False": not self.distillation.fused_lm_head,
            "`soft_loss_func` takes them": self.soft_loss_func is not None,
            "`compute_loss_func` takes them": self.compute_loss_func is not None,
            "`label_smoothing_factor` is set": self.label_smoother is not None,
            "FSDP or DeepSpeed ZeRO-3 shard the heads": self._shards_parameters(),
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
        models = dict(self.pair.learners)
        if self.pretrained_teacher is not None:
            models[PRETRAINED] = self.pretrained_teacher
        taps = {}
        for name, model in models.items():
            try:
                with self.accelerator.autocast():
                    own_loss = self.graph.hard_weights.get(name, 0.0) > 0
                    taps[name] = find_tap(model, self.task, self.pair.inputs_of(model, inputs), own_loss)
            except NoLinearHeadError as error:
                return f"of the {name}: {error}"
        self._pretrained_tap = taps.pop(PRETRAINED, None)
        self.pair.taps = taps
        return None

    def _shards_parameters(self) -> bool:
        """Whether a process has the whole of a parameter only while the module that it belongs to runs."""
        return self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
