"""What the example scripts share: arguments, loading by name, the course of a run, and the table at its end."""

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import transformers
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments
from ctcd_trainer.model_structure import count_parameters
from examples.common.models import ModelArguments, logger

#: How files with columns are read, by the end of their name.
TABLE_READERS: Mapping[str, str] = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
#: The arguments that ask for each split and that limit the number of its rows.
SPLIT_ARGUMENTS: Mapping[str, tuple[str, str]] = {
    "train": ("do_train", "max_train_samples"),
    "validation": ("do_eval", "max_eval_samples"),
    "test": ("do_predict", "max_predict_samples"),
}

Rows = Dataset | IterableDataset

# ---- Arguments ----


@dataclass
class DataArguments:
    """Where the data comes from. A script adds what is special to it in a subclass."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "A file with the training data."})
    validation_file: str | None = field(default=None, metadata={"help": "A file with the validation data."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N validation rows."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Whether to preprocess again what is cached."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes that preprocess the data."}
    )
    baseline: str | None = field(
        default=None,
        metadata={"help": "Output folder of another run, say `standalone`: the model cards state the gain over it."},
    )

    #: How files are read, by the end of their name.
    readers: ClassVar[Mapping[str, str]] = TABLE_READERS

    @property
    def reader_options(self) -> dict[str, dict[str, Any]]:
        """What a reader is told besides the file, by its name."""
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
        """Raise `ValueError` for a file that is not there or that nothing here reads."""
        for split, path in self.files.items():
            file_reader(path, f"{split}_file", self.readers)
            if not os.path.isfile(path):
                raise ValueError(f"`--{split}_file {path}` does not exist.")
        if self.baseline is not None and not os.path.isfile(os.path.join(self.baseline, "all_results.json")):
            raise ValueError(
                f"`--baseline {self.baseline}` has no all_results.json: give the folder of a finished run."
            )


def parse_arguments(*groups: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read the command line, or the one JSON or YAML file that it names.

    Args:
        *groups: The dataclasses that hold the arguments.
        argv: What is read in place of the command line, without the name of the script.

    Returns:
        One object of each of them.
    """
    parser = HfArgumentParser(groups)
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    return parser.parse_args_into_dataclasses(argv)


def check_arguments(model_args: ModelArguments, training_args: CoDistillationTrainingArguments) -> None:
    """Raise `ValueError` where models and mode contradict each other, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("There is nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")
    mode = training_args.distillation_mode
    if mode != "standalone" and not model_args.has_student:
        options = " or ".join(f"`--{option}`" for option in model_args.student_options)
        raise ValueError(
            f"`--distillation_mode {mode}` needs a student: give {options}. To train one model alone, give "
            "`--distillation_mode standalone`."
        )
    if training_args.graph.uses_pretrained and model_args.pretrained_teacher_name_or_path is None:
        raise ValueError(f"`--distillation_mode {mode}` needs `--pretrained_teacher_name_or_path`.")
    if model_args.pretrained_teacher_name_or_path is not None and not training_args.graph.uses_pretrained:
        raise ValueError(
            f"With `--distillation_mode {mode}` nothing learns from `--pretrained_teacher_name_or_path`: give "
            "`--distillation_mode community`, or leave it out."
        )


def set_up_logging(training_args: CoDistillationTrainingArguments) -> None:
    """One format for all messages, and the level of `--log_level`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = training_args.get_process_log_level()
    logger.setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    logging.getLogger("ctcd_trainer").setLevel(level)
    logger.info("Arguments: %s", training_args)


# ---- Data ----


def file_reader(path: str, argument: str, readers: Mapping[str, str] = TABLE_READERS) -> str:
    """Name of the `datasets` reader for a file.

    Args:
        path: Path of the file.
        argument: Name of the argument that gave it, for the message.
        readers: The readers by the end of the name.

    Raises:
        ValueError: Its name ends in none of these ways.
    """
    extension = os.path.basename(path).rpartition(".")[2].lower()
    if extension not in readers:
        raise ValueError(f"`--{argument} {path}` is not supported: the name must end in .{', .'.join(readers)}.")
    return readers[extension]


