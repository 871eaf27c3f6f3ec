#!/usr/bin/env python
"""Co-train a teacher and a student to find answers in texts: `run_qa.py` of Hugging Face for two models.

A 12-layer teacher and a 6-layer student cut from it:

    python examples/run_qa_ctcd.py --model_name_or_path google-bert/bert-base-uncased --student_num_hidden_layers 6 \
        --dataset_name rajpurkar/squad --do_train --do_eval --output_dir out

Your own files (columns `id`, `context`, `question` and `answers` with `text` and `answer_start`, as SQuAD has them on
the Hub, or the nested JSON as SQuAD is published),
with questions that have no answer, and a pre-trained student:

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds `examples` from any folder

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, EvalPrediction, default_data_collator
from transformers.trainer_utils import speed_metrics

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments
from examples.common.aligning import aligned
from examples.common.arguments import DataArguments, ModelArguments, option, start
from examples.common.generations import make_or_train
from examples.common.models import allowed_length, load_fast_tokenizer, load_model, load_models
from examples.common.run import card_of, in_order, padding_multiple, run
from examples.data.loading import load_files, load_raw_data, selected_rows, tokenize
from examples.data.qa import WINDOW_COLUMNS, Answer, AnswerFinder, WindowTokenizer, squad_scores, unnested

# ---- Arguments ----


@dataclass
class QaDataArguments(DataArguments):
    """The data to train and to evaluate on."""

    test_file: str | None = option(None, "A file with the test data.")
    max_seq_length: int = option(384, "Number of tokens of a question and a part of its context.")
    doc_stride: int = option(128, "Number of tokens that two parts of a context share.")
    pad_to_max_length: bool = option(True, "Pad all to `max_seq_length` instead of the longest one of the batch.")
    version_2_with_negative: bool = option(False, "Some questions have no answer, as in SQuAD 2.0.")
    null_score_diff_threshold: float = option(
        0.0, 'The score of "no answer" must be above that of the best answer by more than this.'
    )
    n_best_size: int = option(20, "Number of candidates to keep for each question.")
    max_answer_length: int = option(30, "Largest number of tokens of an answer.")
    max_predict_samples: int | None = option(None, "Use only the first N test rows.")

    #: CSV is left out: its cells cannot hold answers.
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
    """The rows that a run needs, by split: `train`, `validation`, `test`.

    Raises:
        ValueError: A split or a column is missing, or a question without an answer is not expected.
    """
    raw = load_raw_data(model_args, data_args)
    for split, path in data_args.files.items():
        if "data" in raw[split].column_names:  # {"data": [rows]}, as in some files of SQuAD
            raw[split] = load_files({split: path}, model_args.cache_dir, data_args.readers, field="data")[split]
        if "paragraphs" in raw[split].column_names:  # as SQuAD is published
            raw[split] = unnested(raw[split])
    selected = selected_rows(raw, data_args, training_args)
    for split, rows in selected.items():
        _check_rows(rows, split, data_args.version_2_with_negative)
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
    """The true answers to each question."""
    return [answers["text"] if answers else [] for answers in rows["answers"]]


# ---- The trainer ----


class QuestionAnsweringTrainer(CoDistillationTrainer):
    """A trainer whose metrics need the answers as texts, like the class of this name in Hugging Face's examples.

    For each model, `compute_metrics` gets the answers as `predictions` and the lists of true ones as `label_ids`.

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
            eval_dataset: The windows; by default the evaluation set of the trainer.
            ignore_keys: Keys of the outputs to leave out.
            metric_key_prefix: Prefix of the metrics.
            finder: Finds the answers in the windows.
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
        """Like `evaluate`, for data that may have no true answers: then the only metrics are those of speed.

        Args:
            test_dataset: The windows.
            finder: Finds the answers in the windows.
            ignore_keys: Keys of the outputs to leave out.
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
        # The loop would call it with logits.
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
        """Write answers, candidates and odds of "no answer", by the `id` of the question."""
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
    """Run the script, with the arguments of the command line or of `argv`."""
    model_args, data_args, training_args, checkpoint = start(ModelArguments, QaDataArguments, argv=argv)
    selected = load_data(model_args, data_args, training_args)
    tokenizer = load_fast_tokenizer(model_args, "where a token is in the text")
    load = partial(load_model, auto_class=AutoModelForQuestionAnswering, seed=training_args.seed)
    models = load_models(model_args, training_args, partial(load, model_args=model_args))
    max_length = allowed_length("max_seq_length", data_args.max_seq_length, tokenizer, models)
    pad = data_args.pad_to_max_length
    preprocess = WindowTokenizer(tokenizer, max_length, data_args.doc_stride, pad)
    windows = tokenize(selected, preprocess, data_args, training_args, with_indices=True)
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

    padding = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=padding_multiple(training_args))
    collator = default_data_collator if pad else padding
    make_trainer = lambda models, args: QuestionAnsweringTrainer(  # noqa: E731
        **aligned(models, inputs.get("train"), model_args, args, checkpoint, collator),
        args=args,
        data_collator=collator,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        eval_finder=finders.get("validation"),
    )
    trainer = make_or_train(make_trainer, models, load, model_args, training_args)

    def predict() -> None:
        metrics = trainer.predict(inputs["test"], finders["test"])
        metrics["predict_samples"] = len(inputs["test"])
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)

    run(trainer, checkpoint, card_of(data_args, "question-answering"), predict)


if __name__ == "__main__":
    main()
