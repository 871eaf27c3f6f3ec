"""The models of the example scripts: their arguments, loading or cutting them, and how long their inputs may be."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

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

#: The logger of all example scripts, whichever of them is run.
logger = logging.getLogger("examples")

#: The argument that names each model, by the argument of `CoDistillationTrainer` that the model is passed to.
MODEL_OPTIONS: Mapping[str, str] = {
    "model": "model_name_or_path",
    "student_model": "student_model_name_or_path",
    "pretrained_teacher": "pretrained_teacher_name_or_path",
}

#: The sizes of a student that is cut from the teacher, as `create_student` names them.
STUDENT_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")

#: What PEFT calls the tasks whose heads it trains and saves as a whole, by the end of the name of the class.
PEFT_TASKS: Mapping[str, str] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# ---- Arguments ----


@dataclass
class ModelArguments:
    """Which models are trained, and where they come from. A script adds what is special to it in a subclass."""

    model_name_or_path: str = field(metadata={"help": "The teacher: a folder or the name of a model on the Hub."})
    student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The student: a folder or the name of a model with the same tokenizer."}
    )
    student_num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Cut the student from the teacher, with this number of its layers."}
    )
    student_hidden_size: int | None = field(
        default=None, metadata={"help": "Cut the student from the teacher, with hidden states of this width."}
    )
    student_intermediate_size: int | None = field(
        default=None, metadata={"help": "Cut the student from the teacher, with feed-forward layers of this width."}
    )
    student_num_attention_heads: int | None = field(
        default=None, metadata={"help": "Cut the student from the teacher, with this number of heads."}
    )
    student_layers: str = field(
        default="uniform",
        metadata={
            "help": "Layers that the student keeps of the teacher: uniform, first, last, or indices as in 0,2,5."
        },
    )
    student_init: Literal["copy", "shared", "random"] = field(
        default="copy",
        metadata={
            "help": "Whether a student that is cut from the teacher has its weights, or random ones; `shared` is one "
            "frozen base in memory for both, with adapters for each."
        },
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Freeze the teacher, and train LoRA adapters of this rank and its head."}
    )
    student_lora_r: int | None = field(
        default=None, metadata={"help": "Freeze the student, and train LoRA adapters of this rank and its head."}
    )
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "The modules that get adapters: names with commas between, or all-linear. Default: what PEFT "
            "has for the family."
        },
    )
    pretrained_teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A frozen model, trained on this task before, from which both learn (`community`)."},
    )
    config_name: str | None = field(default=None, metadata={"help": "The teacher's config, if it is elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, if not the teacher's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the teacher and its tokenizer on the Hub."}
    )
    token: str | None = field(
        default=None, metadata={"help": "Token for the Hub. Default: the one of `hf auth login`."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run the code that a model on the Hub brings with it."}
    )

    #: The arguments of which each gives a student.
    student_options: ClassVar[tuple[str, ...]] = (
        "student_model_name_or_path",
        *(f"student_{name}" for name in STUDENT_SIZES),
    )

    def __post_init__(self) -> None:
        given = [f"student_{name}" for name in STUDENT_SIZES if self._own(name) is not None]
        given += ["student_layers"] if isinstance(self._layers, list) else []
        if self.student_model_name_or_path is not None and given:
            raise ValueError(f"`--student_model_name_or_path` and `--{given[0]}` both give a student: choose one.")
        unused = [name for name, default in (("layers", "uniform"), ("init", "copy")) if self._own(name) != default]
        if unused and not given:
            raise ValueError(
                f"`--student_{unused[0]} {self._own(unused[0])}` is for a student that is cut from the teacher: give "
                "its `--student_num_hidden_layers` as well, or leave it out."
            )
        self._check_adapters()

    def _check_adapters(self) -> None:
        ranks = {"lora_r": self.lora_r, "student_lora_r": self.student_lora_r}
        for name, rank in ranks.items():
            if rank is not None and rank < 1:
                raise ValueError(f"`--{name} {rank}` is not valid: a rank is 1 or more.")
        if self.student_lora_r is not None and not self.has_student:
            raise ValueError(f"`--student_lora_r {self.student_lora_r}` needs a student, and none is given.")
        if self.student_init == "shared" and None in ranks.values():
            raise ValueError(
                "`--student_init shared` is one frozen base for both models, which adapters alone can train: give "
                f"`--{'lora_r' if self.lora_r is None else 'student_lora_r'}` as well, or leave it out."
            )
        if self.lora_target_modules is not None and self.lora_r is self.student_lora_r is None:
            raise ValueError(
                f"`--lora_target_modules {self.lora_target_modules}` is for adapters: give `--lora_r` or "
                "`--student_lora_r` as well, or leave it out."
            )

    def _own(self, name: str) -> Any:
        return getattr(self, f"student_{name}")

    @property
    def cuts(self) -> dict[str, Any] | None:
        """Arguments of `create_student`; `None` if the student is not cut from the teacher."""
        sizes = {name: self._own(name) for name in STUDENT_SIZES}
        if all(size is None for size in sizes.values()) and not isinstance(self._layers, list):
            return None
        return {**sizes, "layers": self._layers, "init": self.student_init}

    @property
    def _layers(self) -> str | list[int]:
        listed = re.fullmatch(r"\d+(,\d+)*", self.student_layers)
        return [int(index) for index in self.student_layers.split(",")] if listed else self.student_layers

    @property
    def has_student(self) -> bool:
        """Whether there is a second model."""
        return self.cuts is not None or any(getattr(self, option) is not None for option in self.student_options)

    @property
    def sources(self) -> dict[str, str]:
        """The argument that names each model which is loaded, by the argument of `CoDistillationTrainer`."""
        return {argument: option for argument, option in MODEL_OPTIONS.items() if getattr(self, option) is not None}

    def hub_options(self, option: str = "model_name_or_path") -> dict[str, Any]:
        """Arguments of `from_pretrained` for the model that an argument names; the revision is the teacher's alone."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision if option == "model_name_or_path" else "main",
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class LabelledModelArguments(ModelArguments):
    """Which models are trained, and where they come from, for heads with an output for each label."""

    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Whether a head with another number of labels is replaced by a new one."}
    )


