"""The structure of Hugging Face's `run_qa.py` and of the trainer that it brings; see `hf_scripts.py`."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from hf_scripts import Run, report, splits, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PredictionOutput


def question_answering_trainer(trainer_class: type[Trainer]) -> type[Trainer]:
    """The subclass that the script brings: metrics are computed after the loop, from texts instead of logits."""

    class QuestionAnsweringTrainer(trainer_class):
        def __init__(
            self,
            *args: Any,
            eval_examples: Dataset | None = None,
            post_process_function: Callable[..., EvalPrediction] | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)
            self.eval_examples = eval_examples
            self.post_process_function = post_process_function

        def loop_without_metrics(self, dataloader: Any, description: str, prefix: str) -> Any:
            compute_metrics, self.compute_metrics = self.compute_metrics, None
            try:
                return self.evaluation_loop(
                    dataloader,
                    description=description,
                    prediction_loss_only=True if compute_metrics is None else None,
                    ignore_keys=None,
                    metric_key_prefix=prefix,
                )
            finally:
                self.compute_metrics = compute_metrics

        def metrics_of(self, prediction: EvalPrediction, prefix: str) -> dict[str, float]:
            return {f"{prefix}_{key}": value for key, value in self.compute_metrics(prediction).items()}

        def evaluate(
            self,
            eval_dataset: Dataset | None = None,
            eval_examples: Dataset | None = None,
            ignore_keys: list[str] | None = None,
            metric_key_prefix: str = "eval",
        ) -> dict[str, float]:
            eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            eval_examples = self.eval_examples if eval_examples is None else eval_examples
            output = self.loop_without_metrics(self.get_eval_dataloader(eval_dataset), "Evaluation", metric_key_prefix)
            prediction = self.post_process_function(eval_examples, eval_dataset, output.predictions)
            metrics = self.metrics_of(prediction, metric_key_prefix) | output.metrics
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def predict(
            self,
            predict_dataset: Dataset,
            predict_examples: Dataset,
            ignore_keys: list[str] | None = None,
            metric_key_prefix: str = "test",
        ) -> PredictionOutput:
            output = self.loop_without_metrics(
                self.get_test_dataloader(predict_dataset), "Prediction", metric_key_prefix
            )
            prediction = self.post_process_function(predict_examples, predict_dataset, output.predictions, "predict")
            metrics = self.metrics_of(prediction, metric_key_prefix) | output.metrics
            return PredictionOutput(prediction.predictions, prediction.label_ids, metrics)

    return QuestionAnsweringTrainer


def best_spans(examples: Dataset, features: Dataset, predictions: tuple[np.ndarray, np.ndarray]) -> dict[str, str]:
    """The text of the best-scored span of each example, over all its features."""
    start_logits, end_logits = predictions
    assert len(start_logits) == len(end_logits) == len(features)
    contexts = dict(zip(examples["id"], examples["context"], strict=True))
    best: dict[str, tuple[float, str]] = {}
    for feature, starts, ends in zip(features, start_logits, end_logits, strict=True):
        offsets, name = feature["offset_mapping"], feature["example_id"]
        inside = [position for position, offset in enumerate(offsets) if offset is not None]
        spans = ((starts[i] + ends[j], i, j) for i in inside for j in inside if i <= j < i + 8)
        score, i, j = max(spans)
        text = contexts[name][offsets[i][0] : offsets[j][1]]
        best[name] = max(best.get(name, (-math.inf, "")), (float(score), text))
    return {name: text for name, (_, text) in best.items()}


def run_qa(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Extractive question answering: long contexts overflow, and the features of evaluation have no labels."""
    set_seed(args.seed)

    def row_of(row: dict[str, str], index: int) -> dict[str, Any]:
        context = f"the bird follows the cat . {row['text']} the small cat likes the red bird ."
        answer = f"the {row['colour']} {row['animal']}"
        return {
            "id": str(index),
            "title": "animals",
            "context": context,
            "question": f" who {row['verb']} the {row['animal']} ?",
            "answers": {"text": [answer], "answer_start": [context.index(answer, context.index(row["text"]))]},
        }

    raw = splits(row_of)
    tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=True)
    model = AutoModelForQuestionAnswering.from_pretrained(model_path, config=AutoConfig.from_pretrained(model_path))

    def encode(rows: dict[str, list]) -> Any:
        return tokenizer(
            [question.lstrip() for question in rows["question"]],
            rows["context"],
            truncation="only_second",
            max_length=32,
            stride=8,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
        )

    def prepare_train_features(rows: dict[str, list]) -> Any:
        encoded = encode(rows)
        samples, all_offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        encoded["start_positions"], encoded["end_positions"] = [], []
        for index, (sample, offsets) in enumerate(zip(samples, all_offsets, strict=True)):
            answer = rows["answers"][sample]
            first = answer["answer_start"][0]
            last = first + len(answer["text"][0])
            in_context = [part == 1 for part in encoded.sequence_ids(index)]
            starts = [i for i, (begin, _) in enumerate(offsets) if in_context[i] and begin == first]
            ends = [i for i, (_, end) in enumerate(offsets) if in_context[i] and end == last]
            both = bool(starts and ends)  # else the answer lies outside, and [CLS] stands for that
            encoded["start_positions"].append(starts[0] if both else 0)
            encoded["end_positions"].append(ends[0] if both else 0)
        return encoded

    def prepare_validation_features(rows: dict[str, list]) -> Any:
        encoded = encode(rows)
        samples = encoded.pop("overflow_to_sample_mapping")
        encoded["example_id"] = [rows["id"][sample] for sample in samples]
        encoded["offset_mapping"] = [
            [offset if part == 1 else None for offset, part in zip(offsets, encoded.sequence_ids(i), strict=True)]
            for i, offsets in enumerate(encoded["offset_mapping"])
        ]
        return encoded

    columns = raw["train"].column_names
    features = {
        split: rows.map(
            prepare_train_features if split == "train" else prepare_validation_features,
            batched=True,
            remove_columns=columns,
        )
        for split, rows in raw.items()
    }

    def post_processing_function(
        examples: Dataset, features: Dataset, predictions: tuple[np.ndarray, np.ndarray], stage: str = "eval"
    ) -> EvalPrediction:
        answers = best_spans(examples, features, predictions)
        return EvalPrediction(
            predictions=[{"id": name, "prediction_text": text} for name, text in answers.items()],
            label_ids=[{"id": row["id"], "answers": row["answers"]} for row in examples],
        )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        found = {answer["id"]: answer["prediction_text"] for answer in prediction.predictions}
        pairs = [(found[row["id"]].split(), row["answers"]["text"][0].split()) for row in prediction.label_ids]
        return {
            "exact_match": float(np.mean([answer == wanted for answer, wanted in pairs])),
            "f1": float(np.mean([2 * len({*a} & {*b}) / (len({*a}) + len({*b})) for a, b in pairs])),
        }

    trainer = question_answering_trainer(trainer_class)(
        model=model,
        args=args,
        train_dataset=features["train"] if args.do_train else None,
        eval_dataset=features["validation"] if args.do_eval else None,
        eval_examples=raw["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=None),
        post_process_function=post_processing_function,
        compute_metrics=compute_metrics,
        **extra,
    )
    metrics = train_and_evaluate(trainer, args)
    output = None
    if args.do_predict:
        output = trainer.predict(features["test"], raw["test"], metric_key_prefix="predict")
        report(trainer, "predict", output.metrics)
    trainer.create_model_card(finetuned_from=model_path, tasks="question-answering")
    return Run(trainer, metrics, output)
