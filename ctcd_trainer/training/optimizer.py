"""One optimizer for all learners, each with its own learning rate, weight decay and gradient clipping."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.constants import OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments
from transformers.utils import logging

from ..arguments import DistillationArguments, learner_arguments
from ..checks import check_joinable
from ..model_structure import base_model, depth_attributes, is_peft_model
from ..pair.model import CoDistillationModel
from .sharding import clip_grad_norm

logger = logging.get_logger(__name__)


#: The rate of a student that is cut from the teacher, over the teacher's rate, is the ratio of the teacher's layers to
#: the student's to the power of `RATE_EXPONENT`, and at most `MOST_RATE_FACTOR`.
RATE_EXPONENT, MOST_RATE_FACTOR = 2.0, 4.0


def default_student_learning_rate(learning_rate: float, teacher: nn.Module, student: nn.Module) -> float:
    """Return the learning rate of a student if the user has set none.

    A student that has kept some layers of the teacher, by `create_student`, has more to learn again than the teacher.
    Any other student, and adapters, get the rate of the teacher.

    Args:
        learning_rate: The teacher's rate.
        teacher: The teacher.
        student: The student.
    """
    if getattr(student, "cut_layers", None) is None or is_peft_model(student):
        return learning_rate
    configs = [base_model(model).config for model in (teacher, student)]
    layers = [sum(getattr(config, name) for name in depth_attributes(config)) for config in configs]
    return learning_rate * min(MOST_RATE_FACTOR, (layers[0] / layers[1]) ** RATE_EXPONENT)


def default_learning_rates(pair: CoDistillationModel, args: TrainingArguments) -> dict[str, float]:
    """Return the rates that follow from the models and differ from `learning_rate`, by argument; log them."""
    rates = {}
    if getattr(args, "share", None) is not None:
        return rates  # the parts in common are trained at the teacher's rate
    for name in [name for name in pair.trained if name != pair.primary]:
        rate = default_student_learning_rate(args.learning_rate, pair.learners[pair.primary], pair.learners[name])
        if rate != args.learning_rate and getattr(args, f"{name}_learning_rate", None) is None:
            rates[f"{name}_learning_rate"] = rate
            logger.warning(
                f"`{name}_learning_rate={rate:g}`, {rate / args.learning_rate:g} times `learning_rate`: the {name} "
                f"has {len(pair.learners[name].cut_layers)} layers of the {pair.primary}. Set it to use another rate."
            )
    return rates


def create_optimizer(
    pair: CoDistillationModel,
    args: TrainingArguments,
    create: Callable[[str, TrainingArguments], torch.optim.Optimizer],
    users: bool = False,
) -> torch.optim.Optimizer:
    """Make one optimizer with the parameter groups that Trainer would make for each learner alone.

    A group carries the name of its learner under the key `"learner"`. Frozen learners have none. A parameter that
    several learners have (`share`) is in the first learner's groups.

    Args:
        pair: The pair.
        args: The training arguments.
        create: Makes the optimizer of a learner, from its name and the arguments that hold for it.
        users: Whether the user's code makes it, which may set the rates of its groups itself.

    Raises:
        ValueError: The user's code ignores an argument of the learner, or its optimizers cannot be joined.
    """
    merged: torch.optim.Optimizer | None = None
    for learner in pair.trained:
        if users:
            _check_followed(args, learner, create)
        with pair.with_projections(learner):
            optimizer = create(learner, learner_arguments(args, learner))
        if users and len(pair.trained) > 1:
            check_joinable(optimizer)
        rate = None if users else getattr(args, f"{learner}_learning_rate", None)
        ids = {id(parameter) for parameter in pair.optimised_parameters(learner)}
        for group in optimizer.param_groups:
            group["learner"] = learner
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in ids]
            if rate is not None:  # `optimizer_cls_and_kwargs` brings one rate for all
                group["lr"] = rate
            if merged is not None:
                merged.add_param_group(group)
        if merged is None:
            merged = optimizer
        else:
            merged.state.update(optimizer.state)  # some optimizers (Adagrad) fill it when they are made
    return merged


def with_own_schedules(
    schedule: LRScheduler, args: TrainingArguments, create: Callable[[torch.optim.Optimizer], LRScheduler]
) -> LRScheduler:
    """Give each learner with a learning rate of its own the schedule that Trainer would make for that rate alone.

    A schedule multiplies the rates of all groups by one factor. If it ends at an absolute rate (`min_lr`, `lr_end`),
    the factor depends on the rate at which it begins.

    Args:
        schedule: The schedule of the merged optimizer, before its first step.
        args: The training arguments.
        create: Makes the schedule of an optimizer.

    Raises:
        ValueError: The schedule does not allow the rate of a learner.
    """
    if not isinstance(schedule, LambdaLR):
        return schedule
    groups = schedule.optimizer.param_groups
    for number, group in enumerate(groups):
        argument = f"{group.get('learner')}_learning_rate"
        rate = getattr(args, argument, None)
        if rate is None:
            continue
        try:
            schedule.lr_lambdas[number] = create(torch.optim.SGD([torch.zeros(1)], lr=rate)).lr_lambdas[0]
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"`{argument}={rate}` with `lr_scheduler_type={args.lr_scheduler_type.value!r}` and "
                f"`lr_scheduler_kwargs={args.lr_scheduler_kwargs}`: {error}. Change one of them."
            ) from error
        group["lr"] = schedule.base_lrs[number] * schedule.lr_lambdas[number](schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]
    return schedule


def _check_followed(args: TrainingArguments, learner: str, create: Callable) -> None:
    """Refuse an argument of a learner that the user's code ignores: other values make the same groups."""
    keys = {"learning_rate": "lr", "weight_decay": "weight_decay"}
    values = {name: getattr(args, f"{learner}_{name}", None) for name in keys}
    changed = {name: value for name, value in values.items() if value not in (None, getattr(args, name))}
    if not changed:
        return
    made = [create(learner, view).param_groups for view in (learner_arguments(args, learner), args)]
    for name, value in changed.items():
        own, common = ([group.get(keys[name]) for group in groups] for groups in made)
        if own == common:
            raise ValueError(
                f"`{learner}_{name}={value}` has no effect: `create_optimizer` of the trainer's class makes the same "
                f"groups with it as with `{name}={getattr(args, name)}`. Read `self.args.{name}` there, which is the "
                "learner's value while its groups are made, or leave the argument out."
            )


