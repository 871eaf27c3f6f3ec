"""The loss of a co-training: a weighted sum of terms, one hard loss per learner and one soft loss per edge."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers.trainer_pt_utils import nested_detach

from ..arguments import DistillationArguments
from ..graph import Edge
from ..tasks.base import Task
from .fused_linear import LinearHead, linear_losses

#: The user's own soft loss: arguments are the outputs of the model that teaches (detached), those of the model that
#: learns, and the batch; returns the mean over the batch, 0-dimensional.
SoftLossFunction = Callable[[Any, Any, Mapping[str, Any]], Tensor]


def separate_losses(
    task: Task,
    arguments: DistillationArguments,
    outputs: Mapping[str, Any],
    inputs: Mapping[str, Any],
    hard_loss: Callable[[Any], Tensor],
    share: Tensor | float = 1.0,
    warmup: float = 1.0,
    soft_loss_func: SoftLossFunction | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The co-training loss of arXiv 2311.02849, from the outputs of all models, for any head.

    It is `h_m hard_m` for each learner m, and `w soft` for each edge. The target of a soft loss is detached, so a term
    trains its own learner only.

    Args:
        task: What the logits mean.
        arguments: The weights, the soft loss and the temperature.
        outputs: Outputs of all models by name, the frozen pre-trained teacher among them if there is one.
        inputs: The batch.
        hard_loss: The task loss of one model's output, already multiplied by its share of the batch.
        share: Share of this micro-batch in the accumulated batch, by which the soft losses are multiplied.
        warmup: Factor of the soft weights.
        soft_loss_func: Computes the soft losses in place of the task.

    Returns:
        The weighted sum, and each term without its weight under the name by which it is logged; all 0-dimensional.
    """
    graph = arguments.graph

    def soft_loss(edge: Edge) -> Tensor:
        learner, source = outputs[edge.learner], outputs[edge.source]
        if soft_loss_func is not None:
            return soft_loss_func(nested_detach(source), learner, inputs)
        return task.soft_loss(learner, source, inputs, arguments.soft_loss, arguments.temperature)

    values = {
        f"{learner}_hard_loss": hard_loss(outputs[learner])
        for learner, weight in graph.hard_weights.items()
        if weight > 0
    }
    weights = [weight for weight in graph.hard_weights.values() if weight > 0]
    for edge in graph.edges:
        values[edge.loss_name] = soft_loss(edge) * share
        weights.append(edge.weight * warmup)
    return sum(weight * value for weight, value in zip(weights, values.values(), strict=True)), values


def fused_losses(
    arguments: DistillationArguments, heads: Mapping[str, LinearHead], labels: Tensor, warmup: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same for language models, summed over the positions, from the inputs of their output layers.

    Args:
        arguments: The weights, the soft loss and the temperature.
        heads: The output layers of all models by name, at the scored positions.
        labels: Token ids of these positions, `(positions,)`.
        warmup: Factor of the soft weights.

    Returns:
        As `separate_losses`, but sums.
    """
    graph = arguments.graph
    return linear_losses(
        heads,
        labels,
        {learner: weight for learner, weight in graph.hard_weights.items() if weight > 0},
        [Edge(edge.source, edge.learner, edge.weight * warmup) for edge in graph.edges],
        arguments.soft_loss,
        arguments.temperature,
    )
