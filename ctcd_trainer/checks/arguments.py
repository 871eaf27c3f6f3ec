"""Checks of the arguments, made before any work starts. Each error names both values and a remedy."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainingArguments

from ..arguments import EMBEDDINGS, DistillationArguments
from ..graph import Graph


def check_roles(mode: str, graph: Graph, has_student: bool, has_pretrained: bool) -> None:
    """The models that are given must be those that the mode uses.

    Args:
        mode: The `distillation_mode`.
        graph: The graph that the arguments describe.
        has_student: Whether a student is given.
        has_pretrained: Whether a frozen pre-trained teacher is given.

    Raises:
        ValueError: A model is missing or has no use.
    """
    if not has_student:
        raise ValueError(
            f"`distillation_mode='{mode}'` needs a student, and `student_model` is None. Pass `student_model` (a "
            "model, a name or a path) or `student_model_init`, or set `distillation_mode='standalone'` to train the "
            "teacher alone."
        )
    if graph.uses_pretrained and not has_pretrained:
        raise ValueError(
            f"`distillation_mode='{mode}'` with its weights needs a frozen teacher, and `pretrained_teacher` is None. "
            "Pass `pretrained_teacher`, or set `student_from_pretrained_weight` and `teacher_from_pretrained_weight` "
            "to 0."
        )
    if has_pretrained and not graph.uses_pretrained:
        raise ValueError(
            f"A `pretrained_teacher` is given, but with `distillation_mode='{mode}'` nothing learns from it. Set "
            "`distillation_mode='community'` (or one of `student_from_pretrained_weight` and "
            "`teacher_from_pretrained_weight`), or leave it out."
        )


def check_arguments(args: TrainingArguments | None) -> None:
    """Arguments of Trainer that cannot hold for two models at once.

    Raises:
        ValueError: `use_liger_kernel` is set, one process would drive several devices (`nn.DataParallel`), a best
            student is to be kept without any evaluation, or the student is to be clipped by a norm of its own where
            DeepSpeed clips.
    """
    if args is None:
        return
    metric = getattr(args, "student_metric_for_best_model", None)
    if metric is not None and args.eval_strategy == "no":
        raise ValueError(
            f"`student_metric_for_best_model={metric!r}` has no effect with `eval_strategy='no'`: nothing is ever "
            "evaluated. Set `eval_strategy` to 'steps' or 'epoch', or leave the metric out."
        )
    if getattr(args, "student_max_grad_norm", None) is not None and args.deepspeed_plugin is not None:
        raise ValueError(
            f"`student_max_grad_norm={args.student_max_grad_norm}` has no effect with DeepSpeed, which clips both "
            f"models by one norm (`max_grad_norm={args.max_grad_norm}`). Leave it out, or use FSDP."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process with {args.n_gpu} devices runs `nn.DataParallel`, which co-distillation does not support. "
            "Start one process per device with `torchrun` or `accelerate launch`, or show it one device with "
            "`CUDA_VISIBLE_DEVICES=0`."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "`use_liger_kernel=True` replaces the loss inside one model, and co-distillation compares the logits of "
            "two. Set it to False."
        )


def check_strategy(accelerator: Accelerator, has_pretrained: bool, share: str | None) -> None:
    """Ways to shard that cannot hold for two models at once.

    Args:
        accelerator: Trainer's, with the plugins that the arguments or `accelerate launch` have made.
        has_pretrained: Whether there is a frozen teacher outside of the pair.
        share: The argument of this name.

    Raises:
        ValueError: FSDP1 without `use_orig_params`, DeepSpeed ZeRO-3 with a frozen teacher, parameters that both
            models have and that each of them would be sharded with, or shared layers that would be compiled.
    """
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1 and not fsdp.use_orig_params:
        raise ValueError(
            "FSDP1 with `use_orig_params=False` joins parameters of both models into one, which can have neither "
            "two learning rates nor two gradient norms. Set `use_orig_params` to true, or `version` to 2."
        )
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    zero3 = deepspeed is not None and deepspeed.zero_stage == 3
    if share is not None and (fsdp is not None or zero3):
        raise ValueError(
            f"`share={share!r}` gives both models the same parameters, and {'DeepSpeed ZeRO-3' if zero3 else 'FSDP'} "
            "shards each of them by the layer that it is in. Leave `share` out, or train with DDP or ZeRO-2."
        )
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    if dynamo is not None and dynamo.backend != DynamoBackend.NO and share not in (None, EMBEDDINGS):
        raise ValueError(
            f"`share={share!r}` and `torch_compile` (backend {dynamo.backend.value.lower()!r}): the student is handed "
            "what a shared layer has given to the teacher, which `torch.compile` does not follow. Leave one of them "
            f"out, or set `share={EMBEDDINGS!r}`."
        )
    if zero3 and has_pretrained:
        raise ValueError(
            "DeepSpeed ZeRO-3 shards the models that it trains alone, and `pretrained_teacher` is none of them. Use "
            "FSDP2, which shards the frozen teacher too, or ZeRO-2, where each process holds it whole."
        )


def check_pretrained_cache(arguments: DistillationArguments, has_soft_loss: bool) -> None:
    """The cache of the frozen teacher keeps what the tasks compare, and no more.

    Args:
        arguments: The distillation arguments.
        has_soft_loss: Whether the user's own function compares the outputs.

    Raises:
        ValueError: Such a function is given with a cache.
    """
    if arguments.pretrained_cache_dir is not None and has_soft_loss:
        raise ValueError(
            f"`soft_loss_func` takes all outputs of the frozen teacher, and `pretrained_cache_dir="
            f"{arguments.pretrained_cache_dir!r}` keeps the logits alone. Leave out one of them."
        )


def check_optimizer(
    optimizer: torch.optim.Optimizer | None, trained: Mapping[str, nn.Module], args: TrainingArguments | None
) -> None:
    """An optimizer that the user passes must hold the parameters of every learner that is trained.

    Args:
        optimizer: The optimizer, `None` if Trainer makes it.
        trained: The learners that are trained, by name.
        args: The arguments.

    Raises:
        ValueError: It has none of a learner's parameters, or arguments are set that it does not heed.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, model in trained.items():
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise ValueError(
                f"`optimizers` has an optimizer without any parameter of the {name}, which would never be trained. "
                "Build it over both models, e.g. `AdamW([*teacher.parameters(), *student.parameters()])`, or pass "
                "`optimizer_cls_and_kwargs` and let the trainer build it."
            )
    for name in ("student_learning_rate", "student_weight_decay"):
        if getattr(args, name, None) is not None:
            raise ValueError(
                f"`{name}={getattr(args, name)}` has no effect on the optimizer that is passed as `optimizers`. Set "
                "it in the parameter groups of that optimizer, or pass `optimizer_cls_and_kwargs`."
            )
