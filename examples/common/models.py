"""The models and tokenizers of the example scripts: loading, cutting, adapters, and the length of their inputs."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ctcd_trainer import CoDistillationTrainingArguments, create_student, estimate
from ctcd_trainer.model_structure import most_positions

from .arguments import LabelledModelArguments, ModelArguments, logger

#: PEFT's names of the tasks whose heads it trains and saves as a whole, by the end of the name of the model's class.
PEFT_TASKS: Mapping[str, str] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class OutputLabels(Protocol):
    """The meaning of the outputs of a head."""

    #: Names of the labels in the order of the outputs.
    names: tuple[str, ...]

    @property
    def for_config(self) -> dict[str, Any]:
        """Settings of a config."""

    def same_order(self, config: PreTrainedConfig) -> bool:
        """Tell whether the outputs of a model with this config mean the same."""


# ---- Loading ----


def load_config(model_args: ModelArguments, option: str = "model_name_or_path") -> PreTrainedConfig:
    """The saved config of the model that an argument names."""
    elsewhere = model_args.config_name if option == "model_name_or_path" else None
    return AutoConfig.from_pretrained(elsewhere or getattr(model_args, option), **model_args.hub_options(option))


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher, and of the student unless that has another one."""
    return AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, **model_args.hub_options()
    )


def load_fast_tokenizer(model_args: ModelArguments, lack: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer that pads on the right: padding on the left would move the tokens that are looked up later.

    Args:
        model_args: The arguments.
        lack: What other tokenizers cannot tell, for the message.

    Raises:
        ValueError: The tokenizer is not a fast one.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", **model_args.hub_options())
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell {lack}: name a model with a fast tokenizer in "
            "`--tokenizer_name`."
        )
    return tokenizer


