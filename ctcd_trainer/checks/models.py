"""Checks of the models: heads, shared parameters, adapters and quantised weights."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..graph import LEARNERS, PRETRAINED
from ..model_structure import config_of, count_parameters, is_peft_model, is_quantised, memory_of
from ..tasks import UnknownHead, find_task, named_task
from ..tasks.base import Task

logger = logging.get_logger(__name__)


def argument_of(name: str) -> str:
    """Name the trainer's argument that gives a learner or the frozen pre-trained teacher."""
    return {LEARNERS[0]: "model", PRETRAINED: "pretrained_teacher"}.get(name, f"{name}_model")


def check_models(
    models: Mapping[str, PreTrainedModel],
    given_task: Task | str | None = None,
    has_soft_loss: bool = False,
    may_share: bool = False,
) -> Task:
    """Refuse models that are not distinct or whose predictions cannot be compared.

    Args:
        models: The models by name, the primary learner first.
        given_task: The user's task or its name; by default the task of the model's class.
        has_soft_loss: Whether the user's function compares the outputs, so that any head is allowed.
        may_share: Whether learners may have parameters in common (`share`).

    Returns:
        The task of all models.

    Raises:
        ValueError: A model has no supported head, is divided among processes or is given twice, two models train the
            same parameter, or their heads do not fit together.
    """
    primary, *others = models
    teacher = models[primary]
    task = task_of(teacher, "model", given_task, has_soft_loss)
    _check_whole(teacher, "model")
    for index, name in enumerate(others):
        model, argument = models[name], argument_of(name)
        if type(task_of(model, argument, given_task, has_soft_loss)) is not type(task):
            raise ValueError(
                f"`model` is a {type(teacher).__name__} and `{argument}` is a {type(model).__name__}: their heads are "
                "for different tasks. Load both with the same `AutoModelFor...` class."
            )
        _check_whole(model, argument)
        before = {argument_of(other): models[other] for other in [primary, *others[:index]]}
        _check_distinct(before, model, argument, may_share and name in LEARNERS)
        if name in LEARNERS and count_parameters(model) > count_parameters(teacher):
            logger.warning(
                "`%s` has %d parameters, more than the %d of `model`: are they the wrong way round?",
                *(argument, count_parameters(model), count_parameters(teacher)),
            )
        if hasattr(teacher, "config") and hasattr(model, "config"):
            task.check_pair(teacher.config, model.config, argument)
    return task


def _check_distinct(before: Mapping[str, nn.Module], model: nn.Module, argument: str, may_share: bool) -> None:
    """Refuse a model that is an earlier model, or trains a parameter of an earlier model."""
    for other, value in before.items():
        if value is model:
            raise ValueError(
                f"`{other}` and `{argument}` are the same object: a model cannot learn from itself. Pass two models, "
                "e.g. `student_model=create_student(model, num_hidden_layers=3)`."
            )
    ours = _storage_of(model)
    for other, value in before.items():
        theirs = {} if may_share else _storage_of(value)
        # Frozen parameters may be shared: the base of adapters of both.
        for memory in (memory for memory in ours if memory in theirs and (ours[memory][1] or theirs[memory][1])):
            raise ValueError(
                f"`{other}` and `{argument}` share a parameter (`{theirs[memory][0]}` and `{ours[memory][0]}`): each "
                "step would update it for both. Copy the weights instead, e.g. with `copy.deepcopy`, or set `share`."
            )


def _check_whole(model: nn.Module, argument: str) -> None:
    """Refuse a model that was divided among processes when it was loaded (tensor or expert parallelism)."""
    name = next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)
    if name is not None:
        raise ValueError(
            f"`{argument}` is divided among processes: its parameter `{name}` is a DTensor. Losses and gradient norms "
            "would be counted several times. Load it without `distributed_config` or `tp_plan`, and train with DDP, "
            "FSDP or DeepSpeed ZeRO."
        )


def task_of(model: PreTrainedModel, argument: str, given_task: Task | str | None, has_soft_loss: bool) -> Task:
    """Return the given task, or the task of a model's head; see `check_models`."""
    if given_task is not None:
        return named_task(given_task, config_of(model))
    try:
        return find_task(model, argument)
    except ValueError:
        if has_soft_loss:
            return UnknownHead(config_of(model))
        raise


