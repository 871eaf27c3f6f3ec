"""The loss of a co-training: a weighted sum of terms, one hard loss per learner and one soft loss per edge."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .tasks import Task
from .training_args import DistillationArguments


class Term(NamedTuple):
    """A term of the loss: its weight, and its value, 0-dimensional."""

    weight: float
    value: Tensor


def loss_terms(
    task: Task,
    arguments: DistillationArguments,
    outputs: Mapping[str, Any],
    labels: Tensor,
    hard_loss: Callable[[Any], Tensor],
    share: Tensor | float = 1.0,
    warmup: float = 1.0,
) -> dict[str, Term]:
    """Every term that trains a learner, by the name under which it is logged.

    The co-training loss of arXiv 2311.02849: `h_m hard_m` for each learner m, and `w soft` for each edge. The
    target of a soft loss is detached, so a term trains its own learner only.

    Args:
        task: What the logits mean.
        arguments: The weights, the soft loss and the temperature.
        outputs: Outputs of all models by name, the frozen pre-trained teacher among them if there is one.
        labels: Labels of the batch.
        hard_loss: The task loss of one model's output, already multiplied by its share of the batch.
        share: Share of this micro-batch in the accumulated batch, by which the soft losses are multiplied.
        warmup: Factor of the soft weights.
    """
    graph = arguments.graph
    terms = {
        f"{learner}_hard_loss": Term(weight, hard_loss(outputs[learner]))
        for learner, weight in graph.hard_weights.items()
        if weight > 0
    }
    for edge in graph.edges:
        value = task.soft_loss(
            outputs[edge.learner], outputs[edge.source], labels, arguments.soft_loss, arguments.temperature
        )
        terms[edge.loss_name] = Term(edge.weight * warmup, value * share)
    return terms
