"""All checks that can refuse a training, in four steps before any work starts.

1. `check_before_loading`: the arguments, the models that are passed, and the size of the data sets.
2. `check_learners`: the fit of the models to each other; again for the new models of each trial of a search.
3. `check_setup`: the models with the data, the tokenizers, the optimizer and the augmentation.
4. `check_strategy`: the ways of `accelerate` to distribute the work, which Trainer has set up.

`check_prompts` is for models whose adapters are about to be loaded again. Each error names the argument, its value and
a remedy.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from ..arguments import DistillationArguments
from ..graph import PRETRAINED
from ..tasks.base import Task
from .arguments import (
    check_arguments,
    check_edges,
    check_evaluated,
    check_joinable,
    check_kinds,
    check_optimizer,
    check_output_dir,
    check_roles,
    check_strategy,
    makes_student,
    why_no_warm_start,
)
from .data import (
    check_augmentation,
    check_dataset,
    check_held_out,
    check_labels,
    check_own_inputs,
    check_targets,
    may_have_targets,
)
from .features import check_features, check_features_strategy, check_projections
from .fit import CheckedCollator, check_rows, explained
from .models import (
    argument_of,
    check_adapters,
    check_frozen,
    check_models,
    check_prompts,
    check_source,
    check_trainable,
)
from .tokens import check_tokenizer, check_vocabularies

__all__ = [
    "CheckedCollator",
    "argument_of",
    "check_before_loading",
    "check_evaluated",
    "check_features_strategy",
    "check_joinable",
    "check_kinds",
    "check_learners",
    "check_output_dir",
    "check_projections",
    "check_prompts",
    "check_setup",
    "check_strategy",
    "explained",
    "makes_student",
    "why_no_warm_start",
]


def check_before_loading(
    arguments: DistillationArguments,
    args: TrainingArguments | None,
    given: Mapping[str, Any],
    datasets: Mapping[str, Any],
) -> None:
    """Check all that needs no model.

    Args:
        arguments: The distillation arguments; the defaults where `args` has none.
        args: The trainer's arguments, `None` for the defaults.
        given: The trainer's arguments `student_model`, `student_model_init`, `pretrained_teacher`, `model_init` and
            `soft_loss_func` by name, `None` where they are not given.
        datasets: The data sets by name of their argument.

    Raises:
        ValueError: The training is refused.
    """
    check_roles(arguments, given, may_have_targets(datasets.get("train_dataset")))
    check_arguments(args)
    for argument, dataset in datasets.items():
        check_dataset(dataset, argument)


def check_learners(
    arguments: DistillationArguments,
    learners: Mapping[str, PreTrainedModel],
    pretrained: PreTrainedModel | None = None,
    task: Task | str | None = None,
    has_soft_loss: bool = False,
    warm_start: bool = False,
) -> Task:
    """Check that the models fit together and to the mode, before any part of them is shared.

    Args:
        arguments: The distillation arguments.
        learners: The learners by name, the primary one first.
        pretrained: The frozen pre-trained teacher.
        task: The user's task, or its name; by default it is recognised by the class of the models.
        has_soft_loss: Whether the user's function compares the outputs, so that any head is allowed.
        warm_start: Whether the primary learner is trained before it teaches, also if it is frozen then.

    Returns:
        The task of all models.

    Raises:
        ValueError: The models do not fit together, or to the mode.
    """
    for name, model in learners.items():
        check_adapters(argument_of(name), model)
    models = dict(learners) if pretrained is None else {**learners, PRETRAINED: pretrained}
    task = check_models(models, task, has_soft_loss, may_share=arguments.share is not None)
    check_edges(task, arguments, has_soft_loss)
    for name in arguments.graph.trained:
        check_trainable(name, learners[name], arguments.distillation_mode)
    for name in arguments.graph.frozen:
        check_frozen(name, learners[name], arguments.distillation_mode)
    trained = {*arguments.graph.trained, *([next(iter(learners))] if warm_start else [])}
    sources = {edge.source for edge in arguments.graph.edges}.union(arguments.graph.members)
    for name in sources & models.keys() - trained:
        check_source(name, models[name])
    return task


def check_setup(
    task: Task,
    arguments: DistillationArguments,
    args: TrainingArguments | None,
    learners: Mapping[str, nn.Module],
    pretrained: PreTrainedModel | None,
    datasets: Mapping[str, Any],
    processing_class: Any = None,
    student_processing_class: Any = None,
    augmentation: Any = None,
    augmented: str = "both",
    optimizer: Optimizer | None = None,
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
    data_collator: Any = None,
    has_soft_loss: bool = False,
) -> None:
    """Check the models together with the other arguments of the trainer.

    Args:
        task: The task of the models.
        arguments: The distillation arguments.
        args: The trainer's arguments, `None` for the defaults.
        learners: The learners by name, the primary one first.
        pretrained: The frozen pre-trained teacher.
        datasets: The data sets by name of their argument.
        processing_class: The tokenizer or processor of the trainer, or of its collator.
        student_processing_class: The tokenizer of the learners other than the primary one, if it differs.
        augmentation: Changes the batches.
        augmented: The models that get the changed batches.
        optimizer: The first of the trainer's `optimizers`.
        optimizer_cls_and_kwargs: The trainer's argument.
        data_collator: The data collator of the trainer.
        has_soft_loss: Whether the user's function compares the outputs, those of all rows.

    Raises:
        ValueError: The training is refused.
    """
    if args is not None and args.label_smoothing_factor and task.predicts_numbers:
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` smooths classes, and the models predict numbers "
            "(`problem_type='regression'`). Set it to 0."
        )
    primary, *others = learners
    teacher = learners[primary]
    two_tokenizers = student_processing_class is not None
    check_augmentation(augmentation, augmented, task, teacher, arguments, two_tokenizers)
    check_features(arguments, args, two_tokenizers)
    for name in others:
        if two_tokenizers:
            check_own_inputs(name, learners[name], task, datasets, arguments.share)
            named, remedy = f"`{name}_processing_class`", "Pass the tokenizer that the model was trained with."
            check_tokenizer(learners[name], argument_of(name), student_processing_class, named, remedy)
        else:
            check_vocabularies(teacher, learners[name], argument_of(name), processing_class)
    if pretrained is not None:
        check_vocabularies(teacher, pretrained, argument_of(PRETRAINED), processing_class)
    elif arguments.graph.uses_pretrained:
        check_targets(task, datasets.get("train_dataset"), "train_dataset", augmentation)
    trained = {name: learners[name] for name in arguments.graph.trained}
    check_optimizer(optimizer, optimizer_cls_and_kwargs, trained, args)
    shown = [primary] if two_tokenizers else learners
    everywhere = [edge for edge in arguments.graph.edges if edge.rows != "labelled" or has_soft_loss]
    learning = sorted({edge.learner for edge in (*everywhere, *arguments.graph.features)})
    default_collator = data_collator is default_data_collator or (data_collator is None and processing_class is None)
    taught = [name for name, weight in arguments.graph.hard_weights.items() if weight > 0]
    for argument, dataset in datasets.items():
        check_labels(task, dataset, argument, learning, taught, default_collator)
        check_rows(task, dataset, argument, {argument_of(name): learners[name] for name in shown}, data_collator)
    check_held_out(task, datasets, arguments)
    if args is not None and args.load_best_model_at_end:
        check_prompts(learners, "`load_best_model_at_end=True`")