def load_student_tokenizer(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a named student; `None` if the model has none, or if it is the teacher's."""
    option = "student_model_name_or_path"
    if getattr(model_args, option) is None:
        return None
    try:
        found = AutoTokenizer.from_pretrained(getattr(model_args, option), **model_args.hub_options(option))
    except (OSError, ValueError):
        return None
    return None if found.get_vocab() == tokenizer.get_vocab() else found


def load_model(
    option: str, frozen: bool, auto_class: type, model_args: ModelArguments, seed: int, **options: Any
) -> PreTrainedModel:
    """Load a model. If the checkpoint has no head for the task, a new one is drawn with the seed if it is trained.

    Args:
        option: Name of the argument that names the model.
        frozen: Whether the model is not trained.
        auto_class: The `AutoModelFor...` class.
        model_args: The arguments.
        seed: The seed, set again for each model: a model starts the same whether it is trained alone or with another.
        **options: Further arguments of `from_pretrained` (`config`, ...).

    Raises:
        ValueError: The model is frozen, and its checkpoint has no head for the task.
    """
    name = getattr(model_args, option)
    set_seed(seed)
    model, report = auto_class.from_pretrained(
        name, output_loading_info=True, **model_args.hub_options(option), **options
    )
    if frozen and report["missing_keys"]:
        raise ValueError(
            f"`--{option} {name}` is frozen, and has no trained weights for {sorted(report['missing_keys'])}: they "
            "are newly initialized, so its predictions would be random. First train it alone with this script, "
            f"without a student: `--model_name_or_path {name} --distillation_mode standalone --output_dir trained`. "
            f"Then learn from it: `--{option} trained`."
        )
    return model


def load_labelled_model(
    option: str, frozen: bool, auto_class: type, model_args: LabelledModelArguments, labels: OutputLabels, seed: int
) -> PreTrainedModel:
    """Load a model with a head for these labels; see `load_model`.

    Raises:
        ValueError: The model is frozen, and its outputs mean other labels.
    """
    config = load_config(model_args, option)
    if not labels.same_order(config):
        message = (
            f"`--{option} {getattr(model_args, option)}` was trained with the labels "
            f"{list(config.id2label.values())}, not {list(labels.names)}."
        )
        if frozen:
            raise ValueError(f"{message} It is frozen in this mode, so what it teaches would be wrong.")
        logger.warning("%s Its outputs get the new meaning in this training.", message)
    for key, value in labels.for_config.items():
        setattr(config, key, value)
    sizes = {"ignore_mismatched_sizes": model_args.ignore_mismatched_sizes}
    return load_model(option, frozen, auto_class, model_args, seed, config=config, **sizes)


def load_models(
    model_args: ModelArguments,
    training_args: CoDistillationTrainingArguments,
    load: Callable[[str, bool], PreTrainedModel],
) -> dict[str, Any]:
    """The models by the name of their argument of `CoDistillationTrainer`; a function for a student that is cut.

    Args:
        model_args: The arguments.
        training_args: The arguments that say which models are frozen.
        load: Makes a model, given the name of the argument that names it and whether it is frozen.
    """
    graph = training_args.graph
    warm = training_args.warm_start and model_args.cut_by_trainer
    frozen = {"model": "teacher" in graph.frozen and not warm, "student_model": "student" in graph.frozen}
    models = {argument: load(option, frozen.get(argument, True)) for argument, option in model_args.sources.items()}
    finish = partial(finish_student, model_args, training_args.seed)
    if model_args.cut_by_trainer:
        models["student_model"] = finish
    elif model_args.has_student:
        models["student_model"] = finish(models["model"], models.get("student_model"))
    if model_args.lora_r is not None:
        set_seed(training_args.seed)
        models["model"] = with_adapters(models["model"], model_args.lora_r, model_args.lora_target_modules)
    return models


def finish_student(
    model_args: ModelArguments, seed: int, teacher: PreTrainedModel, student: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The student as it is trained: cut from the teacher if there is none, and with its adapters.

    Args:
        model_args: The arguments.
        seed: Seed of new weights.
        teacher: The teacher, without adapters.
        student: The student, if it is not cut from the teacher.
    """
    if student is None:
        if model_args.student_init == "random":
            set_seed(seed)
        student = create_student(teacher, **model_args.cuts)
    for argument, model in (("model", teacher), ("student_model", student)):
        logger.info("%s: %s", argument, estimate(model))
    if model_args.student_lora_r is None:
        return student
    set_seed(seed)
    return with_adapters(student, model_args.student_lora_r, model_args.lora_target_modules)


def with_adapters(model: PreTrainedModel, rank: int, target_modules: str | None) -> PreTrainedModel:
    """The model inside PEFT. Only its LoRA adapters (of scale 2), and a new head, are trained.

    Args:
        model: The model.
        rank: Rank of the adapters.
        target_modules: Names of modules with commas between, or `all-linear`; `None` for PEFT's choice for the family.
    """
    from peft import LoraConfig, get_peft_model

    names = target_modules
    if target_modules is not None and target_modules != "all-linear":
        names = target_modules.split(",")
    task_type = next((task for end, task in PEFT_TASKS.items() if type(model).__name__.endswith(end)), None)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type=task_type))


# ---- The length of inputs ----


def limits_of_length(tokenizer: PreTrainedTokenizerBase, models: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Return the largest numbers of tokens of the tokenizer and the models, with the names of these."""
    yield tokenizer.model_max_length, "the tokenizer"
    for argument, model in models.items():
        if not isinstance(model, nn.Module):  # a student that will be cut from the teacher
            continue
        limit = most_positions(model)
        if limit is None:  # positions without a table (rotary ones)
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None:
            yield limit, f"`{argument}`"


def allowed_length(
    option: str, wanted: int | None, tokenizer: PreTrainedTokenizerBase, models: Mapping[str, Any]
) -> int:
    """The wanted number of tokens, or with a warning the smaller number that tokenizer and models take.

    Args:
        option: Name of the argument that gave the number.
        wanted: The number; `None` stands for 1024, without a warning.
        tokenizer: The tokenizer.
        models: The models by the name of their argument of `CoDistillationTrainer`.
    """
    limit, owner = min(limits_of_length(tokenizer, models))
    if wanted is None:
        return min(1024, limit)
    if wanted > limit:
        logger.warning("`--%s %d` is more than %s allows. Using %d.", option, wanted, owner, limit)
    return min(wanted, limit)
