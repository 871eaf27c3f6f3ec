#!/usr/bin/env python
"""Co-train a teacher and a student on GLUE, or on your own texts: `run_glue.py` of Hugging Face for two models.

One of the nine GLUE tasks, a 12-layer teacher and a 6-layer student cut from it:

    python examples/run_glue_ctcd.py --model_name_or_path google-bert/bert-base-uncased --student_num_hidden_layers 6 \
        --dataset_name nyu-mll/glue --task_name rte --do_train --do_eval --output_dir out

Your own files (columns `label` and one or two of text, or those of `--label_column_name` and `--text_column_names`), a
pre-trained student, all arguments in a file:

    python examples/run_glue_ctcd.py arguments.json

    {"model_name_or_path": "google-bert/bert-base-uncased",
     "student_model_name_or_path": "distilbert/distilbert-base-uncased",
     "train_file": "train.csv", "validation_file": "dev.csv", "do_train": true, "do_eval": true, "output_dir": "out"}

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds `examples` from any folder

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ctcd_trainer import CoDistillationTrainer, Mixup, PairDataCollator, TokenMasking, WordDropout
from examples.common.aligning import aligned
from examples.common.arguments import DataArguments, LabelledModelArguments, check_file, logger, option, start
from examples.common.generations import make_or_train
from examples.common.models import (
    allowed_length,
    load_config,
    load_labelled_model,
    load_models,
    load_student_tokenizer,
    load_tokenizer,
)
from examples.common.run import in_order, padding_multiple, run
from examples.data.glue import TASK_TO_TEXT, Labels, Preprocessor, metrics_for, named_label, select_rows, text_columns
from examples.data.loading import load_files, load_raw_data, tokenize, wanted_splits

# ---- Arguments ----


@dataclass
class GlueDataArguments(DataArguments):
    """The data to train and to evaluate on."""

    task_name: str | None = option(None, f"The GLUE task: {', '.join(TASK_TO_TEXT)}.")
    dataset_name: str | None = option(
        None,
        "A data set on the Hub, or a folder; with `--task_name`, in the layout of `nyu-mll/glue` (which is then the "
        "default).",
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set. Default: the task.")
    label_column_name: str | None = option(None, "Column with the labels of your own data. Default: `label`.")
    text_column_names: str | None = option(
        None, "The one or two columns of text of your own data, with a comma between. Default: the first ones."
    )
    max_seq_length: int = option(128, "Number of tokens at which texts are cut.")
    pad_to_max_length: bool = option(
        True, "Pad all texts to `max_seq_length` instead of the longest text of the batch."
    )
    max_predict_samples: int | None = option(None, "Use only the first N test rows.")
    test_file: str | None = option(None, "A file with the test data.")
    save_logits: bool = option(False, "Write the logits of the test rows beside the predictions (predict_logits.npz).")
    unlabeled_file: str | None = option(
        None, "A file with more training texts, without labels: on them the models learn only from each other."
    )
    align_file: str | None = option(
        None, "A file with texts like those of the training data, for `--align_steps`. Default: the training data."
    )
    augmentation: Literal["token_masking", "word_dropout", "mixup"] | None = option(
        None, "Augmentation of the training batches: mask tokens, hide tokens, or mix rows. Default: none."
    )
    augmentation_rate: float | None = option(
        None,
        "Share of the tokens that are masked (default 0.15) or hidden (0.1), or for mixup the parameter of the Beta "
        "distribution from which the shares of the mixed rows are drawn (0.2).",
    )
    augmented: Literal["both", "teacher", "student"] = option(
        "both", "The models that get the augmented batch; the other one keeps the clean batch (not with mixup)."
    )

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASK_TO_TEXT:
                raise ValueError(f"`--task_name {self.task_name}` is unknown. Valid tasks: {', '.join(TASK_TO_TEXT)}.")
            for name in ("label_column_name", "text_column_names"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`--{name} {getattr(self, name)}` is for your own data, and `--task_name {self.task_name}` "
                        "has its own columns: leave out one of them."
                    )
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
        else:
            self.dataset_name = self.dataset_name or "nyu-mll/glue"
            self.dataset_config_name = self.dataset_config_name or self.task_name
        self.check_files()
        for name in ("unlabeled_file", "align_file"):
            if getattr(self, name) is not None:
                check_file(getattr(self, name), name)
        if self.augmentation is None and self.augmentation_rate is not None:
            raise ValueError(
                f"`--augmentation_rate {self.augmentation_rate}` has no effect without `--augmentation`: give both."
            )


# ---- The work ----


def predict(
    trainer: CoDistillationTrainer, parts: Mapping[str, Dataset], labels: Labels, save_logits: bool = False
) -> None:
    """Write both models' predictions on each part, in the order of the data, and on demand their logits."""
    for name, dataset in parts.items():
        with in_order(trainer):
            output = trainer.predict(dataset, metric_key_prefix="predict", student_predictions=True)
        if not trainer.is_world_process_zero():
            continue
        found = {"teacher": output.predictions, "student": output.student_predictions}
        found = {model: logits for model, logits in found.items() if logits is not None}
        if save_logits:
            path = os.path.join(trainer.args.output_dir, f"predict_logits{'_' * bool(name)}{name}.npz")
            np.savez_compressed(path, **found)
        for model, logits in found.items():
            suffix = "" if model == "teacher" else f"_{model}"
            file_name = f"predict_results{'_' * bool(name)}{name}{suffix}.txt"
            with open(os.path.join(trainer.args.output_dir, file_name), "w", encoding="utf-8") as file:
                file.write("index\tprediction\n")
                for index, prediction in enumerate(labels.predictions(logits)):
                    file.write(f"{index}\t{labels.format(prediction)}\n")


