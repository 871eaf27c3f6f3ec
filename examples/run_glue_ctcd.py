#!/usr/bin/env python
"""Co-train a teacher and a student on GLUE, or on your own texts: `run_glue.py` of Hugging Face for two models.

One of the nine GLUE tasks, a 12-layer teacher and a 6-layer student cut from it:

    python examples/run_glue_ctcd.py --model_name_or_path google-bert/bert-base-uncased --student_num_hidden_layers 6 \
        --dataset_name nyu-mll/glue --task_name rte --do_train --do_eval --output_dir out

Your own files (columns `label` and one or two of text), a student of its own, all arguments in a file:

    python examples/run_glue_ctcd.py arguments.json

    {"model_name_or_path": "google-bert/bert-base-uncased",
     "student_model_name_or_path": "distilbert/distilbert-base-uncased",
     "train_file": "train.csv", "validation_file": "dev.csv", "do_train": true, "do_eval": true, "output_dir": "out"}

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
"""

import copy
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import datasets
import transformers
from datasets import Dataset, DatasetDict, load_dataset
from glue_data import TASK_TO_TEXT, Labels, Preprocessor, file_reader, load_files, select_rows, text_columns
from glue_metric import metrics_for
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments, create_student

logger = logging.getLogger(__name__)

# ---- Arguments ----


@dataclass
class ModelArguments:
    """Which models are trained, and where they come from."""

    model_name_or_path: str = field(metadata={"help": "The teacher: a folder or the name of a model on the Hub."})
    student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The student: a folder or the name of a model with the same tokenizer."}
    )
    student_num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Cut the student from the teacher, with this number of its layers."}
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
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Whether a head with another number of labels is replaced by a new one."}
    )

    def __post_init__(self) -> None:
        if self.student_model_name_or_path is not None and self.student_num_hidden_layers is not None:
            raise ValueError(
                "`--student_model_name_or_path` and `--student_num_hidden_layers` both give a student: choose one."
            )

    @property
    def has_student(self) -> bool:
        """Whether there is a second model."""
        return self.student_model_name_or_path is not None or self.student_num_hidden_layers is not None


