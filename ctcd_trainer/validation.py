"""Checks of what the user passes, made before any work starts. Each error names both values and a remedy."""

import os
from collections.abc import Collection, Mapping, Sized
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from .graph import Graph
from .labels import LABEL_COLUMNS
from .measuring import count_parameters
from .shared_parts import EMBEDDINGS
from .task import Task
from .tasks import UnknownHead, find_task, named_task
from .training_args import DistillationArguments
from .wrapping import is_peft_model, is_quantised, memory_of

logger = logging.get_logger(__name__)


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
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO and share not in (None, EMBEDDINGS):
        raise ValueError(
            f"`share={share!r}` and `torch_compile` (backend {backend.value.lower()!r}): the student is handed what a "
            "shared layer has given to the teacher, which `torch.compile` does not follow. Leave one of them out, or "
            f"set `share={EMBEDDINGS!r}`."
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


def check_models(
    teacher: PreTrainedModel,
    others: Mapping[str, PreTrainedModel],
    given_task: Task | str | None = None,
    has_soft_loss: bool = False,
    may_share: bool = False,
) -> Task:
    """The models must be distinct and their predictions comparable.

    Args:
        teacher: The teacher.
        others: The other models by the name of their argument.
        given_task: The user's task, or the name of one; by default it is recognised by the class of the models.
        has_soft_loss: Whether the user's own function compares the outputs, so that any head will do.
        may_share: Whether teacher and student may have parameters in common (`share`).

    Returns:
        The task of all of them.

    Raises:
        ValueError: One is no model with a supported head, one is given twice, two train the same parameter, or their
            heads do not fit together.
    """
    task = task_of(teacher, "model", given_task, has_soft_loss)
    models = {"model": teacher}
    owners = _storage_of(teacher, "model")
    for argument, model in others.items():
        if type(task_of(model, argument, given_task, has_soft_loss)) is not type(task):
            raise ValueError(
                f"`model` is a {type(teacher).__name__} and `{argument}` is a {type(model).__name__}: their heads are "
                "for different tasks. Load both with the same `AutoModelFor...` class."
            )
        for other, value in models.items():
            if value is model:
                raise ValueError(
                    f"`{other}` and `{argument}` are the same object: a model cannot learn from itself. Pass two "
                    "models, e.g. `student_model=create_student(model, num_hidden_layers=3)`."
                )
        own = _storage_of(model, argument)
        # Frozen ones may be the base of adapters of both.
        shared = next((each for each in own if each in owners and (own[each][2] or owners[each][2])), None)
        if shared is not None and not (may_share and argument == "student_model"):
            (other, other_name, _), (_, name, _) = owners[shared], own[shared]
            raise ValueError(
                f"`{other}` and `{argument}` share a parameter (`{other_name}` and `{name}`): each step would update "
                "it for both. Copy the weights instead, e.g. with `copy.deepcopy`, or set `share`."
            )
        models[argument] = model
        owners |= own
        if argument == "student_model" and count_parameters(model) > count_parameters(teacher):
            logger.warning(
                "`student_model` has %d parameters, more than the %d of `model`: are they the wrong way round?",
                *(count_parameters(model), count_parameters(teacher)),
            )
        task.check_pair(teacher.config, model.config, argument)
    return task


def task_of(model: PreTrainedModel, argument: str, given_task: Task | str | None, has_soft_loss: bool) -> Task:
    """The task of a model: the given one, or the one of its head; see `check_models`."""
    if given_task is not None:
        return named_task(given_task, model.config)
    try:
        return find_task(model, argument)
    except ValueError:
        if has_soft_loss and hasattr(model, "config"):
            return UnknownHead(model.config)
        raise


def _storage_of(model: nn.Module, argument: str) -> dict[int, tuple[str, str, bool]]:
    """The memory that a model's parameters lie in, with the argument, the name of one, and whether it is trained."""
    return {
        memory_of(parameter): (argument, name, parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if parameter.device.type != "meta" and parameter.numel() > 0
    }


def check_trainable(learner: str, model: nn.Module, mode: str) -> None:
    """A learner that the mode trains must have something to train.

    Raises:
        ValueError: None of its parameters requires gradients, or it is quantised and has no adapters.
    """
    if is_quantised(model) and not is_peft_model(model):
        raise ValueError(
            f"`distillation_mode='{mode}'` trains the {learner}, whose weights are quantised "
            f"({model.config.quantization_config.quant_method}), so that most of them cannot be trained. Put adapters "
            f"on it (`peft.get_peft_model`), or choose a mode that freezes the {learner}."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"`distillation_mode='{mode}'` trains the {learner}, but none of its parameters has `requires_grad=True` "
            "(an earlier trainer may have frozen it). Call `requires_grad_(True)` on it, or choose a mode that "
            f"freezes the {learner}."
        )


def check_adapters(argument: str, model: nn.Module) -> None:
    """Adapters must be PEFT's own model around the one that they are for.

    Raises:
        ValueError: They were added by transformers, whose Trainer saves them and cannot load them again.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`{argument}` has the adapters {sorted(model.peft_config)} inside of it, as `add_adapter` or "
            "`load_adapter` put them there: they could not be loaded again from a checkpoint. Wrap the model instead "
            "(`peft.get_peft_model` or `PeftModel.from_pretrained`)."
        )


def check_frozen(learner: str, model: nn.Module, mode: str) -> None:
    """Adapters are there to be trained, so a learner that the mode freezes may have none that waits for it.

    Raises:
        ValueError: It has adapters with parameters that require gradients, weights that cannot be saved, or an
            AdaLoRA that was loaded to predict only.
    """
    if is_peft_model(model) and model.peft_type == "ADALORA" and not hasattr(model.base_model, "rankallocator"):
        raise ValueError(
            f"The {learner} has an AdaLoRA that was loaded with `is_trainable=False`, of which PEFT computes no loss, "
            "not even to evaluate it. Merge it (`merge_and_unload`), or load it with `is_trainable=True` and call "
            "`requires_grad_(False)`."
        )
    if is_quantised(model) and not is_peft_model(model) and not model.hf_quantizer.is_serializable():
        raise ValueError(
            f"The {learner} is saved with the pair, and its weights are quantised by a method that cannot save them "
            f"({model.config.quantization_config.quant_method}). Quantise it with another one, or, to learn from it "
            "alone, pass it as `pretrained_teacher`, which is not saved."
        )
    if is_peft_model(model) and any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"The {learner} has adapters to train, and `distillation_mode='{mode}'` freezes it. Choose a mode that "
            f"trains the {learner}, or load its adapters as `PeftModel.from_pretrained(..., is_trainable=False)` does."
        )


def check_prompts(learners: Mapping[str, nn.Module], why: str) -> None:
    """Models whose adapters are loaded again must have adapters that PEFT saves whole.

    Args:
        learners: The models by name.
        why: Why they are loaded, for the message.

    Raises:
        ValueError: One has virtual tokens that a network makes (`PromptEncoderConfig`, or `PrefixTuningConfig` with
            `prefix_projection`): PEFT saves the tokens without it, so the training could not go on from them.
    """
    for name, model in learners.items():
        encoders = getattr(model, "prompt_encoder", {})
        lost = [
            key for encoder in encoders.values() for key, _ in encoder.named_parameters() if key != "embedding.weight"
        ]
        if is_peft_model(model) and lost:
            raise ValueError(
                f"{why} loads the adapter of the {name}, and of its prompt encoder PEFT saves what comes out, without "
                f"{lost[:2]} ({len(lost)} in all). Use `PromptTuningConfig`, or `prefix_projection=False`."
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


def check_vocabularies(
    teacher: PreTrainedModel, other: PreTrainedModel | None, argument: str, processing_class: Any
) -> None:
    """Both models receive the same token ids, so the ids must mean the same to both.

    Models whose embeddings are padded to different sizes over one tokenizer are accepted. Nothing is fetched: the
    other model's tokenizer is compared where it lies in the folder that the model was loaded from or in the cache.

    Args:
        teacher: The teacher.
        other: The model that is paired with it, if there is one.
        argument: Name of the argument that gave it.
        processing_class: The trainer's; it counts if it is a tokenizer or has one. Without one, the tokenizer that the
            teacher was saved with stands for it.

    Raises:
        ValueError: The tokenizers differ, or the sizes do and the difference is no padding.
    """
    if other is None:
        return
    sizes = {"model": vocabulary_size(teacher), argument: vocabulary_size(other)}
    if None in sizes.values():
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    named = "`processing_class`"
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer, named = _saved_tokenizer(teacher), "`model`"
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        own = _saved_tokenizer(other)
        tokens, other_tokens = (
            {index: token for token, index in one.get_vocab().items()} if one is not None else {}
            for one in (tokenizer, own)
        )
        # Ids that only one of them has are added tokens; whether the embeddings reach that far is checked below.
        different = [
            index for index in sorted(tokens.keys() & other_tokens.keys()) if tokens[index] != other_tokens[index]
        ]
        if different:
            first = "; ".join(
                f"id {index} is {other_tokens[index]!r} for one and {tokens[index]!r} for the other"
                for index in different[:3]
            )
            raise ValueError(
                f"`{argument}` was trained with another tokenizer than {named}: {own.name_or_path!r} has "
                f"{len(other_tokens)} tokens and {tokenizer.name_or_path!r} has {len(tokens)}, and {first}. "
                "Choose a model that shares the tokenizer, or cut one from the teacher with `create_student`."
            )
        if all(_is_padded(size, len(tokenizer)) for size in sizes.values()):
            return
        for name, size in sizes.items():
            if size < len(tokenizer):
                raise ValueError(
                    f"`{name}` has `vocab_size={size}`, and the tokenizer has {len(tokenizer)} tokens: ids beyond the "
                    f"embeddings of `{name}` would occur. Pass a model of the tokenizer's vocabulary."
                )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"`model` has `vocab_size={sizes['model']}` and `{argument}` has `vocab_size={sizes[argument]}`: they "
            "receive the same token ids, which would mean different tokens to them. Choose a model that shares the "
            "tokenizer, or cut one from the teacher with `create_student`."
        )


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Number of token ids that a model's config states; `None` for a model of other inputs (images, audio)."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _is_padded(size: int, num_tokens: int) -> bool:
    """Whether a vocabulary size is the tokenizer's, or that one rounded up as is usual (to multiples of 8 or more)."""
    return size == num_tokens or (size % 8 == 0 and 0 < size - num_tokens < 1024)


def _saved_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a model was saved with, if it is in a local folder or in the cache of the Hub."""
    name = getattr(model.config, "name_or_path", "")
    if not name or (os.path.isdir(name) and not os.path.isfile(os.path.join(name, "tokenizer_config.json"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # the folder or the cache has none
        return None


def check_dataset(dataset: Any, argument: str) -> None:
    """A data set, or each of a dict of data sets, must have examples.

    Raises:
        ValueError: It is empty.
    """
    if isinstance(dataset, Mapping):
        for name, part in dataset.items():
            check_dataset(part, f"{argument}[{name!r}]")
    elif isinstance(dataset, Sized) and len(dataset) == 0:
        raise ValueError(f"`{argument}` is empty (0 examples). Check the file, the split or the filter it comes from.")


def check_labels(task: Task, dataset: Any, argument: str, learning: Collection[str] = ()) -> None:
    """The labels of a data set that has them at hand (a `datasets.Dataset` or a list of dicts) must fit the task.

    Other data sets (iterable, or computed on the fly) would have to be read whole, so they are not checked here.

    Args:
        task: The task.
        dataset: The data set.
        argument: Name of the argument that gave it.
        learning: The models that learn from others, and so from rows without a label too.

    Raises:
        ValueError: A label does not fit the task, or there is none and nothing else to learn from; the message has the
            row and the value.
    """
    if isinstance(dataset, Mapping):
        for name, part in dataset.items():
            check_labels(task, part, f"{argument}[{name!r}]", learning)
        return
    labels = None
    if hasattr(dataset, "column_names") and isinstance(dataset, Sized):
        column = next((name for name in LABEL_COLUMNS if name in (dataset.column_names or ())), None)
        labels = dataset.with_format(None)[column] if column else None
    elif isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], Mapping):
        column = next((name for name in LABEL_COLUMNS if name in dataset[0]), None)
        labels = [row[column] for row in dataset] if column else None
    if labels is not None:
        try:
            task.check_labels(labels)
            unlabelled = np.flatnonzero(task.unlabelled_rows(labels)) if task.per_row else ()
            if len(unlabelled) and argument == "train_dataset" and not learning:
                raise ValueError(
                    f"Row {unlabelled[0]} and {len(unlabelled) - 1} more have no label ({labels[unlabelled[0]]!r}), "
                    "and no model learns from another one in this mode. Drop these rows, or choose a mode with soft "
                    "losses (`distillation_mode='ctcd'`)."
                )
            if len(unlabelled):
                logger.warning(
                    "%d of %d rows of `%s` have no label (%r): only the soft losses use them%s.",
                    *(len(unlabelled), len(labels), argument, labels[unlabelled[0]]),
                    f", which train the {' and the '.join(learning)}" if argument == "train_dataset" else "",
                )
        except ValueError as error:
            raise ValueError(f"`{argument}`: {error}") from error
