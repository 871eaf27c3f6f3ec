"""The two language models of a run: loaded, or made from configs and trained from scratch."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ctcd_trainer import CoDistillationTrainingArguments
from examples.common.models import MODEL_OPTIONS, ModelArguments, load_config, load_model, load_models, logger
from examples.common.run import check_arguments

# ---- Arguments ----


@dataclass
class LanguageModelArguments(ModelArguments):
    """Which models are trained, and where they come from or what they are made of."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The teacher: a folder or the name of a model on the Hub. Leave it out to train from scratch."
        },
    )
    model_type: str | None = field(
        default=None, metadata={"help": "From scratch: the teacher's architecture (`bert`, `gpt2`, ...)."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "From scratch: settings of the teacher's config, e.g. `n_layer=6,resid_pdrop=0.2`."},
    )
    student_model_type: str | None = field(
        default=None, metadata={"help": "A student from scratch: its architecture. Default: the teacher's."}
    )
    student_config_name: str | None = field(
        default=None, metadata={"help": "A student from scratch: a folder or a model on the Hub with its config."}
    )
    student_config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "A student from scratch: what differs from the teacher's config (or the student's named one)."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision in which the weights of all models are kept. Default: the one of the checkpoint. To "
            "train in less than float32 with weights in float32, give `--bf16` instead.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )

    student_options: ClassVar[tuple[str, ...]] = (
        *ModelArguments.student_options,
        "student_config_overrides",
        "student_model_type",
        "student_config_name",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None and self.model_type is None and self.config_name is None:
            raise ValueError(
                "There is no teacher: give `--model_name_or_path`, or to train from scratch `--model_type` or "
                "`--config_name`."
            )
        if self.model_name_or_path is not None and self.config_overrides is not None:
            raise ValueError(
                f"`--config_overrides {self.config_overrides}` is for training from scratch, and the weights of "
                f"`--model_name_or_path {self.model_name_or_path}` fit its own config alone: choose one."
            )
        if self.student_model_type is not None and self.student_config_name is not None:
            raise ValueError("`--student_model_type` and `--student_config_name` both give a config: choose one.")
        whole, parts = ModelArguments.student_options, self._made_by
        given = [next((o for o in options if getattr(self, o) is not None), None) for options in (whole, parts)]
        if None not in given:
            raise ValueError(
                f"`--{given[0]}` gives a student with weights and `--{given[1]}` one from scratch: choose one."
            )
        if self.tokenizer_name is None and self.model_name_or_path is None:
            raise ValueError("Training from scratch needs a tokenizer for both models: give `--tokenizer_name`.")

    @property
    def _made_by(self) -> tuple[str, ...]:
        """The arguments of which each asks for a student that is made from a config."""
        return self.student_options[len(ModelArguments.student_options) :]

    @property
    def sources(self) -> dict[str, str]:
        """As in the base class, with the models that are made from scratch."""
        made = {"model"} | ({"student_model"} if self.student_from_scratch else set())
        return super().sources | {argument: MODEL_OPTIONS[argument] for argument in sorted(made)}

    @property
    def student_from_scratch(self) -> bool:
        """Whether the student is made from a config."""
        return any(getattr(self, option) is not None for option in self._made_by)


def check_model_arguments(model_args: LanguageModelArguments, training_args: CoDistillationTrainingArguments) -> None:
    """Raise `ValueError` where models and mode contradict each other, before anything is loaded."""
    check_arguments(model_args, training_args)
    frozen = training_args.graph.frozen
    random = {"teacher": model_args.model_name_or_path is None, "student": model_args.student_from_scratch}
    for learner, option in {"teacher": "model_name_or_path", "student": "student_model_name_or_path"}.items():
        if learner in frozen and random[learner]:
            raise ValueError(
                f"`--distillation_mode {training_args.distillation_mode}` freezes the {learner}, which would be made "
                f"from scratch: what it teaches would be random. Give `--{option}`, or choose another mode."
            )
    if model_args.model_type is not None and (model_args.model_name_or_path or model_args.config_name):
        logger.warning("`--model_type %s` has no effect: the model or config is given.", model_args.model_type)


# ---- Configs ----


class Blueprint(NamedTuple):
    """What a config is made of.

    Attributes:
        config_class: Its class.
        settings: The arguments that it is made with; what follows from them is left to the class.
    """

    config_class: type[PreTrainedConfig]
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Blueprint":
        """The blueprint of a config that was saved with a model, without what is about that model alone."""
        own = ("_name_or_path", "architectures")
        return cls(type(config), {name: value for name, value in config.to_dict().items() if name not in own})

    def build(self) -> PreTrainedConfig:
        """The config."""
        return self.config_class.from_dict(copy.deepcopy(self.settings))

    def changed(self, option: str, overrides: str | None) -> "Blueprint":
        """This one with other settings.

        Args:
            option: Name of the argument that gave them, for the message.
            overrides: The settings as `name=value,name=value`.

        Raises:
            ValueError: There is no such setting, or the value is of another type.
        """
        if overrides is None:
            return self
        config = self.build()
        layers = getattr(config, "num_hidden_layers", None)
        try:
            config.update_from_string(overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`--{option} {overrides}` does not fit a {self.config_class.__name__}: {error}. Give pairs "
                "`name=value` of its settings, with commas and without spaces between them."
            ) from error
        given = (pair.split("=")[0] for pair in overrides.split(","))
        names = [config.attribute_map.get(name, name) for name in given]
        settings = self.settings | {name: getattr(config, name) for name in names}
        if getattr(config, "num_hidden_layers", None) != layers:
            # Lists with an entry a layer (`layer_types`) would be of a wrong length; the class makes them anew.
            settings = {
                name: value
                for name, value in settings.items()
                if name in names or not (isinstance(value, (list, tuple)) and len(value) == layers)
            }
        return Blueprint(self.config_class, settings)


def teacher_blueprint(model_args: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """The teacher's config: its own, or the one from scratch, of the size of the tokenizer unless it is named."""
    if model_args.model_name_or_path is not None or model_args.config_name is not None:
        start = Blueprint.of(load_config(model_args))
    else:
        start = _of_type("model_type", model_args.model_type, _vocabulary_settings(tokenizer))
    return start.changed("config_overrides", model_args.config_overrides)


def student_blueprint(model_args: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """The config of a student from scratch: a named one, or the teacher's; with the settings that are given."""
    if model_args.student_config_name is not None:
        options = model_args.hub_options("student_config_name")
        start = Blueprint.of(AutoConfig.from_pretrained(model_args.student_config_name, **options))
    else:
        start = teacher_blueprint(model_args, tokenizer)
        if model_args.student_model_type is not None:
            vocabulary = {"vocab_size": start.build().get_text_config().vocab_size}
            settings = _vocabulary_settings(tokenizer) | vocabulary
            start = _of_type("student_model_type", model_args.student_model_type, settings)
    return start.changed("student_config_overrides", model_args.student_config_overrides)


def _of_type(option: str, model_type: str, settings: dict[str, Any]) -> Blueprint:
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"`--{option} {model_type}` is unknown. Valid types: {', '.join(sorted(CONFIG_MAPPING))}.")
    return Blueprint(CONFIG_MAPPING[model_type], settings)


def _vocabulary_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Size and special tokens; an architecture's own ones would lie outside of a smaller vocabulary."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


# ---- Models ----


def language_models(
    auto_class: type,
    model_args: LanguageModelArguments,
    training_args: CoDistillationTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, PreTrainedModel]:
    """The models by the name of their argument of `CoDistillationTrainer`.

    Args:
        auto_class: The `AutoModelFor...` class.
        model_args: The arguments.
        training_args: The arguments with the mode and the seed.
        tokenizer: The tokenizer of all of them.
    """
    make = partial(
        _load_or_make,
        auto_class=auto_class,
        model_args=model_args,
        tokenizer=tokenizer,
        seed=training_args.seed,
    )
    return load_models(model_args, training_args, make)


def _load_or_make(
    option: str,
    frozen: bool,
    auto_class: type,
    model_args: LanguageModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> PreTrainedModel:
    """A model with embeddings for every token of the tokenizer."""
    dtype = model_args.dtype
    if getattr(model_args, option) is not None:
        options = {} if dtype is None else {"dtype": dtype}
        if option == "model_name_or_path" and model_args.config_name is not None:
            options["config"] = load_config(model_args)
        model = load_model(auto_class, option, model_args, seed, frozen, **options)
    else:
        blueprint = teacher_blueprint if option == "model_name_or_path" else student_blueprint
        options = {} if dtype in (None, "auto") else {"dtype": dtype}
        set_seed(seed)
        config = blueprint(model_args, tokenizer).build()
        model = auto_class.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model
