"""Checks of the models, made before any work starts. Each error names both values and a remedy."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..model_structure import count_parameters, is_peft_model, is_quantised, memory_of
from ..tasks import UnknownHead, find_task, named_task
from ..tasks.base import Task

logger = logging.get_logger(__name__)


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
