"""Checks of the arguments and of the strategy to distribute the work."""

import inspect
import os
from collections.abc import Mapping, Sized
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..arguments import EMBEDDINGS, PER_LEARNER, DistillationArguments, greater_is_better
from ..edges import GATES, OPEN, held_out_edges
from ..graph import EDGES, ENSEMBLE, LEARNERS, PRETRAINED, Graph, copied_learner
from ..model_structure import is_peft_model
from ..tasks import Task, UnknownHead
from ..tasks.labels import TARGETS

#: Sizes in a `ParallelismConfig` of groups of processes that get the same rows, or parts of them.
_PARALLEL = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
#: Optimizers that estimate one step size from all their parameters, and so from both models.
_ONE_STEP_SIZE = ("DAdapt", "Prodigy")
#: The attributes of an optimizer that `add_param_group` keeps up to date.
_OF_GROUPS = ("param_groups", "state", "defaults")


def makes_student(value: Any) -> bool:
    """Tell whether a `student_model` is a function that makes the student from the teacher."""
    return callable(value) and not isinstance(value, (nn.Module, type))


def _takes_one(function: Any) -> bool:
    """Tell whether a function can be called with one argument and needs one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # nobody knows
        return True
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1 and needed[0].kind != needed[0].KEYWORD_ONLY


def check_kinds(given: Mapping[str, Any]) -> None:
    """Refuse what is no model in the place of a model, and a model in another place.

    Args:
        given: The trainer's arguments by name.

    Raises:
        ValueError: An argument is of another kind.
    """
    for argument in ("model", "student_model", "pretrained_teacher"):
        value, name = given.get(argument), getattr(given.get(argument), "__name__", "")
        if isinstance(value, type):
            problem = f"is the class {name}. Pass a model of it: `{name}.from_pretrained(...)` or `{name}(config)`"
        elif isinstance(value, PreTrainedConfig):
            problem = f"is a {type(value).__name__}. Pass a model: `AutoModelFor...from_config(config)`"
        elif makes_student(value):
            if argument == "student_model" and _takes_one(value):
                continue
            init = {"model": "model_init", "student_model": "student_model_init"}.get(argument, argument)
            problem = f"is the function {name}. Pass the model that it returns" + (
                f", or the function as `{init}`" if init != argument else ""
            )
            if argument == "student_model":
                problem += ". A function given as `student_model` takes the teacher and needs nothing else"
        else:
            continue
        raise ValueError(f"`{argument}` {problem}.")
    for argument in given.keys() - {"model", "student_model", "pretrained_teacher"}:
        if isinstance(given[argument], PreTrainedModel) or is_peft_model(given[argument]):
            raise ValueError(
                f"`{argument}` is a model ({type(given[argument]).__name__}). The arguments have Trainer's order, and "
                "the student is given by name: `CoDistillationTrainer(teacher, args, student_model=student, ...)`."
            )
    args = given.get("args")
    if args is not None and not isinstance(args, TrainingArguments):
        raise ValueError(
            f"`args` is a {type(args).__name__}. Pass `CoDistillationTrainingArguments(output_dir=...)` as the second "
            "argument, and the other arguments by name."
        )


def check_roles(arguments: DistillationArguments, given: Mapping[str, Any], may_have_targets: bool = False) -> None:
    """Refuse a model that is missing, given twice or has no use in the mode; see `check_before_loading`.

    Args:
        arguments: The distillation arguments.
        given: The trainer's arguments by name.
        may_have_targets: Whether the training data have, or may have, the column that takes the place of a frozen
            teacher.
    """
    mode, has = f"`distillation_mode='{arguments.distillation_mode}'`", {n for n, v in given.items() if v is not None}
    if {"student_model", "student_model_init"} <= has:
        raise ValueError("`student_model` and `student_model_init` are both given: pass one of them.")
    if {"student_model", "model_init"} <= has and not makes_student(given["student_model"]):
        raise ValueError(
            "`model_init` makes a new teacher for each training, and the student must be new as well: pass "
            "`student_model_init` instead of `student_model`, or a function of the teacher as `student_model`."
        )
    if not has & {"student_model", "student_model_init"}:
        raise ValueError(
            f"{mode} needs a student, and `student_model` is None. Pass `student_model` (a model, a name or a path) "
            "or `student_model_init`, or set `distillation_mode='standalone'` to train the teacher alone."
        )
    weights = " and ".join(f"`{edge.weight_name}`" for edge in EDGES if edge.source == PRETRAINED)
    if any(edge.source == PRETRAINED for edge in arguments.graph.features):
        weights = "`student_feature_weight`"
    from_column = arguments.graph.uses_pretrained and "pretrained_teacher" not in has
    others = {edge.source for edge in arguments.graph.features}.union(arguments.graph.members)
    if from_column and (PRETRAINED in others or not may_have_targets):
        raise ValueError(
            f"{mode} with its weights needs a frozen teacher, and `pretrained_teacher` is None. Pass "
            f"`pretrained_teacher`, give `train_dataset` its predictions as a column {TARGETS!r} (features and "
            f"ensembles need a model), or set {weights} to 0."
        )
    for argument in ("soft_loss_func", "pretrained_cache_dir"):
        if from_column and (argument in has or getattr(arguments, argument, None) is not None):
            raise ValueError(
                f"`{argument}` is given, and needs a frozen teacher that runs: `pretrained_teacher` is None, so that "
                f"only its logits are known, from the column {TARGETS!r}. Leave out `{argument}`."
            )
    held_out = [edge.weight_name for edge in held_out_edges(arguments.graph) if edge.source == PRETRAINED]
    if from_column and held_out:
        raise ValueError(
            f"`{held_out[0]}` follows from predictions for held-out rows, and `pretrained_teacher` is None, so that "
            f"those for training rows alone are known (the column {TARGETS!r}). Set the weight to a number, without "
            "the schedule 'burn-in'."
        )
    if "pretrained_teacher" in has and not arguments.graph.uses_pretrained:
        raise ValueError(
            f"A `pretrained_teacher` is given, but with {mode} nothing learns from it. Set "
            f"`distillation_mode='community'` (or one of {weights}), or leave it out."
        )
    if arguments.pretrained_cache_dir is not None and "soft_loss_func" in has:
        raise ValueError(
            f"`soft_loss_func` takes all outputs of the frozen teacher, and `pretrained_cache_dir="
            f"{arguments.pretrained_cache_dir!r}` keeps the logits alone. Leave out one of them."
        )


def why_no_warm_start(given: Mapping[str, Any]) -> str | None:
    """Tell why the teacher cannot be trained alone before the student is made from it; `None` if it can.

    Args:
        given: The trainer's arguments by name.
    """
    args, student = given.get("args"), given.get("student_model")
    alone = "train the teacher first, without a student and with `distillation_mode='standalone'`, and give its folder"
    if not makes_student(student):
        kind = "None" if student is None else f"a {type(student).__name__}"
        return (
            f"it needs a student that is made from the trained teacher, and `student_model` is {kind}. Pass a "
            "function: `student_model=lambda teacher: create_student(teacher, num_hidden_layers=3)`"
        )
    if given.get("model_init") is not None:
        return f"`model_init` would repeat it for every new teacher. Instead, {alone} to `model_init`"
    if any(each is not None for each in given.get("optimizers") or ()):
        return (
            "`optimizers` holds the parameters of a student that is replaced after it. Pass "
            "`optimizer_cls_and_kwargs`, or let the trainer make the optimizer"
        )
    if given.get("student_processing_class") is not None:
        return (
            "`student_processing_class` is for a student with another tokenizer, and the teacher gets batches without "
            f"the student's inputs. Instead, {alone} as `model`"
        )
    sharded = args.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded or args.fsdp:
        return f"FSDP and DeepSpeed divide the teacher among processes. Instead, {alone} as `model`"
    rows = given.get("train_dataset")
    if rows is not None and not isinstance(rows, Sized) and not args.warm_start_steps:
        return (
            f"`train_dataset` has no length, so that `warm_start_epochs={args.warm_start_epochs}` is no number of "
            "steps. Set `warm_start_steps`"
        )
    return None


def check_arguments(args: TrainingArguments | None) -> None:
    """Refuse arguments of Trainer that do not support two models at once."""
    if args is None:
        return
    _check_devices(args)
    _check_direction(args)
    metric = getattr(args, "student_metric_for_best_model", None)
    if metric is not None and args.eval_strategy == "no":
        raise ValueError(
            f"`student_metric_for_best_model={metric!r}` has no effect with `eval_strategy='no'`: nothing is ever "
            "evaluated. Set `eval_strategy` to 'steps' or 'epoch', or leave the metric out."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "`use_liger_kernel=True` replaces the loss inside one model, and co-distillation compares the logits of "
            "two. Set it to False."
        )
    if args.deepspeed_plugin is None:
        return
    set_by_learner = _set_by_learner(args)
    for name in (name for name in set_by_learner if name.endswith("max_grad_norm")):
        raise ValueError(
            f"`{name}={set_by_learner[name]}` has no effect with DeepSpeed, which clips both models by one norm "
            f"(`max_grad_norm={args.max_grad_norm}`). Leave it out, or use FSDP."
        )
    config = getattr(args.deepspeed_plugin, "deepspeed_config", None) or {}
    for name in set_by_learner if "optimizer" in config else ():
        raise ValueError(
            f"`{name}={set_by_learner[name]}` has no effect with the `optimizer` of the DeepSpeed config "
            f"({config['optimizer'].get('type')!r}), which has one setting for all parameters. Leave out one of them: "
            "without `optimizer` in the config Trainer makes it."
        )


def check_output_dir(output_dir: str, folder: str | os.PathLike, owner: str) -> None:
    """Refuse another output folder than the one that was given to the trainer of `owner`, as the message names it."""
    if os.path.realpath(output_dir) != os.path.realpath(folder):
        raise ValueError(
            f"The trainer of {owner} has `output_dir={output_dir!r}`: give it the folder that `make_trainer` is "
            f"passed, {str(folder)!r}."
        )


def check_evaluated(graph: Graph, args: TrainingArguments | None) -> None:
    """Refuse weights that follow from held-out rows where nothing is evaluated."""
    edges = held_out_edges(graph)
    if edges and (args is None or args.eval_strategy == "no"):
        edge, what = edges[0], f"schedule={edges[0].schedule!r}"
        given = f"`{edge.weight_name}='auto'`" if edge.auto else f"`{edge.name}_{what}`"
        given = "`ensemble='auto'`" if edge.source == ENSEMBLE and graph.fits_members else given
        raise ValueError(
            f"{given} follows from evaluations during the training, and `eval_strategy='no'`. Set `eval_strategy` to "
            "'steps' or 'epoch' and pass an `eval_dataset` with labels, or give the edge a number and no burn-in."
        )


def check_edges(task: Task, arguments: DistillationArguments, has_soft_loss: bool) -> None:
    """Refuse settings of edges that have no meaning for a task, or no effect beside the user's own soft loss."""
    held_out = held_out_edges(arguments.graph)
    for edge in arguments.graph.edges:
        given = {"rows", "temperature", "soft_loss"} & (arguments.edges or {}).get(edge.arrow, {}).keys()
        gated, problem = edge.gate != OPEN, None
        if has_soft_loss and (given or gated):
            name = min(given | ({"gate"} if gated else set()))
            problem = f"`{name}` has no effect on a `soft_loss_func`, which compares the predictions in its own way"
        elif gated and task.predicts_numbers and not GATES[edge.gate].of_numbers:
            problem = f"the gate {edge.gate!r} needs classes, and the models predict numbers"
        elif edge.rows == "unlabelled" and not task.per_row:
            problem = "`rows='unlabelled'` is for tasks of whole rows, and these models score tokens"
        elif edge.source == ENSEMBLE and has_soft_loss:
            problem = "`soft_loss_func` compares the outputs of two models, and an ensemble has none"
        elif isinstance(task, UnknownHead) and (gated or edge in held_out or edge.source == ENSEMBLE):
            problem = "of an unknown head it is not known which prediction is right"
        if problem is not None:
            raise ValueError(f"The settings of {edge.name} are not valid: {problem}. Leave the setting out.")


