"""The arguments of the example scripts: models, data, and their checks before anything is loaded."""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import datasets
import transformers
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from ctcd_trainer import CoDistillationTrainingArguments
from ctcd_trainer.training.warm_start import can_resume

#: The logger of all example scripts, whichever of them is run.
logger = logging.getLogger("examples")

#: The `datasets` reader of a file with columns, by the end of the file's name.
TABLE_READERS: Mapping[str, str] = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
#: The argument that names each model, by the argument of `CoDistillationTrainer` that takes the model.
MODEL_OPTIONS: Mapping[str, str] = {
    "model": "model_name_or_path",
    "student_model": "student_model_name_or_path",
    "pretrained_teacher": "pretrained_teacher_name_or_path",
}
#: The sizes of a student that is cut from the teacher, as `create_student` names them.
STUDENT_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field of a dataclass of arguments: its default, and its text in `--help`."""
    return field(default=default, metadata={"help": text, **metadata})


# ---- Data ----


@dataclass
class DataArguments:
    """Where the data comes from. Each script adds its own arguments in a subclass."""

    dataset_name: str | None = option(None, "A data set on the Hub, or a folder.")
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_file: str | None = option(None, "A file with the training data.")
    validation_file: str | None = option(None, "A file with the validation data.")
    max_train_samples: int | None = option(None, "Use only the first N training rows.")
    max_eval_samples: int | None = option(None, "Use only the first N validation rows.")
    overwrite_cache: bool = option(False, "Preprocess the data again, even if the result is cached.")
    preprocessing_num_workers: int | None = option(None, "Number of processes that preprocess the data.")
    baseline: str | None = option(
        None, "Output folder of another run, say `standalone`: the model cards state the gain over it."
    )

    #: The `datasets` reader of a file, by the end of the file's name.
    readers: ClassVar[Mapping[str, str]] = TABLE_READERS

    @property
    def reader_options(self) -> dict[str, dict[str, Any]]:
        """Further arguments of `load_dataset`, by the name of the reader."""
        return {}

    def __post_init__(self) -> None:
        if self.dataset_name is None and not self.files:
            raise ValueError("There is no data: give `--dataset_name`, or `--train_file` and `--validation_file`.")
        if self.dataset_name is not None and self.files:
            raise ValueError(
                f"`--{next(iter(self.files))}_file` is given beside `--dataset_name`: choose one source of data."
            )
        self.check_files()

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by split."""
        files = {split: getattr(self, f"{split}_file", None) for split in ("train", "validation", "test")}
        return {split: path for split, path in files.items() if path is not None}

    def check_files(self) -> None:
        """Raise `ValueError` for a file that does not exist or has no reader."""
        for split, path in self.files.items():
            check_file(path, f"{split}_file", self.readers)
        if self.baseline is not None and not os.path.isfile(os.path.join(self.baseline, "all_results.json")):
            raise ValueError(
                f"`--baseline {self.baseline}` has no all_results.json: give the folder of a finished run."
            )


def file_reader(path: str, argument: str, readers: Mapping[str, str] = TABLE_READERS) -> str:
    """Name of the `datasets` reader for a file.

    Args:
        path: Path of the file.
        argument: Name of the argument that gave the path.
        readers: The readers by the end of the file's name.

    Raises:
        ValueError: No reader has this end.
    """
    extension = os.path.basename(path).rpartition(".")[2].lower()
    if extension not in readers:
        raise ValueError(f"`--{argument} {path}` is not supported: the name must end in .{', .'.join(readers)}.")
    return readers[extension]


def check_file(path: str, argument: str, readers: Mapping[str, str] = TABLE_READERS) -> None:
    """Raise `ValueError` if a file has no reader or does not exist; see `file_reader`."""
    file_reader(path, argument, readers)
    if not os.path.isfile(path):
        raise ValueError(f"`--{argument} {path}` does not exist.")


# ---- Models ----