def check_frozen_unchanged(pair: CoDistillationModel, arguments: DistillationArguments) -> None:
    """Refuse arguments that freeze other learners than those for which the pair was made.

    Raises:
        ValueError: The arguments were changed since.
    """
    if pair.frozen != set(arguments.graph.frozen):
        raise ValueError(
            f"`distillation_mode={arguments.distillation_mode!r}` and its weights freeze "
            f"{sorted(arguments.graph.frozen)}, and the trainer was made for arguments that freeze "
            f"{sorted(pair.frozen)}. Make a new trainer for other arguments."
        )


@contextmanager
def loading(optimizer: Any, checkpoint: str, mode: str, sharded_model: nn.Module | None = None) -> Iterator[None]:
    """Let Trainer load the state of the optimizer, and check that it belongs to the same learners.

    Args:
        optimizer: The optimizer, as accelerate has wrapped it.
        checkpoint: Folder of the checkpoint.
        mode: The `distillation_mode`, for the message.
        sharded_model: The model that FSDP1 has wrapped, if it has.

    Raises:
        ValueError: The checkpoint's optimizer has groups of other learners.
    """

    def refusal(why: str) -> ValueError:
        return ValueError(
            f"The optimizer of the checkpoint {checkpoint!r} belongs to another training: {why}, and with "
            f"`distillation_mode={mode!r}` the groups are of {expected}. Resume with the mode and the optimizer of "
            "that training, or start a new training from the models in the checkpoint."
        )

    expected = [group.get("learner") for group in optimizer.param_groups]
    if sharded_model is not None and os.path.isdir(os.path.join(checkpoint, f"{OPTIMIZER_NAME}_0")):
        # accelerate loads shards into the state that is there, and a new optimizer has none: asking torch for the
        # state makes it. accelerate asks with FSDP2 only.
        get_optimizer_state_dict(sharded_model, optimizer.optimizer)
    try:
        yield
    except ValueError as error:
        raise refusal(str(error)) from error
    saved = [group.get("learner") for group in optimizer.param_groups]
    if saved != expected:
        raise refusal(f"its groups are of {saved}")


def clip_each(pair: CoDistillationModel, args: TrainingArguments, model: nn.Module) -> dict[str, Tensor]:
    """Clip the gradients of each learner by its own norm; one norm over all would couple the learners.

    Args:
        pair: The pair.
        args: The training arguments.
        model: The pair, possibly wrapped by FSDP1.

    Returns:
        The norm of each trained learner before clipping, 0-dimensional.
    """
    wrapper = model if isinstance(model, FullyShardedDataParallel) else None
    return {
        name: clip_grad_norm(
            pair.optimised_parameters(name),
            learner_arguments(args, name).max_grad_norm or float("inf"),
            wrapper,
        )
        for name in pair.trained
    }


def learning_rates(optimizer: Any, args: TrainingArguments) -> dict[str, float]:
    """Return the present rate of each learner that has its own, by the name of its argument."""
    rates: Mapping[str, float] = {
        f"{group['learner']}_learning_rate": group["lr"]
        for group in reversed(optimizer.param_groups)
        if group.get("learner") is not None
    }
    return {name: rate for name, rate in rates.items() if getattr(args, name, None) is not None}