def check_strategy(
    accelerator: Accelerator,
    has_pretrained: bool,
    share: str | None,
    args: TrainingArguments | None = None,
    graph: Graph | None = None,
) -> None:
    """Refuse ways to distribute the work that do not support two models at once.

    Args:
        accelerator: Trainer's accelerator, with the plugins of the arguments and of `accelerate launch`.
        has_pretrained: Whether there is a frozen teacher outside of the pair.
        share: The training argument `share`.
        args: The trainer's arguments.
        graph: The edges.

    Raises:
        ValueError: A strategy is refused.
    """
    if args is not None:
        _check_devices(args)
    _check_parallelism(accelerator)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1 and not fsdp.use_orig_params:
        raise ValueError(
            "FSDP1 with `use_orig_params=False` joins parameters of both models into one, which can have neither "
            "two learning rates nor two gradient norms. Set `use_orig_params` to true, or `version` to 2."
        )
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    zero3 = deepspeed is not None and deepspeed.zero_stage == 3
    copies = [edge.source for edge in graph.edges if copied_learner(edge.source)] if graph is not None else []
    if copies and (fsdp is not None or zero3):
        raise ValueError(
            f"`edges` has the source {copies[0]!r}, a copy of whole weights, and "
            f"{'DeepSpeed ZeRO-3' if zero3 else 'FSDP'} shards the weights of the learner. Leave the edge out, or "
            "train with DDP or ZeRO-2."
        )
    if share is not None and (fsdp is not None or zero3):
        raise ValueError(
            f"`share={share!r}` gives both models the same parameters, and {'DeepSpeed ZeRO-3' if zero3 else 'FSDP'} "
            "shards a parameter with the layer that contains it. Leave `share` out, or train with DDP or ZeRO-2."
        )
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    if dynamo is not None and dynamo.backend != DynamoBackend.NO and share not in (None, EMBEDDINGS):
        raise ValueError(
            f"`share={share!r}` and `torch_compile` (backend {dynamo.backend.value.lower()!r}): the student takes the "
            "outputs of a shared layer from the teacher, which `torch.compile` does not follow. Leave one of them "
            f"out, or set `share={EMBEDDINGS!r}`."
        )
    if zero3 and has_pretrained:
        raise ValueError(
            "DeepSpeed ZeRO-3 shards only the models that it trains, and `pretrained_teacher` is not trained. Use "
            "FSDP2, which shards the frozen teacher too, or ZeRO-2, where each process holds it whole."
        )


