#!/usr/bin/env python
"""Co-train a teacher and a student to label words (entities, parts of speech): HF's `run_ner.py` for two models.

Named entities, a 12-layer teacher and a 6-layer student cut from it:

    python examples/run_ner_ctcd.py --model_name_or_path google-bert/bert-base-cased --student_num_hidden_layers 6 \
        --dataset_name lhoestq/conll2003 --do_train --do_eval --output_dir out

Your own files (columns `tokens` and `ner_tags`: lists, or texts with spaces between the words), a pre-trained student:

    python examples/run_ner_ctcd.py --model_name_or_path google-bert/bert-base-cased \
        --student_model_name_or_path distilbert/distilbert-base-cased \
        --train_file train.json --validation_file dev.json --test_file test.json \
        --do_train --do_eval --do_predict --output_dir out

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
`--do_predict` writes the labels of the test set's words to `predictions.txt` and `predictions_student.txt`, a line for
each row and a label for each word, `_` for words beyond `--max_seq_length`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds `examples` from any folder

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from datasets import Dataset
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from ctcd_trainer import CoDistillationTrainer
from examples.common.aligning import aligned
from examples.common.arguments import DataArguments, LabelledModelArguments, logger, option, start
from examples.common.generations import make_or_train
from examples.common.models import allowed_length, load_config, load_fast_tokenizer, load_labelled_model, load_models
from examples.common.run import card_of, in_order, padding_multiple, run
from examples.data.loading import load_raw_data, selected_rows, tokenize
from examples.data.ner import (
    CUT_OFF,
    FIRST_TOKENS,
    WordLabels,
    WordTokenizer,
    find_column,
    metrics_for,
    predicted_labels,
)

TASKS = ("ner", "pos", "chunk")


@dataclass
class NerDataArguments(DataArguments):
    """The data to train and to evaluate on."""

    task_name: str = option("ner", f"{', '.join(TASKS)}: the labels are in the column `<task_name>_tags`.")
    test_file: str | None = option(None, "A file with the test data.")
    text_column_name: str | None = option(None, "Column with the words. Default: `tokens` or `words`.")
    label_column_name: str | None = option(
        None, "Column with the labels. Default: `<task_name>_tags`, `tags` or `labels`."
    )
    max_seq_length: int = option(512, "Number of tokens at which rows are cut.")
    pad_to_max_length: bool = option(
        False, "Pad all rows to `max_seq_length` instead of the longest row of the batch."
    )
    label_all_tokens: bool = option(False, "Label and score all sub-words of a word, not only the first one.")
    return_entity_level_metrics: bool = option(False, "Add the scores of each type of entity, e.g. `eval_PER_f1`.")
    max_predict_samples: int | None = option(None, "Use only the first N test rows.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task_name = self.task_name.lower()
        if self.task_name not in TASKS and self.label_column_name is None:
            raise ValueError(
                f"`--task_name {self.task_name}` is none of {', '.join(TASKS)}: name the column of labels with "
                "`--label_column_name`."
            )


def find_columns(selected: Mapping[str, Dataset], data_args: NerDataArguments) -> tuple[str, str]:
    """The columns of words and of labels in the rows of all splits. A test set needs no labels.

    Raises:
        ValueError: A column is missing.
    """
    usual = (f"{data_args.task_name}_tags", "tags", "labels")
    text_column, label_column = data_args.text_column_name, data_args.label_column_name
    for split, rows in selected.items():
        text_column = find_column(rows, text_column, "text_column_name", ("tokens", "words"))
        if split != "test":
            label_column = find_column(rows, label_column, "label_column_name", usual)
    return text_column, label_column or usual[0]


def predict(
    trainer: CoDistillationTrainer, rows: Dataset, first_tokens: Sequence[list[int]], labels: WordLabels
) -> None:
    """Write both models' labels of the words of each row, in the order of the data.

    Args:
        trainer: The trainer.
        rows: The tokens.
        first_tokens: Position of the first token of each word of each row, or `CUT_OFF`.
        labels: The labels.
    """
    with in_order(trainer):
        output = trainer.predict(rows, metric_key_prefix="predict", student_predictions=True)
    trainer.log_metrics("predict", output.metrics)
    trainer.save_metrics("predict", output.metrics)
    if not trainer.is_world_process_zero():
        return
    cut_off = sum(positions.count(CUT_OFF) for positions in first_tokens)
    if cut_off:
        logger.warning("%d words of the test data lie beyond `--max_seq_length` and get no label.", cut_off)
    for suffix, predictions in (("", output.predictions), ("_student", output.student_predictions)):
        if predictions is None:
            continue
        path = os.path.join(trainer.args.output_dir, f"predictions{suffix}.txt")
        with open(path, "w", encoding="utf-8") as file:
            for positions, indices in zip(first_tokens, np.asarray(predictions), strict=True):
                words = ("_" if position == CUT_OFF else labels.names[indices[position]] for position in positions)
                file.write(f"{' '.join(words)}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script, with the arguments of the command line or of `argv`."""
    model_args, data_args, training_args, checkpoint = start(LabelledModelArguments, NerDataArguments, argv=argv)
    raw = load_raw_data(model_args, data_args)
    selected = selected_rows(raw, data_args, training_args)
    text_column, label_column = find_columns(selected, data_args)
    labels = WordLabels.of(raw.values(), label_column, load_config(model_args))

    tokenizer = load_fast_tokenizer(model_args, "which word a token belongs to")
    load = partial(
        load_labelled_model,
        auto_class=AutoModelForTokenClassification,
        labels=labels,
        seed=training_args.seed,
    )
    models = load_models(model_args, training_args, partial(load, model_args=model_args))
    max_length = allowed_length("max_seq_length", data_args.max_seq_length, tokenizer, models)
    pad, label_all = data_args.pad_to_max_length, data_args.label_all_tokens
    preprocess = WordTokenizer(tokenizer, labels, text_column, label_column, max_length, pad, label_all)
    tokens = tokenize(selected, preprocess, data_args, training_args)
    inputs = {split: rows.remove_columns(FIRST_TOKENS) for split, rows in tokens.items()}
    collator = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=padding_multiple(training_args))
    make_trainer = lambda models, args: CoDistillationTrainer(  # noqa: E731
        **aligned(models, inputs.get("train"), model_args, args, checkpoint, collator),
        args=args,
        data_collator=collator,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=tokenizer,
        compute_metrics=metrics_for(labels, data_args.return_entity_level_metrics),
        preprocess_logits_for_metrics=predicted_labels,
    )
    trainer = make_or_train(make_trainer, models, load, model_args, training_args)
    run(
        trainer,
        checkpoint,
        card_of(data_args, "token-classification"),
        lambda: predict(trainer, inputs["test"], tokens["test"][FIRST_TOKENS], labels),
    )


if __name__ == "__main__":
    main()