@dataclass
class ModelArguments:
    """The models to train, and their sources. Some scripts add arguments in a subclass."""

    model_name_or_path: str = field(metadata={"help": "The teacher: a folder or the name of a model on the Hub."})
    student_model_name_or_path: str | None = option(
        None, "The student: a folder or the name of a model with the same tokenizer."
    )
    student_num_hidden_layers: int | None = option(
        None, "Cut the student from the teacher, with this number of its layers."
    )
    student_hidden_size: int | None = option(
        None, "Cut the student from the teacher, with hidden states of this width."
    )
    student_intermediate_size: int | None = option(
        None, "Cut the student from the teacher, with feed-forward layers of this width."
    )
    student_num_attention_heads: int | None = option(
        None, "Cut the student from the teacher, with this number of heads."
    )
    student_layers: str = option(
        "uniform", "Layers of the teacher that the student keeps: uniform, first, last, or indices as in 0,2,5."
    )
    student_init: Literal["copy", "shared", "random"] = option(
        "copy",
        "Weights of a student that is cut from the teacher: `copy` takes the teacher's, `random` draws new weights, "
        "and `shared` keeps one frozen base in memory for the adapters of both models.",
    )
    align_steps: int = option(
        0,
        "Before the training, train the layers of the student to be those of the teacher for this number of steps, on "
        "the training rows without their labels.",
    )
    lora_r: int | None = option(None, "Freeze the teacher, and train LoRA adapters of this rank and its head.")
    student_lora_r: int | None = option(None, "Freeze the student, and train LoRA adapters of this rank and its head.")
    lora_target_modules: str | None = option(
        None,
        "The modules that get adapters: names with commas between, or all-linear. Default: PEFT's choice for the "
        "family.",
    )
    pretrained_teacher_name_or_path: str | None = option(
        None, "A frozen model that was trained on this task, from which both models learn (`community`)."
    )
    generations: int = option(
        1,
        "Train this number of pairs, each from the frozen best teacher before it as well, and keep the best models on "
        "the validation data.",
    )
    config_name: str | None = option(None, "The teacher's config, if it is in another place.")
    tokenizer_name: str | None = option(None, "The tokenizer, if it is not the teacher's.")
    cache_dir: str | None = option(None, "Folder that keeps downloads from the Hub.")
    model_revision: str = option("main", "Branch, tag or commit of the teacher and its tokenizer on the Hub.")
    token: str | None = option(None, "Token for the Hub. Default: the one of `hf auth login`.")
    trust_remote_code: bool = option(False, "Run the code that a model on the Hub brings along.")

    #: Each of these arguments gives a student.
    student_options: ClassVar[tuple[str, ...]] = (
        "student_model_name_or_path",
        *(f"student_{name}" for name in STUDENT_SIZES),
    )

    def __post_init__(self) -> None:
        given = [f"student_{name}" for name in STUDENT_SIZES if self._of_student(name) is not None]
        given += ["student_layers"] if isinstance(self._layers, list) else []
        if self.student_model_name_or_path is not None and given:
            raise ValueError(f"`--student_model_name_or_path` and `--{given[0]}` both give a student: choose one.")
        defaults = {"layers": "uniform", "init": "copy"}
        unused = [name for name, default in defaults.items() if self._of_student(name) != default]
        if unused and not given:
            raise ValueError(
                f"`--student_{unused[0]} {self._of_student(unused[0])}` is for a student that is cut from the "
                "teacher: give its `--student_num_hidden_layers` as well, or leave it out."
            )
        if self.generations < 1:
            raise ValueError(f"`--generations {self.generations}` is not valid: give 1 or more.")
        adapters = [name for name in ("lora_r", "student_lora_r") if getattr(self, name) is not None]
        if self.generations > 1 and adapters:
            raise ValueError(
                f"`--generations {self.generations}` trains new models, and `--{adapters[0]} "
                f"{getattr(self, adapters[0])}` adapters of given ones: leave one of them out."
            )
        if self.align_steps < 0 or (self.align_steps and not self.has_student):
            raise ValueError(
                f"`--align_steps {self.align_steps}` is not valid: give 0 or more, and a student if it is above 0."
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

    def _of_student(self, name: str) -> Any:
        return getattr(self, f"student_{name}")

    @property
    def cuts(self) -> dict[str, Any] | None:
        """Arguments of `create_student`; `None` if the student is not cut from the teacher."""
        sizes = {name: self._of_student(name) for name in STUDENT_SIZES}
        if all(size is None for size in sizes.values()) and not isinstance(self._layers, list):
            return None
        return {**sizes, "layers": self._layers, "init": self.student_init}

    @property
    def cut_by_trainer(self) -> bool:
        """True if the trainer cuts the student from the teacher; after adapters are added it could not."""
        return self.cuts is not None and self.lora_r is None and self.student_init != "shared"

    @property
    def _layers(self) -> str | list[int]:
        listed = re.fullmatch(r"\d+(,\d+)*", self.student_layers)
        return [int(index) for index in self.student_layers.split(",")] if listed else self.student_layers

    @property
    def has_student(self) -> bool:
        """True if a student is given."""
        return self.cuts is not None or any(getattr(self, option) is not None for option in self.student_options)

    @property
    def sources(self) -> dict[str, str]:
        """The argument that names each model to load, by the argument of `CoDistillationTrainer`."""
        return {argument: option for argument, option in MODEL_OPTIONS.items() if getattr(self, option) is not None}

    def hub_options(self, option: str = "model_name_or_path") -> dict[str, Any]:
        """Arguments of `from_pretrained` for the model that an argument names; only the teacher has a revision."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision if option == "model_name_or_path" else "main",
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    def check_mode(self, training_args: CoDistillationTrainingArguments) -> None:
        """Raise `ValueError` where models and mode contradict each other."""
        mode, pretrained = training_args.distillation_mode, self.pretrained_teacher_name_or_path
        if mode != "standalone" and not self.has_student:
            options = " or ".join(f"`--{option}`" for option in self.student_options)
            raise ValueError(
                f"`--distillation_mode {mode}` needs a student: give {options}. To train one model alone, give "
                "`--distillation_mode standalone`."
            )
        if training_args.warm_start and not self.cut_by_trainer and not training_args.by_recipe:
            raise ValueError(
                f"`--warm_start_epochs {training_args.warm_start_epochs:g} --warm_start_steps "
                f"{training_args.warm_start_steps}`: the student is cut from the teacher after that was trained. Give "
                "`--student_num_hidden_layers`, without `--lora_r` and `--student_init shared`. Or train the teacher "
                "first, with `--distillation_mode standalone` and without a student, and name its folder."
            )
        if training_args.graph.uses_pretrained and pretrained is None:
            raise ValueError(f"`--distillation_mode {mode}` needs `--pretrained_teacher_name_or_path`.")
        if pretrained is not None and not training_args.graph.uses_pretrained:
            raise ValueError(
                f"With `--distillation_mode {mode}` nothing learns from `--pretrained_teacher_name_or_path`: give "
                "`--distillation_mode community`, or leave it out."
            )


@dataclass
class LabelledModelArguments(ModelArguments):
    """The models to train, and their sources, for heads with an output per label."""

    ignore_mismatched_sizes: bool = option(False, "Replace a head with another number of labels by a new one.")


@dataclass
class LanguageModelArguments(ModelArguments):
    """The language models to train: their sources, or the configs of models from scratch."""

    model_name_or_path: str | None = option(
        None, "The teacher: a folder or the name of a model on the Hub. Leave it out to train from scratch."
    )
    model_type: str | None = option(None, "From scratch: the teacher's architecture (`bert`, `gpt2`, ...).")
    config_overrides: str | None = option(
        None, "From scratch: settings of the teacher's config, e.g. `n_layer=6,resid_pdrop=0.2`."
    )
    student_model_type: str | None = option(None, "A student from scratch: its architecture. Default: the teacher's.")
    student_config_name: str | None = option(
        None, "A student from scratch: a folder or a model on the Hub with its config."
    )
    student_config_overrides: str | None = option(
        None, "A student from scratch: settings that differ from the teacher's config (or from the named one)."
    )
    dtype: str | None = option(
        None,
        "Precision of the weights of all models. Default: that of the checkpoint. To train in less than float32 with "
        "weights in float32, give `--bf16` instead.",
        choices=["auto", "float32", "bfloat16", "float16"],
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
        with_weights, from_scratch = ModelArguments.student_options, self._from_config
        given = [
            next((o for o in group if getattr(self, o) is not None), None) for group in (with_weights, from_scratch)
        ]
        if None not in given:
            raise ValueError(
                f"`--{given[0]}` gives a student with weights and `--{given[1]}` one from scratch: choose one."
            )
        if self.tokenizer_name is None and self.model_name_or_path is None:
            raise ValueError("Training from scratch needs a tokenizer for both models: give `--tokenizer_name`.")

    @property
    def _from_config(self) -> tuple[str, ...]:
        """The arguments that each ask for a student that is made from a config."""
        return self.student_options[len(ModelArguments.student_options) :]

    @property
    def student_from_scratch(self) -> bool:
        """True if the student is made from a config."""
        return any(getattr(self, option) is not None for option in self._from_config)

    @property
    def sources(self) -> dict[str, str]:
        """The sources of the base class, and the models that are made from scratch."""
        made = {"model"} | ({"student_model"} if self.student_from_scratch else set())
        return super().sources | {argument: MODEL_OPTIONS[argument] for argument in sorted(made)}

    def check_mode(self, training_args: CoDistillationTrainingArguments) -> None:
        """Raise `ValueError` where models and mode contradict each other."""
        super().check_mode(training_args)
        random = {"teacher": self.model_name_or_path is None, "student": self.student_from_scratch}
        random["teacher"] &= not (training_args.warm_start and self.cut_by_trainer)
        for learner, option in {"teacher": "model_name_or_path", "student": "student_model_name_or_path"}.items():
            if learner in training_args.graph.frozen and random[learner]:
                raise ValueError(
                    f"`--distillation_mode {training_args.distillation_mode}` freezes the {learner}, which would be "
                    f"made from scratch: what it teaches would be random. Give `--{option}`, or choose another mode."
                )
        if self.model_type is not None and (self.model_name_or_path or self.config_name):
            logger.warning("`--model_type %s` has no effect: the model or config is given.", self.model_type)


# ---- The start of a script ----


def parse_arguments(*groups: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read the command line, or the one JSON or YAML file that it names.

    Args:
        *groups: The dataclasses that hold the arguments.
        argv: Words to read instead of the command line, without the name of the script.

    Returns:
        One object of each dataclass.
    """
    parser = HfArgumentParser(groups)
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    return parser.parse_args_into_dataclasses(argv)


def start(*groups: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read and check the arguments of a script, and set up its log.

    Args:
        *groups: The dataclasses of the models and of the data; the training arguments are added.
        argv: See `parse_arguments`.

    Returns:
        One object of each dataclass, then the training arguments, then the checkpoint to resume from or `None`.
    """
    model_args, *others, training_args = parse_arguments(*groups, CoDistillationTrainingArguments, argv=argv)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("There is nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")
    model_args.check_mode(training_args)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = training_args.get_process_log_level()
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    for each in (logger, logging.getLogger("ctcd_trainer")):
        each.setLevel(level)
    logger.info("Arguments: %s", training_args)
    return model_args, *others, training_args, checkpoint_to_resume(training_args)


def checkpoint_to_resume(training_args: CoDistillationTrainingArguments) -> str | bool | None:
    """Folder of the checkpoint that `--resume_from_checkpoint` names; `true` stands for the last one.

    With a warm start, `true` is left to the trainer.

    Raises:
        ValueError: There is no such checkpoint.
    """
    wanted, folder = training_args.resume_from_checkpoint, training_args.output_dir
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if wanted is None:
        if last is not None and training_args.do_train:
            logger.warning("Training from the start; to go on from %s, give `--resume_from_checkpoint true`.", last)
        return None
    if str(wanted).lower() == "true" and training_args.warm_start and can_resume(folder):
        return True
    checkpoint = last if str(wanted).lower() == "true" else wanted
    if checkpoint is None or not os.path.isdir(checkpoint):
        raise ValueError(
            f"`--resume_from_checkpoint {wanted}`: there is no such checkpoint (output folder: {folder})."
        )
    return checkpoint