def check_optimizer(
    optimizer: torch.optim.Optimizer | None,
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None,
    trained: Mapping[str, nn.Module],
    args: TrainingArguments | None,
) -> None:
    """Refuse an optimizer that lacks a trained learner, ignores arguments, or cannot hold several models."""
    if optimizer is None:
        _check_optimizer_class(getattr(args, "optim", None), optimizer_cls_and_kwargs)
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, model in trained.items():
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise ValueError(
                f"`optimizers` has an optimizer without any parameter of the {name}, which would never be trained. "
                "Build it over both models, e.g. `AdamW([*teacher.parameters(), *student.parameters()])`, or pass "
                "`optimizer_cls_and_kwargs` and let the trainer build it."
            )
    for name, value in _set_by_learner(args).items():
        if not name.endswith("max_grad_norm"):
            raise ValueError(
                f"`{name}={value}` has no effect on the optimizer that is passed as `optimizers`. Set it in the "
                "parameter groups of that optimizer, or pass `optimizer_cls_and_kwargs`."
            )


def _set_by_learner(args: TrainingArguments | None) -> dict[str, float]:
    """Return the arguments for one learner that are set (`student_learning_rate`, ...)."""
    names = [f"{learner}_{name}" for learner in LEARNERS for name in PER_LEARNER]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _check_devices(args: TrainingArguments) -> None:
    """Refuse a process with several devices."""
    if args.n_gpu > 1:
        raise ValueError(
            f"One process with {args.n_gpu} devices runs `nn.DataParallel`, which co-distillation does not support. "
            "Start one process per device with `torchrun` or `accelerate launch`, or show it one device with "
            "`CUDA_VISIBLE_DEVICES=0`."
        )


