"""The run of two language models: models from checkpoints or made from configs, and what both scripts share."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ctcd_trainer import CoDistillationTrainer
from examples.data import text
from examples.data.loading import load_raw_data

from .aligning import aligned
from .arguments import LanguageModelArguments, start
from .generations import make_or_train
from .models import allowed_length, load_config, load_model, load_models, load_tokenizer
from .run import card_of, run

#: Makes the function that turns texts into examples of a given length, and the data collator.
Prepare = Callable[[PreTrainedTokenizerBase, Any, TrainingArguments], tuple[Callable[[int], Any], Callable]]


def run_language_models(
    data_arguments: type[text.TextArguments],
    auto_class: type,
    length_option: str,
    prepare: Prepare,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    task: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a script of language models.

    Args:
        data_arguments: The dataclass of the data.
        auto_class: The `AutoModelFor...` class.
        length_option: The argument with the number of tokens of an example.
        prepare: See `Prepare`.
        compute_metrics: The metrics of the likeliest tokens.
        task: Name of the task for the model cards.
        argv: Words to read instead of the command line.
    """
    model_args, data_args, training_args, checkpoint = start(LanguageModelArguments, data_arguments, argv=argv)
    tokenizer = load_tokenizer(model_args)
    preprocess, collator = prepare(tokenizer, data_args, training_args)
    raw = load_raw_data(model_args, data_args, streaming=data_args.streaming)
    splits = text.select_splits(raw, data_args, training_args)
    load = partial(load_or_make, auto_class, tokenizer, training_args.seed)
    models = load_models(model_args, training_args, partial(load, model_args=model_args))
    length = allowed_length(length_option, getattr(data_args, length_option), tokenizer, models)
    examples = text.tokenize(splits, preprocess(length=length), data_args, training_args)
    make_trainer = lambda models, args: CoDistillationTrainer(  # noqa: E731
        **aligned(models, examples.get("train"), model_args, args, checkpoint, collator, tokenizer),
        args=args,
        data_collator=collator,
        train_dataset=examples.get("train"),
        eval_dataset=examples.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=text.best_tokens,
    )
    trainer = make_or_train(make_trainer, models, load, model_args, training_args)
    run(trainer, checkpoint, card_of(data_args, task), more_metrics=text.perplexities)


def load_or_make(
    auto_class: type,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    option: str,
    frozen: bool,
    model_args: LanguageModelArguments,
) -> PreTrainedModel:
    """A model, loaded or from scratch, with embeddings for every token of the tokenizer; see `load_model`."""
    dtype = model_args.dtype
    if getattr(model_args, option) is not None:
        options = {} if dtype is None else {"dtype": dtype}
        if option == "model_name_or_path" and model_args.config_name is not None:
            options["config"] = load_config(model_args)
        model = load_model(option, frozen, auto_class, model_args, seed, **options)
    else:
        blueprint = teacher_blueprint if option == "model_name_or_path" else student_blueprint
        options = {} if dtype in (None, "auto") else {"dtype": dtype}
        set_seed(seed)
        config = blueprint(model_args, tokenizer).build()
        model = auto_class.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


# ---- Configs ----


class Blueprint(NamedTuple):
    """The parts of a config.

    Attributes:
        config_class: Class of the config.
        settings: Arguments of the class, without the settings that the class derives from them.
    """

    config_class: type[PreTrainedConfig]
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Blueprint":
        """The blueprint of a config that was saved with a model, without the entries about that model."""
        left_out = ("_name_or_path", "architectures")
        return cls(type(config), {name: value for name, value in config.to_dict().items() if name not in left_out})

    def build(self) -> PreTrainedConfig:
        """The config."""
        return self.config_class.from_dict(copy.deepcopy(self.settings))

    def changed(self, option: str, overrides: str | None) -> "Blueprint":
        """This blueprint with other settings.

        Args:
            option: Name of the argument that gave the settings.
            overrides: The settings as `name=value,name=value`.

        Raises:
            ValueError: A setting is unknown, or its value has another type.
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
            # Lists with an entry for each layer (`layer_types`) would have a wrong length; the class makes them again.
            settings = {
                name: value
                for name, value in settings.items()
                if name in names or not (isinstance(value, (list, tuple)) and len(value) == layers)
            }
        return Blueprint(self.config_class, settings)


def teacher_blueprint(model_args: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """The teacher's config: saved or named, or that of its architecture with the vocabulary of the tokenizer."""
    if model_args.model_name_or_path is not None or model_args.config_name is not None:
        start = Blueprint.of(load_config(model_args))
    else:
        start = _of_type("model_type", model_args.model_type, _vocabulary_settings(tokenizer))
    return start.changed("config_overrides", model_args.config_overrides)


def student_blueprint(model_args: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """The config of a student from scratch: a named one or the teacher's, with the given settings."""
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
    """Size and special tokens: those of the architecture may lie outside of a smaller vocabulary."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