class OutputLabels(Protocol):
    """What the outputs of a head mean."""

    #: Names of the labels in the order of the outputs.
    names: tuple[str, ...]

    @property
    def for_config(self) -> dict[str, Any]:
        """Settings of a config."""

    def same_order(self, config: PreTrainedConfig) -> bool:
        """Whether the outputs of a model with this config mean the same."""


# ---- Models ----


def load_config(model_args: ModelArguments, option: str = "model_name_or_path") -> PreTrainedConfig:
    """The config of a model as it was saved.

    Args:
        model_args: The arguments.
        option: Name of the argument that names the model.
    """
    own = model_args.config_name if option == "model_name_or_path" else None
    return AutoConfig.from_pretrained(own or getattr(model_args, option), **model_args.hub_options(option))


def load_tokenizer(model_args: ModelArguments, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of both models; options are passed to `from_pretrained`."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    return AutoTokenizer.from_pretrained(name, **model_args.hub_options(), **options)


def load_student_tokenizer(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a student that is named; `None` if it is the teacher's, or if none is beside the model."""
    option = "student_model_name_or_path"
    name = getattr(model_args, option)
    if name is None:
        return None
    try:
        own = AutoTokenizer.from_pretrained(name, **model_args.hub_options(option))
    except (OSError, ValueError):
        return None
    return None if own.get_vocab() == tokenizer.get_vocab() else own


def load_model(
    auto_class: type, option: str, model_args: ModelArguments, seed: int, frozen: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a model; where the checkpoint has no head for the task, a new one is drawn with the seed.

    Args:
        auto_class: The `AutoModelFor...` class.
        option: Name of the argument that names the model.
        model_args: The arguments.
        seed: The seed, set anew for each model: a model starts the same whether it is trained alone or with another.
        frozen: Whether it is only learnt from.
        **options: Other arguments of `from_pretrained` (`config`, ...).
    """
    name = getattr(model_args, option)
    set_seed(seed)
    model, report = auto_class.from_pretrained(
        name, output_loading_info=True, **model_args.hub_options(option), **options
    )
    if frozen and report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        logger.warning("`--%s %s` is frozen, but not trained for this task: %s are random.", option, name, missing)
    return model


def load_labelled_model(
    option: str, frozen: bool, auto_class: type, model_args: LabelledModelArguments, labels: OutputLabels, seed: int
) -> PreTrainedModel:
    """Load a model with a head for these labels; see `load_model`.

    Args:
        option: Name of the argument that names the model.
        frozen: Whether it is only learnt from.
        auto_class: The `AutoModelFor...` class.
        model_args: The arguments.
        labels: The labels.
        seed: The seed.

    Raises:
        ValueError: It is frozen, and its outputs mean other labels.
    """
    config = load_config(model_args, option)
    if not labels.same_order(config):
        own = list(config.id2label.values())
        name = getattr(model_args, option)
        message = f"`--{option} {name}` was trained with the labels {own}, not {list(labels.names)}."
        if frozen:
            raise ValueError(f"{message} It is frozen in this mode, so what it teaches would be wrong.")
        logger.warning("%s Its outputs get the new meaning in this training.", message)
    for key, value in labels.for_config.items():
        setattr(config, key, value)
    return load_model(
        auto_class,
        option,
        model_args,
        seed,
        frozen,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
    )


def load_models(
    model_args: ModelArguments,
    training_args: CoDistillationTrainingArguments,
    load: Callable[[str, bool], PreTrainedModel],
) -> dict[str, PreTrainedModel]:
    """The models by the name of their argument of `CoDistillationTrainer`.

    Args:
        model_args: The arguments.
        training_args: The arguments that say which models are frozen.
        load: Makes a model, given the name of the argument that names it and whether it is frozen.
    """
    graph = training_args.graph
    frozen = {"model": "teacher" in graph.frozen, "student_model": "student" in graph.frozen}
    models = {argument: load(option, frozen.get(argument, True)) for argument, option in model_args.sources.items()}
    if model_args.cuts is not None:
        if model_args.student_init == "random":
            set_seed(training_args.seed)
        models["student_model"] = create_student(models["model"], **model_args.cuts)
    if "student_model" in models:
        for argument in ("model", "student_model"):
            logger.info("%s: %s", argument, estimate(models[argument]))
    for argument, rank in (("model", model_args.lora_r), ("student_model", model_args.student_lora_r)):
        if rank is not None:
            set_seed(training_args.seed)
            models[argument] = with_adapters(models[argument], rank, model_args.lora_target_modules)
    return models


def with_adapters(model: PreTrainedModel, rank: int, target_modules: str | None) -> PreTrainedModel:
    """The model inside PEFT, with LoRA adapters; they, and a head that is new, are all that is trained.

    Args:
        model: The model.
        rank: Rank of the adapters, whose scale is 2.
        target_modules: Names of modules with commas between, or `all-linear`; `None` for what PEFT names for the
            family.
    """
    from peft import LoraConfig, get_peft_model

    names = target_modules
    if target_modules is not None and target_modules != "all-linear":
        names = target_modules.split(",")
    task_type = next((task for end, task in PEFT_TASKS.items() if type(model).__name__.endswith(end)), None)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type=task_type))


def limits_of_length(
    tokenizer: PreTrainedTokenizerBase, models: Mapping[str, PreTrainedModel]
) -> Iterator[tuple[int, str]]:
    """Numbers of tokens beyond which the tokenizer or a model's table of positions ends, with who says so."""
    yield tokenizer.model_max_length, "the tokenizer"
    for argument, model in models.items():
        for name, module in model.named_modules():
            if name.endswith(("position_embeddings", "wpe")) and isinstance(module, nn.Embedding):
                unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's first positions
                yield module.num_embeddings - unused, f"`{argument}`"
                break
        else:  # positions without a table (rotary ones)
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if limit is not None:
                yield limit, f"`{argument}`"


def allowed_length(
    option: str, wanted: int | None, tokenizer: PreTrainedTokenizerBase, models: Mapping[str, PreTrainedModel]
) -> int:
    """The number of tokens that is wanted, or what tokenizer and models allow if that is less; then it warns.

    Args:
        option: Name of the argument that gave the number.
        wanted: The number; `None` stands for 1024.
        tokenizer: The tokenizer.
        models: The models by the name of their argument of `CoDistillationTrainer`.
    """
    limit, owner = min(limits_of_length(tokenizer, models))
    if wanted is None:
        return min(1024, limit)
    if wanted > limit:
        logger.warning("`--%s %d` is more than %s allows. Using %d.", option, wanted, owner, limit)
    return min(wanted, limit)