def _check_direction(args: TrainingArguments) -> None:
    """Refuse a direction of `metric_for_best_model` that nobody has given, if it is wrong or not known.

    A plain `TrainingArguments` has guessed it: larger is better unless the name ends with "loss".
    """
    metric, given = args.metric_for_best_model, args.greater_is_better
    known = None if metric is None else greater_is_better(metric)
    guessed = not isinstance(args, DistillationArguments) and given == (not str(metric).endswith("loss"))
    expected = given if known is None else known
    if metric is not None and (given is None or guessed) and (expected is None or bool(given) != expected):
        better = {None: "it is not known which value", True: "a larger value", False: "a smaller value"}[known]
        raise ValueError(
            f"`metric_for_best_model={metric!r}` and `greater_is_better={given}`: {better} is the better one. Set "
            f"`greater_is_better={'True or False' if known is None else known}`, or use "
            "`CoDistillationTrainingArguments`, which knows the usual metrics."
        )


def _check_optimizer_class(optim: Any, given: tuple[Any, dict[str, Any]] | None) -> None:
    """Refuse optimizers that are more than a class over parameter groups: LOMO, layer-wise ones, Muon, Prodigy."""
    optim = getattr(optim, "value", optim)
    if given is not None:
        optimizer_cls, bound = given[0], {"model", "optimizer_dict", "params"} & given[1].keys()
        if not isinstance(optimizer_cls, type) or not issubclass(optimizer_cls, torch.optim.Optimizer):
            named = (
                f"`optimizer_cls_and_kwargs` has {optimizer_cls!r}, which is no subclass of `torch.optim.Optimizer`"
            )
        elif bound:
            named = f"`optimizer_cls_and_kwargs` has {sorted(bound)} of one model"
        elif optimizer_cls.__name__.startswith(_ONE_STEP_SIZE):
            named = f"`optimizer_cls_and_kwargs` has {optimizer_cls!r}, which has one step size for all parameters"
        else:
            return
    elif str(optim).endswith(("lomo", "_layerwise")) or str(optim).startswith(("muon", "dion")):
        named = f"`optim={optim!r}` is more than a list of parameter groups"
    else:
        return
    raise ValueError(
        f"{named}, and co-distillation joins the parameter groups of two models. Choose another one, such as "
        "`optim='adamw_torch'`, or pass an optimizer over both models as `optimizers`."
    )