@dataclass
class DataTrainingArguments:
    """Which data the models are trained and evaluated on."""

    task_name: str | None = field(default=None, metadata={"help": f"The GLUE task: {', '.join(TASK_TO_TEXT)}."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set on the Hub, or a folder; with `--task_name`, in the layout of `nyu-mll/glue` (which "
            "is then the default)."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set. Default: the task."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Number of tokens at which texts are cut."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Whether to tokenize again what is cached."})
    pad_to_max_length: bool = field(
        default=True,
        metadata={"help": "Whether to pad all texts to `max_seq_length` instead of the longest one of the batch."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first N test rows."})
    train_file: str | None = field(default=None, metadata={"help": "A CSV or JSON file with the training data."})
    validation_file: str | None = field(
        default=None, metadata={"help": "A CSV or JSON file with the validation data."}
    )
    test_file: str | None = field(default=None, metadata={"help": "A CSV or JSON file with the test data."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASK_TO_TEXT:
                raise ValueError(f"`--task_name {self.task_name}` is unknown. Valid tasks: {', '.join(TASK_TO_TEXT)}.")
        if self.task_name is None and self.dataset_name is None:
            if self.train_file is None or self.validation_file is None:
                raise ValueError(
                    "There is no data: give `--task_name`, `--dataset_name`, or both `--train_file` and "
                    "`--validation_file`."
                )
        elif self.files:
            raise ValueError(
                f"`--{next(iter(self.files))}_file` is given beside `--task_name` or `--dataset_name`: choose one "
                "source of data."
            )
        for split, path in self.files.items():
            file_reader(path, f"{split}_file")
            if not os.path.isfile(path):
                raise ValueError(f"`--{split}_file {path}` does not exist.")

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path is not None}


Arguments = tuple[ModelArguments, DataTrainingArguments, CoDistillationTrainingArguments]


def parse_arguments() -> Arguments:
    """Read the command line, or the one JSON or YAML file that it names, and check that the arguments go together."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, CoDistillationTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        arguments = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        arguments = parser.parse_yaml_file(sys.argv[1])
    else:
        arguments = parser.parse_args_into_dataclasses()
    check_arguments(*arguments)
    return arguments


def check_arguments(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: CoDistillationTrainingArguments
) -> None:
    """Raise `ValueError` where the three groups of arguments contradict each other, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("There is nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")
    if training_args.do_predict and data_args.files and data_args.test_file is None:
        raise ValueError("`--do_predict` needs `--test_file`.")
    mode = training_args.distillation_mode
    if mode != "standalone" and not model_args.has_student:
        raise ValueError(
            f"`--distillation_mode {mode}` needs a student: give `--student_model_name_or_path` or "
            "`--student_num_hidden_layers`. To train one model alone, give `--distillation_mode standalone`."
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
    logger.info("Arguments: %s", training_args)


# ---- Data ----


def load_raw_data(model_args: ModelArguments, data_args: DataTrainingArguments) -> DatasetDict:
    """All splits, from the Hub, a folder or files."""
    if data_args.files:
        return load_files(data_args.files, model_args.cache_dir)
    name = data_args.dataset_name or "nyu-mll/glue"
    config_name = data_args.dataset_config_name or data_args.task_name
    return load_dataset(name, config_name, cache_dir=model_args.cache_dir, token=model_args.token)


def limits_of_length(
    tokenizer: PreTrainedTokenizerBase, models: Mapping[str, PreTrainedModel]
) -> Iterator[tuple[int, str]]:
    """Numbers of tokens beyond which the tokenizer or a model's table of positions ends, with who says so."""
    yield tokenizer.model_max_length, "the tokenizer"
    for argument, model in models.items():
        for name, module in model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's first positions
                yield module.num_embeddings - unused, f"`{argument}`"


# ---- Models ----


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """The teacher's config as it was saved."""
    return AutoConfig.from_pretrained(
        model_args.config_name or model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )


def load_model(option: str, model_args: ModelArguments, labels: Labels, seed: int, frozen: bool) -> PreTrainedModel:
    """Load a model with a head for these labels; where the checkpoint has none, a new one drawn with the seed.

    Args:
        option: Name of the argument that names the model.
        model_args: The arguments.
        labels: The labels.
        seed: The seed, set anew for each model: a model starts the same whether it is trained alone or with another.
        frozen: Whether it is only learnt from.

    Raises:
        ValueError: It is frozen, and its outputs mean other labels.
    """
    name = getattr(model_args, option)
    options = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision if option == "model_name_or_path" else "main",
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    is_teacher = option == "model_name_or_path"
    config = load_config(model_args) if is_teacher else AutoConfig.from_pretrained(name, **options)
    if not labels.same_order(config):
        own = list(config.id2label.values())
        message = f"`--{option} {name}` was trained with the labels {own}, not {list(labels.names)}."
        if frozen:
            raise ValueError(f"{message} It is frozen in this mode, so what it teaches would be wrong.")
        logger.warning("%s Its outputs get the new meaning in this training.", message)
    for key, value in labels.for_config.items():
        setattr(config, key, value)
    set_seed(seed)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        name,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        output_loading_info=True,
        **options,
    )
    if frozen and report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        logger.warning("`--%s %s` is frozen, but not trained for this task: %s are random.", option, name, missing)
    return model


def load_models(
    model_args: ModelArguments, training_args: CoDistillationTrainingArguments, labels: Labels
) -> dict[str, PreTrainedModel]:
    """The models by the name of their argument of `CoDistillationTrainer`."""
    frozen = training_args.graph.frozen
    sources = {
        "model": ("model_name_or_path", "teacher" in frozen),
        "student_model": ("student_model_name_or_path", "student" in frozen),
        "pretrained_teacher": ("pretrained_teacher_name_or_path", True),
    }
    models = {
        argument: load_model(option, model_args, labels, training_args.seed, is_frozen)
        for argument, (option, is_frozen) in sources.items()
        if getattr(model_args, option) is not None
    }
    if model_args.student_num_hidden_layers is not None:
        models["student_model"] = create_student(models["model"], model_args.student_num_hidden_layers)
    return models


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
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: CoDistillationTrainer, parts: Mapping[str, Dataset]) -> dict[str, float]:
    """Evaluate on each part, write `eval_results.json`, and return all metrics (`..._mm` for MNLI's second part)."""
    combined: dict[str, float] = {}
    for name, dataset in parts.items():
        metrics = trainer.evaluate(eval_dataset=dataset) | {"eval_samples": len(dataset)}
        if name == "mnli-mm":
            metrics = {f"{key}_mm": value for key, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        combined |= metrics
    trainer.save_metrics("eval", combined)
    return combined


def predict(trainer: CoDistillationTrainer, parts: Mapping[str, Dataset], labels: Labels) -> None:
    """Write both models' predictions on each part, in the order of the data."""
    for name, dataset in parts.items():
        with _in_order(trainer):
            output = trainer.predict(dataset, metric_key_prefix="predict", student_predictions=True)
        if not trainer.is_world_process_zero():
            continue
        for suffix, logits in (("", output.predictions), ("_student", output.student_predictions)):
            if logits is None:
                continue
            file_name = f"predict_results{'_' * bool(name)}{name}{suffix}.txt"
            with open(os.path.join(trainer.args.output_dir, file_name), "w", encoding="utf-8") as file:
                file.write("index\tprediction\n")
                for index, prediction in enumerate(labels.predictions(logits)):
                    file.write(f"{index}\t{labels.format(prediction)}\n")


@contextmanager
def _in_order(trainer: CoDistillationTrainer) -> Iterator[None]:
    """Keep Trainer from grouping the rows by length, which changes the order of predictions."""
    args = trainer.args
    trainer.args = copy.copy(args)
    trainer.args.train_sampling_strategy = "sequential"
    try:
        yield
    finally:
        trainer.args = args


def table(trainer: CoDistillationTrainer, metrics: Mapping[str, float]) -> str:
    """The models side by side: parameters, each metric of the evaluation, and how often they agree."""
    models = {"teacher": trainer.teacher_model, "student": trainer.student_model}
    models = {name: model for name, model in models.items() if model is not None}
    millions = (sum(parameter.numel() for parameter in model.parameters()) / 1e6 for model in models.values())
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


def model_card_settings(data_args: DataTrainingArguments) -> dict[str, str]:
    """What the model cards say about task and data."""
    settings = {"tasks": "text-classification"}
    if data_args.task_name is not None:
        settings |= {
            "language": "en",
            "dataset_tags": "glue",
            "dataset_args": data_args.task_name,
            "dataset": f"GLUE {data_args.task_name.upper()}",
        }
    return settings


def main() -> None:
    """Run the script."""
    model_args, data_args, training_args = parse_arguments()
    set_up_logging(training_args)
    task = data_args.task_name
    checkpoint = checkpoint_to_resume(training_args)

    raw = load_raw_data(model_args, data_args)
    wanted = {
        "train": (training_args.do_train, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.max_predict_samples),
    }
    selected = select_rows(raw, task, {split: limit for split, (used, limit) in wanted.items() if used})
    source = raw["train"] if "train" in raw else next(iter(raw.values()))
    columns = text_columns(source, task)
    labels = Labels.of(source, task).ordered_as(load_config(model_args))

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    models = load_models(model_args, training_args, labels)
    max_length = data_args.max_seq_length
    limit, owner = min(limits_of_length(tokenizer, models))
    if max_length > limit:
        logger.warning("`--max_seq_length %d` is more than %s allows. Using %d.", max_length, owner, limit)
    pad = data_args.pad_to_max_length
    if pad and training_args.train_sampling_strategy == "group_by_length":
        logger.warning("Grouping by length saves nothing with padding: give `--pad_to_max_length False`.")
    preprocessor = Preprocessor(tokenizer, columns, labels, min(max_length, limit), pad)
    with training_args.main_process_first(desc="tokenizing"):
        for split, parts in selected.items():
            for name, rows in parts.items():
                parts[name] = rows.map(
                    preprocessor,
                    batched=True,
                    remove_columns=rows.column_names,
                    load_from_cache_file=not data_args.overwrite_cache,
                    desc=f"Tokenizing {split}",
                )

    multiple = 8 if training_args.fp16 or training_args.bf16 else None  # sizes that tensor cores like
    collator = default_data_collator if pad else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    trainer = CoDistillationTrainer(
        **models,
        args=training_args,
        data_collator=collator,
        train_dataset=next(iter(selected["train"].values())) if training_args.do_train else None,
        eval_dataset=next(iter(selected["validation"].values())) if training_args.do_eval else None,
        processing_class=tokenizer,
        compute_metrics=metrics_for(labels, task),
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    metrics = evaluate(trainer, selected["validation"]) if training_args.do_eval else {}
    if training_args.do_predict:
        predict(trainer, selected["test"], labels)
    if training_args.push_to_hub:
        trainer.push_to_hub(**model_card_settings(data_args))
    else:
        trainer.create_model_card(**model_card_settings(data_args))
    if trainer.is_world_process_zero():
        print(f"\n{table(trainer, metrics)}")


if __name__ == "__main__":
    main()
