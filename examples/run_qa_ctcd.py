#!/usr/bin/env python
"""Co-train a teacher and a student to find answers in texts: `run_qa.py` of Hugging Face for two models.

A 12-layer teacher and a 6-layer student cut from it:

    python examples/run_qa_ctcd.py --model_name_or_path google-bert/bert-base-uncased --student_num_hidden_layers 6 \
        --dataset_name rajpurkar/squad --do_train --do_eval --output_dir out

Your own files (columns `id`, `context`, `question` and `answers` with `text` and `answer_start`, as SQuAD has them),
with questions that have no answer, and a student of its own:

    python examples/run_qa_ctcd.py --model_name_or_path google-bert/bert-base-uncased \
        --student_model_name_or_path distilbert/distilbert-base-uncased --version_2_with_negative \
        --train_file train.json --validation_file dev.json --do_train --do_eval --output_dir out

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
Answers are written as `eval_predictions.json` and, with `--do_predict`, `predict_predictions.json`; the candidates as
`..._nbest_predictions.json`; with `--version_2_with_negative`, by how much "no answer" beats the best answer as
`..._null_odds.json`. The names of the student's files end in `_student`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose package `examples` this is in


import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
)
from transformers.trainer_utils import speed_metrics

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments
from examples.common.models import ModelArguments, allowed_length, load_model, load_models, load_tokenizer
from examples.common.run import (
    DataArguments,
    card_of,
    check_arguments,
    checkpoint_to_resume,
    evaluate,
    finish,
    first_rows,
    in_order,
    load_files,
    load_raw_data,
    parse_arguments,
    set_up_logging,
    split_of,
    train,
    wanted_splits,
)
from examples.data.qa import WINDOW_COLUMNS, Answer, AnswerFinder, WindowTokenizer, squad_scores

# ---- Arguments ----


@dataclass
class QaDataArguments(DataArguments):
    """Which data the models are trained and evaluated on."""

    test_file: str | None = field(default=None, metadata={"help": "A file with the test data."})
    max_seq_length: int = field(
        default=384, metadata={"help": "Number of tokens of a question and a part of its context."}
    )
    doc_stride: int = field(default=128, metadata={"help": "Number of tokens that two parts of a context share."})
    pad_to_max_length: bool = field(
        default=True,
        metadata={"help": "Whether to pad all to `max_seq_length` instead of the longest one of the batch."},
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Whether some questions have no answer, as in SQuAD 2.0."}
    )
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "By how much the score of no answer must be above that of the best answer."}
    )
    n_best_size: int = field(default=20, metadata={"help": "Number of candidates to keep for each question."})
    max_answer_length: int = field(default=30, metadata={"help": "Number of tokens that an answer may have."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first N test rows."})

    #: No CSV, whose cells do not hold answers.
    readers: ClassVar[Mapping[str, str]] = {"json": "json", "jsonl": "json", "parquet": "parquet"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_best_size", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name} {getattr(self, name)}` must be 1 or more.")
        if not 0 <= self.doc_stride < self.max_seq_length:
            raise ValueError(
                f"`--doc_stride {self.doc_stride}` must be at least 0 and less than `--max_seq_length "
                f"{self.max_seq_length}`: parts of a context overlap by less than their length."
            )


# ---- Data ----


def load_data(
    model_args: ModelArguments, data_args: QaDataArguments, training_args: CoDistillationTrainingArguments
) -> DatasetDict:
    """The rows that are wanted, by split: `train`, `validation`, `test`.

    Raises:
        ValueError: A split or a column is missing, or a question has no answer and is expected to have one.
    """
    raw = load_raw_data(model_args, data_args)
    for split, path in data_args.files.items():
        if "data" in raw[split].column_names:  # {"data": [rows]}, as some files of SQuAD are
            raw[split] = load_files({split: path}, model_args.cache_dir, data_args.readers, field="data")[split]
    selected = {}
    for split, limit in wanted_splits(data_args, training_args).items():
        selected[split] = first_rows(split_of(raw, split), limit)
        _check_rows(selected[split], split, data_args.version_2_with_negative)
    return DatasetDict(selected)


def _check_rows(rows: Dataset, split: str, with_negative: bool) -> None:
    needed = {"question", "context", *(["answers"] if split != "test" else []), *(["id"] if split != "train" else [])}
    if missing := sorted(needed - set(rows.column_names)):
        raise ValueError(f"The {split} data has no column {missing[0]!r}, only {rows.column_names}. Rename it.")
    if "answers" not in rows.column_names:
        return
    answers = rows.features["answers"]
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
        raise ValueError(
            f"The column 'answers' of the {split} data is {answers}: each row must have a list `text` and a list "
            "`answer_start`, the place of each text in the context."
        )
    for row, texts in enumerate([] if with_negative or split == "train" else true_answers(rows)):
        if not texts:
            raise ValueError(
                f"Row {row} of the {split} data has no answer: give `--version_2_with_negative` if questions may have "
                "none, or drop the row."
            )


def true_answers(rows: Dataset) -> list[list[str]]:
    """The answers that are right, for each question."""
    return [answers["text"] if answers else [] for answers in rows["answers"]]


# ---- The trainer ----


class QuestionAnsweringTrainer(CoDistillationTrainer):
    """A trainer whose metrics need the answers as texts, as Hugging Face's of the same name.

    `compute_metrics` gets the answers as `predictions` and the lists of true ones as `label_ids`, for each model.

    Args:
        *args: Arguments of `CoDistillationTrainer`.
        eval_finder: Finds the answers in `eval_dataset`.
        **kwargs: Arguments of `CoDistillationTrainer`.
    """

    def __init__(self, *args: Any, eval_finder: AnswerFinder | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_finder = eval_finder

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        finder: AnswerFinder | None = None,
    ) -> dict[str, float]:
        """Find both models' answers, write them, and return the metrics of both.

        Args:
            eval_dataset: The windows; by default those that the trainer was made with.
            ignore_keys: Keys of the outputs that are no logits.
            metric_key_prefix: Prefix of the metrics.
            finder: Finds the answers in them.
        """
        with in_order(self):
            dataloader = self.get_eval_dataloader(eval_dataset)
            metrics = self._answer(
                dataloader, "Evaluation", finder or self.eval_finder, ignore_keys, metric_key_prefix
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self,
        test_dataset: Dataset,
        finder: AnswerFinder,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "predict",
    ) -> dict[str, float]:
        """As `evaluate`, for data that may have no true answers: the metrics are then only those of speed.

        Args:
            test_dataset: The windows.
            finder: Finds the answers in them.
            ignore_keys: Keys of the outputs that are no logits.
            metric_key_prefix: Prefix of the metrics.
        """
        with in_order(self):
            dataloader = self.get_test_dataloader(test_dataset)
            return self._answer(dataloader, "Prediction", finder, ignore_keys, metric_key_prefix)

    def _answer(
        self,
        dataloader: DataLoader,
        description: str,
        finder: AnswerFinder,
        ignore_keys: list[str] | None,
        metric_key_prefix: str,
    ) -> dict[str, float]:
        """Write both models' answers, and return the metrics."""
        start_time = time.time()
        # It would be called with logits.
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.evaluation_loop(
                dataloader,
                description=description,
                prediction_loss_only=False,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        finally:
            self.compute_metrics = compute_metrics
        metrics = output.metrics
        predictions = {"": output.predictions, "student": getattr(output, "student_predictions", None)}
        for model, logits in predictions.items():
            if logits is None:
                continue
            answers = finder(*logits[:2])
            if self.is_world_process_zero():
                self._write(answers, finder.rows["id"], metric_key_prefix, f"_{model}" if model else "")
            if compute_metrics is not None and "answers" in finder.rows.column_names:
                texts = [answer.text for answer in answers]
                scores = compute_metrics(EvalPrediction(texts, true_answers(finder.rows)))
                prefix = f"{metric_key_prefix}_{model}_" if model else f"{metric_key_prefix}_"
                metrics |= {f"{prefix}{name}": value for name, value in scores.items()}
        steps = len(dataloader)
        metrics |= speed_metrics(metric_key_prefix, start_time, num_samples=output.num_samples, num_steps=steps)
        return metrics

    def _write(self, answers: list[Answer], ids: list[Any], prefix: str, suffix: str) -> None:
        """Write answers, candidates and the odds of there being none, by the question's `id`."""
        of_question = {str(key): answer for key, answer in zip(ids, answers, strict=True)}
        contents = {
            "predictions": {key: answer.text for key, answer in of_question.items()},
            "nbest_predictions": {key: answer.best for key, answer in of_question.items()},
            "null_odds": {key: a.null_odds for key, a in of_question.items() if a.null_odds is not None},
        }
        os.makedirs(self.args.output_dir, exist_ok=True)
        for name, content in contents.items():
            if content:
                path = os.path.join(self.args.output_dir, f"{prefix}_{name}{suffix}.json")
                with open(path, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=2)


# ---- The work ----


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script, with the arguments of the command line or these."""
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, QaDataArguments, CoDistillationTrainingArguments, argv=argv
    )
    check_arguments(model_args, training_args)
    set_up_logging(training_args)
    checkpoint = checkpoint_to_resume(training_args)

    selected = load_data(model_args, data_args, training_args)
    # Padding on the left would move the context away from where its tokens are looked up.
    tokenizer = load_tokenizer(model_args, padding_side="right")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where a token is in the text: name a model with a fast "
            "tokenizer in `--tokenizer_name`."
        )

    def load(option: str, frozen: bool) -> PreTrainedModel:
        return load_model(AutoModelForQuestionAnswering, option, model_args, training_args.seed, frozen)

    models = load_models(model_args, training_args, load)
    max_length = allowed_length("max_seq_length", data_args.max_seq_length, tokenizer, models)
    pad = data_args.pad_to_max_length
    preprocessor = WindowTokenizer(tokenizer, max_length, data_args.doc_stride, pad)
    with training_args.main_process_first(desc="tokenizing"):
        windows = {
            split: rows.map(
                preprocessor,
                batched=True,
                with_indices=True,
                num_proc=data_args.preprocessing_num_workers,
                remove_columns=rows.column_names,
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {split}",
            )
            for split, rows in selected.items()
        }
    inputs = {split: rows.remove_columns(list(WINDOW_COLUMNS)) for split, rows in windows.items()}
    finders = {
        split: AnswerFinder(
            selected[split],
            windows[split],
            n_best_size=data_args.n_best_size,
            max_answer_length=data_args.max_answer_length,
            with_negative=data_args.version_2_with_negative,
            null_threshold=data_args.null_score_diff_threshold,
        )
        for split in windows
    }

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return squad_scores(prediction.predictions, prediction.label_ids, data_args.version_2_with_negative)

    multiple = 8 if training_args.fp16 or training_args.bf16 else None  # sizes that tensor cores like
    trainer = QuestionAnsweringTrainer(
        **models,
        args=training_args,
        data_collator=default_data_collator
        if pad
        else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple),
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        eval_finder=finders.get("validation"),
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    metrics = evaluate(trainer) if training_args.do_eval else {}
    if training_args.do_predict:
        predicted = trainer.predict(inputs["test"], finders["test"])
        predicted["predict_samples"] = len(inputs["test"])
        trainer.log_metrics("predict", predicted)
        trainer.save_metrics("predict", predicted)
    finish(trainer, metrics, card_of(data_args, "question-answering"))


if __name__ == "__main__":
    main()