def load_files(
    files: Mapping[str, str],
    cache_dir: str | None = None,
    readers: Mapping[str, str] = TABLE_READERS,
    reader_options: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> DatasetDict:
    """Load one file per split. The splits may have different columns: a test file needs no labels.

    Args:
        files: Paths by split: `train`, `validation`, `test`.
        cache_dir: Where `datasets` keeps what it reads.
        readers: The readers by the end of the name.
        reader_options: Arguments of the readers, by their name.
        **options: Other arguments of `load_dataset` (`streaming`, `field`, ...).
    """
    splits = DatasetDict()
    for split, path in files.items():
        reader = file_reader(path, f"{split}_file", readers)
        own = (reader_options or {}).get(reader, {})
        splits[split] = load_dataset(
            reader, data_files={split: path}, split=split, cache_dir=cache_dir, **own, **options
        )
    return splits


def load_raw_data(model_args: ModelArguments, data_args: DataArguments, **options: Any) -> DatasetDict:
    """All splits, from the Hub, a folder or files.

    Args:
        model_args: The arguments with the place of the cache and the token for the Hub.
        data_args: The arguments that name the data.
        **options: Other arguments of `load_dataset`.
    """
    if data_args.files:
        return load_files(
            data_args.files, model_args.cache_dir, data_args.readers, data_args.reader_options, **options
        )
    return load_dataset(
        data_args.dataset_name,
        data_args.dataset_config_name,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        **options,
    )


def wanted_splits(data_args: DataArguments, training_args: CoDistillationTrainingArguments) -> dict[str, int | None]:
    """The splits that a run needs, with the number of their first rows to take, `None` for all.

    Args:
        data_args: The arguments that limit the splits; a split that they cannot limit is none of the script's.
        training_args: The arguments that say what is to be done.
    """
    return {
        split: getattr(data_args, limit)
        for split, (argument, limit) in SPLIT_ARGUMENTS.items()
        if hasattr(data_args, limit) and getattr(training_args, argument)
    }


def split_of(raw: Mapping[str, Rows], split: str, name: str | None = None) -> Rows:
    """A split of the data.

    Args:
        raw: All splits.
        split: What it is for: `train`, `validation` or `test`.
        name: How the data calls it, if not so.

    Raises:
        ValueError: The data has none of this name.
    """
    name = name or split
    if name not in raw:
        raise ValueError(
            f"`--{SPLIT_ARGUMENTS[split][0]}` needs the split {name!r}, and the data has only {list(raw)}."
        )
    return raw[name]


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The first rows, all of them without a limit."""
    return rows if limit is None else rows.take(min(limit, len(rows)) if isinstance(rows, Sized) else limit)


# ---- The work ----


def checkpoint_to_resume(training_args: CoDistillationTrainingArguments) -> str | None:
    """Folder of the checkpoint that `--resume_from_checkpoint` names; `true` stands for the last one.

    Raises:
        ValueError: There is none.
    """
    wanted, folder = training_args.resume_from_checkpoint, training_args.output_dir
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if wanted is None:
        if last is not None and training_args.do_train:
            logger.warning("Training from the start; to go on from %s, give `--resume_from_checkpoint true`.", last)
        return None
    checkpoint = last if str(wanted).lower() == "true" else wanted
    if checkpoint is None or not os.path.isdir(checkpoint):
        raise ValueError(
            f"`--resume_from_checkpoint {wanted}`: there is no such checkpoint (output folder: {folder})."
        )
    return checkpoint


def train(trainer: CoDistillationTrainer, checkpoint: str | None) -> None:
    """Train, save both models and write `train_results.json` and `trainer_state.json`."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if isinstance(trainer.train_dataset, Sized):
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(
    trainer: CoDistillationTrainer,
    parts: Mapping[str, Dataset | IterableDataset] | None = None,
    more_metrics: Callable[[dict[str, float]], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Evaluate both models, write `eval_results.json`, and return the metrics.

    Args:
        trainer: The trainer.
        parts: The data sets by what is added to the names of their metrics (`_mm` for MNLI's second one). By default
            the trainer's own one, to whose names nothing is added.
        more_metrics: Makes further metrics from the ones of a data set.
    """
    combined: dict[str, float] = {}
    for suffix, dataset in (parts or {"": trainer.eval_dataset}).items():
        metrics = trainer.evaluate(eval_dataset=dataset)
        metrics |= more_metrics(metrics) if more_metrics is not None else {}
        if isinstance(dataset, Sized):
            metrics["eval_samples"] = len(dataset)
        metrics = {f"{key}{suffix}": value for key, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        combined |= metrics
    trainer.save_metrics("eval", combined)
    return combined


@contextmanager
def in_order(trainer: CoDistillationTrainer) -> Iterator[None]:
    """Keep Trainer from grouping the rows by length, which changes the order of predictions."""
    args = trainer.args
    trainer.args = copy.copy(args)
    trainer.args.train_sampling_strategy = "sequential"
    try:
        yield
    finally:
        trainer.args = args


def card_of(data_args: DataArguments, task: str) -> dict[str, Any]:
    """What the model cards say about task, data and baseline: arguments of `create_model_card`."""
    name, config = data_args.dataset_name, data_args.dataset_config_name
    card = {"tasks": task, "baseline": data_args.baseline}
    if name is None:
        return card
    card |= {"dataset": " ".join(filter(None, (os.path.basename(os.path.normpath(name)), config)))}
    if not os.path.isdir(name):  # on the Hub
        card |= {"dataset_tags": name, "dataset": " ".join(filter(None, (name, config)))}
        card |= {"dataset_args": config} if config is not None else {}
    return card


def finish(trainer: CoDistillationTrainer, metrics: Mapping[str, float], card: Mapping[str, Any]) -> None:
    """Write the model cards or push both models (`--push_to_hub`), and print the models side by side.

    Args:
        trainer: The trainer.
        metrics: What `evaluate` returned; may be empty.
        card: What the model cards say about task and data: arguments of `Trainer.create_model_card`.
    """
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        print(f"\n{table(trainer, metrics)}")


def table(trainer: CoDistillationTrainer, metrics: Mapping[str, float]) -> str:
    """The models side by side: parameters, each metric of the evaluation, and how often they agree."""
    models = {"teacher": trainer.teacher_model, "student": trainer.student_model}
    models = {name: model for name, model in models.items() if model is not None}
    millions = (count_parameters(model) / 1e6 for model in models.values())
    rows = [("", *(models if len(models) > 1 else ["model"])), ("parameters (M)", *(f"{n:.2f}" for n in millions))]
    skipped = ("eval_student_", "eval_runtime", "eval_samples", "eval_steps", "eval_model_preparation_time")
    for key, value in metrics.items():
        if key.startswith("eval_") and not key.startswith((*skipped, "eval_agreement")):
            student = metrics.get(key.replace("eval_", "eval_student_", 1))
            values = (value,) if student is None else (value, student)
            rows.append((key.removeprefix("eval_"), *(f"{x:.4f}" for x in values)))
    rows += [(k.removeprefix("eval_"), f"{v:.4f}") for k, v in metrics.items() if k.startswith("eval_agreement")]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)