def check_joinable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of a user's `create_optimizer` that is more than its parameter groups.

    Raises:
        ValueError: It has one step size for all groups, or it keeps parameters or an optimizer that would not see the
            groups of another model.
    """

    def keeps(value: Any) -> bool:
        if isinstance(value, torch.optim.Optimizer):
            return value.param_groups is not optimizer.param_groups
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        return any(isinstance(item, torch.Tensor) or keeps(item) for item in items)

    kept = [name for name, value in vars(optimizer).items() if name not in _OF_GROUPS and keeps(value)]
    if kept or type(optimizer).__name__.startswith(_ONE_STEP_SIZE):
        why = f"keeps parameters in {kept}" if kept else "has one step size for all parameters"
        raise ValueError(
            f"`create_optimizer` of the trainer's class makes a {type(optimizer).__name__}, which {why}, and "
            "co-distillation joins the parameter groups of two models. Make another one there, or pass an optimizer "
            "over both models as `optimizers`."
        )


def _check_parallelism(accelerator: Accelerator) -> None:
    """Refuse processes that share rows: losses are divided by counts over all processes."""
    config = getattr(accelerator, "parallelism_config", None)
    for size, kind in _PARALLEL.items():
        if (getattr(config, size, None) or 1) > 1:
            raise ValueError(
                f"`parallelism_config` has `{size}={getattr(config, size)}`, and co-distillation does not support "
                f"{kind} parallelism: losses and gradient norms would be counted several times. Set it to 1, and "
                "train with DDP, FSDP or DeepSpeed ZeRO."
            )