def unlabelled_rows(argument: str, path: str, columns: Sequence[str], model_args: LabelledModelArguments) -> Dataset:
    """The texts of a file without their labels, if it has any; `argument` is the one that gave the path.

    Raises:
        ValueError: The file lacks a column of the training data.
    """
    split = argument.removesuffix("_file")
    rows = load_files({split: path}, model_args.cache_dir)[split]
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"`--{argument} {path}` has no column {missing[0]!r}, as the training data has; its columns are "
            f"{rows.column_names}. Rename one."
        )
    return rows


def augmentation_of(data_args: GlueDataArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The augmentation of the training batches, if there is one."""
    if data_args.augmentation is None:
        return None
    kinds = {
        "token_masking": (partial(TokenMasking, tokenizer), "rate"),
        "word_dropout": (partial(WordDropout, tokenizer), "rate"),
        "mixup": (Mixup, "alpha"),
    }
    make, name = kinds[data_args.augmentation]
    return make() if data_args.augmentation_rate is None else make(**{name: data_args.augmentation_rate})


def model_card_settings(data_args: GlueDataArguments) -> dict[str, str | None]:
    """Task, data and baseline for the model cards."""
    settings = {"tasks": "text-classification", "baseline": data_args.baseline}
    if data_args.task_name is not None:
        settings |= {
            "language": "en",
            "dataset_tags": "glue",
            "dataset_args": data_args.task_name,
            "dataset": f"GLUE {data_args.task_name.upper()}",
        }
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script, with the arguments of the command line or of `argv`."""
    model_args, data_args, training_args, checkpoint = start(LabelledModelArguments, GlueDataArguments, argv=argv)
    if training_args.do_predict and data_args.files and data_args.test_file is None:
        raise ValueError("`--do_predict` needs `--test_file`.")
    if data_args.align_file is not None and not model_args.align_steps:
        raise ValueError(
            f"`--align_file {data_args.align_file}` has no effect with `--align_steps 0`: give a number of steps, or "
            "leave it out."
        )
    task = data_args.task_name
    raw = named_label(load_raw_data(model_args, data_args), data_args.label_column_name)
    selected = select_rows(raw, task, wanted_splits(data_args, training_args))
    source = raw["train"] if "train" in raw else next(iter(raw.values()))
    columns = text_columns(source, task, data_args.text_column_names)
    labels = Labels.of(source, task).ordered_as(load_config(model_args))

    tokenizer = load_tokenizer(model_args)
    student_tokenizer = load_student_tokenizer(model_args, tokenizer)
    load = partial(
        load_labelled_model,
        auto_class=AutoModelForSequenceClassification,
        labels=labels,
        seed=training_args.seed,
    )
    models = load_models(model_args, training_args, partial(load, model_args=model_args))
    max_length = allowed_length("max_seq_length", data_args.max_seq_length, tokenizer, models)
    pad = data_args.pad_to_max_length
    if pad and training_args.train_sampling_strategy == "group_by_length":
        logger.warning("Grouping by length saves nothing with padding: give `--pad_to_max_length False`.")
    preprocess = Preprocessor(tokenizer, columns, labels, max_length, pad, student_tokenizer=student_tokenizer)
    examples = {split: tokenize(parts, preprocess, data_args, training_args) for split, parts in selected.items()}
    texts = {
        name: unlabelled_rows(name, getattr(data_args, name), columns, model_args)
        for name in ("unlabeled_file", "align_file")
        if getattr(data_args, name) is not None and training_args.do_train
    }
    more = tokenize(texts, replace(preprocess, labelled=False), data_args, training_args)
    if "unlabeled_file" in more:
        for name, rows in examples["train"].items():
            examples["train"][name] = concatenate_datasets([rows, more["unlabeled_file"].cast(rows.features)])
    train = next(iter(examples["train"].values())) if training_args.do_train else None
    unlabelled = more.get("align_file")

    multiple = padding_multiple(training_args)
    if pad:
        collator = default_data_collator
    elif student_tokenizer is None:
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    else:
        collator = PairDataCollator.of(tokenizer, student_tokenizer, pad_to_multiple_of=multiple)
    make_trainer = lambda models, args: CoDistillationTrainer(  # noqa: E731
        **aligned(models, unlabelled or train, model_args, args, checkpoint, collator, tokenizer),
        args=args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=next(iter(examples["validation"].values())) if training_args.do_eval else None,
        processing_class=tokenizer,
        student_processing_class=student_tokenizer,
        augmentation=augmentation_of(data_args, tokenizer),
        augmented=data_args.augmented,
        compute_metrics=metrics_for(labels, task),
    )
    trainer = make_or_train(make_trainer, models, load, model_args, training_args)
    parts = {"_mm" if name == "mnli-mm" else "": rows for name, rows in examples.get("validation", {}).items()}
    run(
        trainer,
        checkpoint,
        model_card_settings(data_args),
        lambda: predict(trainer, examples["test"], labels, data_args.save_logits),
        parts=parts,
    )


if __name__ == "__main__":
    main()
