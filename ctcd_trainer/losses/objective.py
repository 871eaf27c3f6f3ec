"""The objective of a co-training: one hard loss per learner, one soft loss per edge, and their weighted sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import nested_detach

from ..arguments import DistillationArguments
from ..graph import Edge
from ..tasks import Task
from ..tasks.labels import IGNORE_INDEX
from .fused_linear import LinearHead, linear_losses

#: The user's own soft loss. Arguments: the outputs of the model that teaches (detached), the outputs of the model that
#: learns, and the batch. Returns the mean over the batch, 0-dimensional.
SoftLossFunction = Callable[[Any, Any, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: Optimizer steps that are complete.
        max_steps: Optimizer steps of the whole training; 0 if unknown, which means no warm-up.
        epoch: Epochs that are complete, with a fraction.
    """

    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


@dataclass
class Objective:
    """The loss of arXiv 2311.02849, section 3: `h_m hard_m` for each learner m and `w soft` for each edge.

    The target of a soft loss is detached, so a term trains its own learner only. Every term is the mean over the
    scored items of this micro-batch, times the share of the micro-batch in the items of the whole accumulated batch.

    Attributes:
        task: The meaning of the logits and labels.
        arguments: The weights, the soft loss and the temperature.
        soft_loss_func: The user's function that replaces the task's soft loss.
        learner_loss: Runs a learner and returns its hard loss as it counts, and its outputs, in place of all that
            follows; takes the name of the learner, its inputs and `num_items_in_batch`.
        compute_loss_func: The user's function that replaces the hard loss of each model, as Trainer takes it.
        label_smoother: Trainer's label smoother, or `None`.
        progress: How far the training is, for the warm-up of the soft weights.
    """

    task: Task
    arguments: DistillationArguments
    soft_loss_func: SoftLossFunction | None = None
    learner_loss: Callable[..., tuple[Tensor, Any]] | None = None
    compute_loss_func: Callable[..., Tensor] | None = None
    label_smoother: Callable[..., Tensor] | None = None
    progress: Progress = field(default_factory=Progress)

    def is_labelled(self, batch: Mapping[str, Any]) -> bool:
        """Tell whether a batch has labels."""
        return any(name in batch for name in self.task.label_names)

    def models_compute_loss(self, batch: Mapping[str, Any]) -> bool:
        """Tell whether each model gets the labels and computes its hard loss itself."""
        return "labels" not in batch or (self.label_smoother is None and self.compute_loss_func is None)

    def __call__(
        self, outputs: Mapping[str, Any], batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Compute the loss from whole outputs, for any head.

        Args:
            outputs: Outputs of all models by name, frozen sources included.
            batch: The batch.
            num_items_in_batch: Items in the accumulated batch: a number, or `(2,)` with the number of labelled items
                and of compared items, or `(3,)` with the number of rows as well. `None` takes the mean over this
                batch.

        Returns:
            The weighted sum, and each term without its weight by the name under which it is logged, all 0-dimensional.
            `None` and no terms if a model has computed no loss.
        """
        graph = self.arguments.graph
        trained = {learner: weight for learner, weight in graph.hard_weights.items() if weight > 0}
        hard = {learner: self.hard_loss(outputs[learner], batch, num_items_in_batch) for learner in trained}
        if any(value is None for value in hard.values()):
            return None, {}
        terms = {f"{learner}_hard_loss": value for learner, value in hard.items()}
        weights = list(trained.values())
        edges = self._edges()
        share = _share(self.task.distilled(batch), num_items_in_batch, 1) if edges else 0.0
        for edge in edges:
            terms[edge.loss_name] = self._soft_loss(edge, outputs, batch) * share
            weights.append(edge.weight)
        return sum(weight * value for weight, value in zip(weights, terms.values(), strict=True)), terms

    def hard_loss(
        self, outputs: Any, batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor | None:
        """Compute the task loss of one learner: the user's, the smoothed one, or the model's own.

        Args:
            outputs: Outputs of the learner.
            batch: The batch.
            num_items_in_batch: As in `__call__`.

        Returns:
            0-dimensional; `None` if the model has computed no loss.
        """
        if self.learner_loss is not None:
            return self.task.named(outputs)["loss"]
        if self.compute_loss_func is not None:
            number = num_items_in_batch
            number = number.reshape(-1)[0] if isinstance(number, Tensor) else number
            return self.compute_loss_func(outputs, batch.get("labels"), num_items_in_batch=number)
        if "labels" in batch and self.label_smoother is not None:
            labels = self.task.trainable_labels(batch)["labels"]
            loss = self.label_smoother(outputs, labels, shift_labels=self.task.shifts_labels)
        else:
            loss = self.task.hard_loss(self.task.named(outputs), batch)
        if loss is None:
            return None
        return loss * _share(self.task.counted(batch).ne(IGNORE_INDEX), num_items_in_batch, 0)

    def fused(
        self, heads: Mapping[str, LinearHead], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the same loss for language models, from the inputs of their output layers.

        Args:
            heads: The output layers of all models by name, at the scored positions.
            labels: Token ids of these positions, `(positions,)`.
            num_items_in_batch: As in `__call__`.

        Returns:
            As `__call__`.
        """
        hard_weights = {learner: weight for learner, weight in self.arguments.graph.hard_weights.items() if weight > 0}
        loss, terms = linear_losses(
            heads, labels, hard_weights, self._edges(), self.arguments.soft_loss, self.arguments.temperature
        )
        if num_items_in_batch is None:
            scale = 1.0 / max(len(labels), 1)
        else:
            scale = 1.0 / _items(num_items_in_batch, 0).to(loss.device).clamp(min=1)
        return loss * scale, {name: value * scale for name, value in terms.items()}

    def share_of_rows(self, batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """Return the share of a micro-batch in the rows of the accumulated batch.

        Args:
            batch: The batch.
            num_items_in_batch: As in `__call__`.

        Raises:
            ValueError: The number of rows is not in it.
        """
        if num_items_in_batch is None:
            return 1.0
        items = torch.as_tensor(num_items_in_batch).reshape(-1)
        if len(items) < 3 and not self.task.per_row:
            raise ValueError(
                f"`num_items_in_batch={num_items_in_batch}` has no number of rows, by which the feature loss is "
                "divided. Pass a tensor of three numbers: of labelled items, of compared items, and of rows."
            )
        return rows_in(batch) / _items(items, 2).clamp(min=1)

    def _edges(self) -> list[Edge]:
        """The edges with their weights at this step."""
        warmup = self.arguments.soft_weight_factor(self.progress.step, self.progress.max_steps)
        return [Edge(edge.source, edge.learner, edge.weight * warmup) for edge in self.arguments.graph.edges]

    def _soft_loss(self, edge: Edge, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        learner, source = outputs[edge.learner], outputs[edge.source]
        if self.soft_loss_func is not None:
            return self.soft_loss_func(nested_detach(source), learner, batch)
        named = (self.task.named(outputs) for outputs in (learner, source))
        return self.task.soft_loss(*named, batch, self.arguments.soft_loss, self.arguments.temperature)


def rows_in(batch: Mapping[str, Any]) -> int:
    """Count the rows of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0)


def _items(num_items_in_batch: Tensor | int, which: int) -> Tensor:
    """Select the number of labelled items (0), of compared items (1) or of rows (2); the last one for missing ones."""
    items = torch.as_tensor(num_items_in_batch).reshape(-1)
    return items[min(which, len(items) - 1)]


def _share(counted: Tensor, num_items_in_batch: Tensor | int | None, which: int) -> Tensor:
    """Share of this micro-batch in the accumulated batch.

    Args:
        counted: The items that count in this micro-batch, bool.
        num_items_in_batch: The number of items of the whole batch; see `Objective.__call__`.
        which: Index of the number; see `_items`.
    """
    if num_items_in_batch is None:
        return counted.sum().clamp(max=1)
    return counted.sum() / _items(num_items_in_batch, which).clamp(min=1)
