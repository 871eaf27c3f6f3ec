"""The weights of `auto` edges, and the end of a burn-in: what held-out rows say about the sources."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..edges import BurnIn, find_schedule, fitted_members, held_out_edges
from ..graph import Graph
from ..losses.objective import HeldOut
from ..losses.reliability import trusted_weight
from ..tasks import Task

#: Logits of a vocabulary that are turned into probabilities at a time.
_LOGITS = 2**25


class HeldOutErrors:
    """Sums over the labelled items of one or several evaluations, of all models that ran.

    Attributes:
        products: Sums of the scalar products of the errors of two models by their names, of an error with itself too.
        labels: The labels of all items, on the CPU.
        labels_of_item: As in `Family`.
    """

    def __init__(self) -> None:
        self.products: dict[tuple[str, str], float] = {}
        self.labels: list[Tensor] = []
        self.labels_of_item = 1
        self._family: Any = None

    def add(self, task: Task, outputs: Mapping[str, Any], inputs: Mapping[str, Any], rows: Tensor | None) -> None:
        """Add a batch.

        Args:
            task: The task.
            outputs: The outputs of the models by name.
            inputs: The batch, with labels.
            rows: Marks the rows to count, bool `(rows,)`; `None` for all. The last batch of several processes may hold
                a row twice.
        """
        family, labels = task.family(inputs), task.labels(inputs)
        items = labels.isnan() if labels.is_floating_point() else labels < 0
        logits = {name: task.compared_logits(output, inputs) for name, output in outputs.items()}
        items = ~items.reshape(*next(iter(logits.values())).shape[:-1], -1).all(-1)
        if rows is not None:
            where = task.scored(inputs).nonzero()[:, 0] if task.language_model else torch.arange(len(items))
            items &= rows[where].reshape(-1, *[1] * (items.ndim - 1))
        size = max(1, _LOGITS // next(iter(logits.values())).shape[-1]) if task.language_model else len(items)
        for start in range(0, len(items), size or 1):
            part = slice(start, start + size)
            errors = {name: family.errors(z[part], labels[part]) for name, z in logits.items()}
            for first, second in itertools.combinations_with_replacement(errors, 2):
                p, q = errors[first], errors[second]
                common = min(p.shape[-1], q.shape[-1])  # a token that only one model has is no error of the other
                products = torch.linalg.vecdot(p[..., :common], q[..., :common])
                total = torch.where(items[part], products, 0.0).sum().item()
                self.products[first, second] = self.products.get((first, second), 0.0) + total
        self._family = family
        self.labels_of_item = family.labels_of_item(next(iter(logits.values())))
        self.labels.append(labels.reshape(*items.shape, -1)[items].cpu())

    def means(self) -> tuple[dict[tuple[str, str], float], float] | None:
        """Return the means of the products over all processes, and the error of the label frequencies.

        Returns:
            `None` without a labelled item.
        """
        everyones = gather_object([(self.products, self.labels)])
        labels = [part for _, parts in everyones for part in parts]
        count = sum(map(len, labels))
        if not count:
            return None
        means = {pair: sum(products.get(pair, 0.0) for products, _ in everyones) / count for pair in self.products}
        return means, float(self._family.chance_error(torch.cat(labels).squeeze(-1)))


class HeldOutWeights(TrainerCallback, ExportableState, HeldOut):
    """Renews the weights of `auto` edges and ends burn-ins after an evaluation; checkpoints keep both."""

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        opened: Iterable[str] = (),
        members: Mapping[str, float] | None = None,
    ) -> None:
        HeldOut.__init__(self, dict(weights or {}), set(opened), dict(members or {}))
        #: The step of the checkpoint from which the training was resumed.
        self._resumed_at: int | None = None

    @classmethod
    def among(cls, callbacks: Iterable[TrainerCallback]) -> "HeldOutWeights | None":
        """Find the callback of this class; resuming may have replaced the object that was added."""
        return next((callback for callback in callbacks if isinstance(callback, cls)), None)

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        saved = {"weights": dict(self.weights), "opened": sorted(self.opened)}
        return {"args": saved | ({"members": dict(self.members)} if self.members else {}), "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the weights from the checkpoint, or forget them if a new training begins."""
        saved = ((state.stateful_callbacks or {}).get(type(self).__name__) or {}).get("args") or {}
        saved = saved if state.global_step else {}
        self._resumed_at = state.global_step if saved else None
        self.weights, self.opened = dict(saved.get("weights", {})), set(saved.get("opened", ()))
        self.members = dict(saved.get("members", {}))

    def renew(self, errors: HeldOutErrors, graph: Graph, step: int) -> dict[str, float]:
        """Set the weights from an evaluation during the training.

        Args:
            errors: The errors of all models.
            graph: The edges.
            step: The step of the evaluation. At the step of the checkpoint, all is as the checkpoint says.

        Returns:
            The numbers to log: the errors of the models, of the label frequencies, the bound of the label noise, and
            the new weights.

        Raises:
            ValueError: The evaluation had no labels.
        """
        means = errors.means()
        if means is None:
            names = [edge.weight_name for edge in held_out_edges(graph)]
            raise ValueError(
                f"The evaluation data have no labels, and the weights {names} follow from held-out labels. Give the "
                "`eval_dataset` labels, or set these weights to numbers, without the schedule 'burn-in'."
            )
        products, chance = means
        own = {first: value for (first, second), value in products.items() if first == second}
        noise = min(products.values())
        for edge in graph.edges if step != self._resumed_at else ():
            schedule = find_schedule(edge.schedule)
            if edge.auto:
                # The hard loss of several labels is their mean, and the soft loss their sum.
                hard = edge.weight / errors.labels_of_item
                weight = trusted_weight(own[edge.source], noise, noise, chance, hard, limit=edge.weight)
                self.weights[edge.name] = weight
            if isinstance(schedule, BurnIn) and schedule.opens(own[edge.source], chance):
                self.opened.add(edge.name)
        if graph.fits_members and step != self._resumed_at:
            self.members = fitted_members(products, list(graph.members))
        numbers = {f"held_out_{name}_error": value for name, value in own.items()}
        numbers |= {"held_out_chance_error": chance, "held_out_label_noise": max(noise, 0.0)}
        numbers |= {f"ensemble_{name}_weight": weight for name, weight in self.members.items()}
        return numbers | {e.weight_name: self.weights[e.name] for e in graph.edges if e.name in self.weights}


def rows_to_count(count: int, process: int, gather: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Mark the rows of this process's batch that are no repetitions, bool `(rows,)`.

    Args:
        count: Rows in the batch.
        process: Number of the process.
        gather: Joins a tensor of all processes, without repeated rows.
        device: Device of the batch.
    """
    own = torch.arange(count, device=device) + process * 2**32
    return torch.isin(own, gather(own))
