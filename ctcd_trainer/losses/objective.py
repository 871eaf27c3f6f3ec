"""The objective of a co-training: one hard loss per learner, one soft loss per edge, and their weighted sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import nested_detach
from transformers.utils import logging

from ..arguments import DistillationArguments
from ..edges import GATES, OPEN, BurnIn, Scores, find_schedule
from ..graph import ENSEMBLE, PRETRAINED, Edge
from ..tasks import Task
from ..tasks.base import Compared
from ..tasks.labels import IGNORE_INDEX, TARGETS
from .fused_linear import LinearHead, linear_losses

logger = logging.get_logger(__name__)

#: The user's own soft loss. Arguments: the outputs of the model that teaches (detached), the outputs of the model that
#: learns, and the batch. Returns the mean over the batch, 0-dimensional.
SoftLossFunction = Callable[[Any, Any, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: Optimizer steps that are complete.
        max_steps: Optimizer steps of the whole training; 0 if unknown: schedules have no effect then.
        epoch: Epochs that are complete, with a fraction.
    """

    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


@dataclass(eq=False)
class HeldOut:
    """The findings of the last evaluations about the sources. The trainer sets them; in a loop of your own you may.

    Attributes:
        weights: The weight of each `auto` edge by its name (`teacher_from_student`), which is 0 without an entry.
        opened: The names of the edges whose burn-in is over.
        members: The weights of the members of a fitted ensemble by name; without them, the weights are equal.
    """

    weights: dict[str, float] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    members: dict[str, float] = field(default_factory=dict)


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
        progress: How far the training is, for the schedules of the edges.
        held_out: The weights of `auto` edges, and the edges whose burn-in is over.
        from_column: Whether the predictions of the frozen teacher are the column `TARGETS` of the data.
        rows_with_target: With `from_column`, the number of rows with a target in the accumulated batch, among all,
            labelled or unlabelled rows; the trainer sets it.
    """

    task: Task
    arguments: DistillationArguments
    soft_loss_func: SoftLossFunction | None = None
    learner_loss: Callable[..., tuple[Tensor, Any]] | None = None
    compute_loss_func: Callable[..., Tensor] | None = None
    label_smoother: Callable[..., Tensor] | None = None
    progress: Progress = field(default_factory=Progress)
    held_out: HeldOut = field(default_factory=HeldOut)
    from_column: bool = False
    rows_with_target: Mapping[str, Tensor | int | None] = field(default_factory=dict)

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
            num_items_in_batch: Items in the accumulated batch: a number; or the numbers of labels, of labelled items
                and of rows, `(3,)` (a row may have several labels, or several labelled items); or, for tasks of whole
                rows, `(2,)` without the first. `None` takes the mean over this batch.

        Returns:
            The weighted sum, and each term without its weight by the name under which it is logged, and the mean of
            each gate likewise, all 0-dimensional. `None` and no terms if a model has computed no loss.
        """
        graph = self.arguments.graph
        trained = {learner: weight for learner, weight in graph.hard_weights.items() if weight > 0}
        hard = {learner: self.hard_loss(outputs[learner], batch, num_items_in_batch) for learner in trained}
        if any(value is None for value in hard.values()):
            return None, {}
        terms = {f"{learner}_hard_loss": value for learner, value in hard.items()}
        weights = list(trained.values())
        if self.from_column:
            outputs = {**outputs, PRETRAINED: self._targets(outputs, batch)}
        if self.members:
            outputs = {**outputs, ENSEMBLE: self._pooled(outputs, batch)}
        gates, scores = {}, _ByName(lambda name: self._scores(outputs[name], batch))
        for edge in self.edges():
            terms[edge.loss_name], gate = self._soft_loss(edge, outputs, batch, scores, num_items_in_batch)
            weights.append(edge.weight)
            gates |= {} if gate is None else {edge.gate_name: gate}
        return sum(weight * value for weight, value in zip(weights, terms.values(), strict=True)), terms | gates

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
            heads,
            labels,
            hard_weights,
            self.edges(),
            self.arguments.soft_loss,
            self.arguments.temperature,
            members=self.members,
            pool=self.arguments.ensemble_of,
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
                "divided. Pass a tensor of three numbers: of labels, of labelled items, and of rows."
            )
        return rows_in(batch) / _items(items, 2).clamp(min=1)

    @property
    def members(self) -> dict[str, float]:
        """The weights of the members of the ensemble at this step, by name; none without an edge from it."""
        graph = self.arguments.graph
        return dict(self.held_out.members if graph.fits_members and self.held_out.members else graph.members)

    def _pooled(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Compared:
        """Return the mean of the predictions of the ensemble's members, in the place of a model's outputs."""
        members = self.members
        logits = [self.task.compared_logits(outputs[name], batch).detach() for name in members]
        weights = list(members.values())
        return Compared(self.task.family(batch).pooled(logits, weights, self.arguments.ensemble_of))

    def edges(self) -> list[Edge]:
        """Return the edges with their weights at this step."""
        step, steps = self.progress.step, self.progress.max_steps
        edges = []
        for edge in self.arguments.graph.edges:
            schedule = find_schedule(edge.schedule)
            if schedule.timed and not steps and torch.is_grad_enabled():
                logger.warning_once(
                    f"The schedule {edge.schedule!r} of {edge.name} has no effect: the length of the training is not "
                    "known. In a loop of your own, set `pair.objective.progress = Progress(step, max_steps)`."
                )
            weight = edge.weight * schedule.factor(step, steps)
            if edge.auto and edge.name not in self.held_out.weights:
                logger.warning_once(
                    f"`{edge.weight_name}='auto'` is 0 until the first evaluation of the training. Set "
                    "`eval_on_start=True` to know it from the first step; in a loop of your own, set "
                    f"`pair.objective.held_out.weights[{edge.name!r}]`."
                )
            if edge.auto:
                weight = self.held_out.weights.get(edge.name, 0.0) * schedule.factor(step, steps)
            if isinstance(schedule, BurnIn) and edge.name not in self.held_out.opened:
                weight = 0.0
            edges.append(replace(edge, weight=weight))
        return edges

    def changing_weights(self) -> dict[str, float]:
        """Return the weights at this step that are not the same at every step, by the names of their arguments."""
        changing = [edge.auto or edge.schedule != "constant" for edge in self.arguments.graph.edges]
        return {edge.weight_name: edge.weight for edge, changes in zip(self.edges(), changing, strict=True) if changes}

    def _scores(self, outputs: Any, batch: Mapping[str, Any]) -> Scores:
        """Return the predictions of a model as gates see them."""
        logits = self.task.compared_logits(outputs, batch)
        return Scores(self.task.family(batch), logits, self.task.labels(batch))

    def _soft_loss(
        self,
        edge: Edge,
        outputs: Mapping[str, Any],
        batch: Mapping[str, Any],
        scores: Mapping[str, Scores],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the soft loss of an edge, and the mean of its gate if it has one."""
        learner, source = outputs[edge.learner], outputs[edge.source]
        compared = self.task.distilled(batch)
        share = _share(compared, num_items_in_batch, 2 if self.task.per_row else 0)
        if self.soft_loss_func is not None:
            loss = self.soft_loss_func(nested_detach(source), learner, batch)
            return loss * share, None
        factors, holds = None, self.holds(edge, batch)
        if holds is not None:
            total = holds.sum() if num_items_in_batch is None else self._number_of_rows(edge, num_items_in_batch)
            share = compared.sum() / total.clamp(min=1)
            factors = holds.float()
        if edge.gate != OPEN:
            gate = GATES[edge.gate].value(scores[edge.learner], scores[edge.source]).nan_to_num(0.0)
            factors = gate if factors is None else gate * factors
        name, temperature = edge.soft_loss or self.arguments.soft_loss, edge.temperature or self.arguments.temperature
        loss = self.task.soft_loss(learner, source, batch, name, temperature, factors) * share
        return loss, None if edge.gate == OPEN else self.task.mean_compared(factors, batch) * share

    def holds(self, edge: Edge, batch: Mapping[str, Any]) -> Tensor | None:
        """Mark the rows of a batch on which an edge holds, bool `(rows,)`; `None` for all, and for tasks of tokens."""
        if not self.task.per_row:
            return None
        holds = None
        if edge.rows != "all":
            labelled = self.task.labelled(batch)
            holds = labelled if edge.rows == "labelled" else ~labelled
        if self._from_column(edge):
            there = self.task.distilled(batch)
            there = ~batch[TARGETS].flatten(1).isnan().any(-1) if TARGETS in batch else ~there
            holds = there if holds is None else holds & there
        return holds

    def _from_column(self, edge: Edge) -> bool:
        return self.from_column and edge.source == PRETRAINED

    def _targets(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Compared:
        """Return the column of targets in the place of a model's outputs, 0 where a row has none.

        Raises:
            ValueError: The column is missing in a training, or has another number of outputs than the models.
        """
        learner = next(iter(outputs.values()))
        logits = self.task.compared(self.task.named(learner), batch)
        if TARGETS not in batch and not torch.is_grad_enabled():
            return Compared(torch.zeros_like(logits))
        if TARGETS not in batch or batch[TARGETS].numel() != logits.numel():
            shape = tuple(batch[TARGETS].shape) if TARGETS in batch else None
            raise ValueError(
                f"`pretrained_teacher` is None, and the column {TARGETS!r} of a batch, which takes its place, has the "
                f"shape {shape}: the models have logits of the shape {tuple(logits.shape)}. Give each row of "
                "`train_dataset` such logits (NaN where it has no target), and keep them in the `data_collator`."
            )
        return Compared(batch[TARGETS].nan_to_num().reshape(logits.shape))

    def _number_of_rows(self, edge: Edge, num_items_in_batch: Tensor | int) -> Tensor:
        """Return on how many rows of the accumulated batch an edge holds; see `__call__`.

        Raises:
            ValueError: That is not known.
        """
        numbers = torch.as_tensor(num_items_in_batch).reshape(-1)
        if self._from_column(edge):
            number = self.rows_with_target.get(edge.rows)
            if number is None:
                raise ValueError(
                    f"`num_items_in_batch={num_items_in_batch}`, and it is not known how many rows have a target in "
                    f"{TARGETS!r}. Set `pair.objective.rows_with_target[{edge.rows!r}]`, or leave the number out."
                )
            return torch.as_tensor(number)
        if edge.rows == "labelled":
            return numbers[-2:][0]
        if len(numbers) == 1:
            raise ValueError(
                f"`num_items_in_batch={num_items_in_batch}` is one number, and an edge holds on unlabelled rows. Pass "
                "the numbers of labelled rows and of all rows, `torch.tensor([labelled, rows])`, or leave it out."
            )
        return numbers[-1] - numbers[-2]


class _ByName(dict):
    """Makes the value of a name when it is asked for first."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self._make(name)
        return self[name]


def rows_in(batch: Mapping[str, Any]) -> int:
    """Count the rows of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0)


def _items(num_items_in_batch: Tensor | int, which: int) -> Tensor:
    """Select the number of labels (0), of labelled items (1) or of rows (2); the last one for missing ones."""
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