def _storage_of(model: nn.Module) -> dict[int, tuple[str, bool]]:
    """Map the memory address of each parameter to its name and whether it is trained."""
    return {
        memory_of(parameter): (name, parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if parameter.device.type != "meta" and parameter.numel() > 0
    }


def check_adapters(argument: str, model: nn.Module) -> None:
    """Refuse adapters that transformers has added: its Trainer saves them and cannot load them again."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`{argument}` contains the adapters {sorted(model.peft_config)} of `add_adapter` or `load_adapter`, "
            "which cannot be loaded again from a checkpoint. Wrap the model instead (`peft.get_peft_model` or "
            "`PeftModel.from_pretrained`)."
        )


def check_trainable(learner: str, model: nn.Module, mode: str) -> None:
    """Refuse a learner that the mode trains and that has no parameter to train."""
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


def check_frozen(learner: str, model: nn.Module, mode: str) -> None:
    """Refuse a learner that the mode freezes and that has adapters to train, or cannot be run or saved."""
    if is_peft_model(model) and model.peft_type == "ADALORA" and not hasattr(model.base_model, "rankallocator"):
        raise ValueError(
            f"The {learner} has an AdaLoRA that was loaded with `is_trainable=False`. PEFT computes no loss for it, "
            "not even in evaluation. Merge it (`merge_and_unload`), or load it with `is_trainable=True` and call "
            "`requires_grad_(False)`."
        )
    if is_quantised(model) and not is_peft_model(model) and not model.hf_quantizer.is_serializable():
        raise ValueError(
            f"The {learner} is saved with the pair, and its weights are quantised by a method that cannot save them "
            f"({model.config.quantization_config.quant_method}). Quantise it with another method. To learn from it "
            "only, pass it as `pretrained_teacher`, which is not saved."
        )
    if is_peft_model(model) and any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"The {learner} has adapters to train, and `distillation_mode='{mode}'` freezes it. Choose a mode that "
            f"trains the {learner}, or load its adapters as `PeftModel.from_pretrained(..., is_trainable=False)` does."
        )


def check_source(name: str, model: nn.Module) -> None:
    """Refuse a frozen model whose head was drawn at random when `from_pretrained` loaded it.

    `from_pretrained` marks the weights that it has read. A new bias is 0, and training changes it. A new head without
    a bias cannot be told from a trained one, so it is only reported. Models that were not loaded have no marks.
    """
    parameters = dict(model.named_parameters())
    read = {key for key, value in parameters.items() if getattr(value, "_is_hf_initialized", False)}
    body = f"{getattr(model, 'base_model_prefix', '')}."
    new = {key: value for key, value in parameters.items() if key not in read and not key.startswith(body)}
    if not read or not new or is_peft_model(model):
        return
    biases = [value for key, value in new.items() if key.endswith("bias")]
    argument = argument_of(name)
    message = untrained(f"`{argument}`", argument, new)
    if biases and not any(value.is_meta or value.numel() == 0 or value.any() for value in biases):
        raise ValueError(message)
    if not biases:
        logger.warning("%s Do not mind this if you have trained it since it was loaded.", message)


def untrained(source: str, argument: str, missing: Iterable[str]) -> str:
    """Return the message about a frozen model (`source`, given as `argument`) without some trained weights."""
    return (
        f"{source} is frozen, and has no trained weights for {sorted(missing)}: they are newly initialized, so its "
        "predictions would be random. First train the model alone: `Trainer(model, args, train_dataset=...).train()`. "
        f"Save it: `model.save_pretrained('trained')`. Then learn from it: `{argument}='trained'`."
    )


def check_prompts(learners: Mapping[str, nn.Module], why: str) -> None:
    """Refuse adapters that PEFT does not save whole and that are loaded again.

    Args:
        learners: The models by name.
        why: The reason for which they are loaded, for the message.

    Raises:
        ValueError: A network makes the virtual tokens of an adapter (`PromptEncoderConfig`, or `PrefixTuningConfig`
            with `prefix_projection`). PEFT saves the tokens without the network, so the training could not go on.
    """
    for name, model in learners.items():
        encoders = getattr(model, "prompt_encoder", {})
        lost = [
            key for encoder in encoders.values() for key, _ in encoder.named_parameters() if key != "embedding.weight"
        ]
        if is_peft_model(model) and lost:
            raise ValueError(
                f"{why} loads the adapter of the {name}, and PEFT saves the output of its prompt encoder without "
                f"{lost[:2]} ({len(lost)} in all). Use `PromptTuningConfig`, or `prefix_projection=False`."
            )
