"""The structure of Hugging Face's example scripts, each as a function that takes the class of the trainer.

Everything between the command line and the end of a script is kept: columns of its data set, tokenization, collator,
metrics, subclasses of the trainer, and the order of its calls. Metrics are local, since `evaluate` would fetch them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import PredictionOutput


@dataclass
class Run:
    """The results of a script."""

    trainer: Trainer
    metrics: dict[str, float]
    output: PredictionOutput | None = None


# ---- Data ----


def sentences(count: int, seed: int) -> list[dict[str, str]]:
    """The parts of sentences such as "anna sees the red dog ."."""
    parts = {
        "subject": ["anna", "paul"],
        "verb": ["sees", "likes", "follows"],
        "colour": ["red", "small"],
        "animal": ["cat", "dog", "bird"],
    }
    generator = np.random.default_rng(seed)
    rows = [{part: str(generator.choice(words)) for part, words in parts.items()} for _ in range(count)]
    return [row | {"text": "{subject} {verb} the {colour} {animal} .".format(**row)} for row in rows]


def splits(row_of: Callable[[dict[str, str], int], dict[str, Any]], **features: Any) -> DatasetDict:
    """Training, validation and test rows, made from the sentences; the last evaluation batch is never a full one."""
    return DatasetDict(
        {
            split: Dataset.from_list(
                [row_of(sentence, index) for index, sentence in enumerate(sentences(count, seed))],
                features=Features(features) if features else None,
            )
            for split, count, seed in (("train", 16, 0), ("validation", 7, 1), ("test", 6, 2))
        }
    )


# ---- What all scripts share ----


def train(trainer: Trainer) -> None:
    """Train, save, and write the metrics and the state."""
    metrics = trainer.train(resume_from_checkpoint=None).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def report(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    """Print and write the metrics of an evaluation or a prediction."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics


def train_and_evaluate(trainer: Trainer, args: TrainingArguments) -> dict[str, float]:
    """Train and evaluate, as far as the arguments ask for it."""
    if args.do_train:
        train(trainer)
    return report(trainer, "eval", trainer.evaluate()) if args.do_eval else {}


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal values."""
    return float((np.asarray(predictions) == np.asarray(labels)).mean())


# ---- run_glue ----


def run_glue(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Sequence classification with dynamic padding; the test split has lost its labels."""
    set_seed(args.seed)
    names = ["cat", "dog", "bird"]
    raw = splits(
        lambda row, index: {"sentence": row["text"], "label": names.index(row["animal"]), "idx": index},
        sentence=Value("string"),
        label=ClassLabel(names=names),
        idx=Value("int32"),
    )
    config = AutoConfig.from_pretrained(model_path, num_labels=len(names), finetuning_task="sst2")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, config=config)
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))

    data = raw.map(
        lambda rows: tokenizer(rows["sentence"], padding=False, max_length=32, truncation=True), batched=True
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return {"accuracy": accuracy(np.argmax(logits, axis=1), prediction.label_ids)}

    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        **extra,
    )
    metrics = train_and_evaluate(trainer, args)
    output = None
    if args.do_predict:
        output = trainer.predict(data["test"].remove_columns("label"), metric_key_prefix="predict")
    trainer.create_model_card(finetuned_from=model_path, tasks="text-classification")
    return Run(trainer, metrics, output)


# ---- run_ner ----


def run_ner(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Token classification: pieces of a word after the first one are labelled -100."""
    set_seed(args.seed)
    names = ["O", "B-PER", "B-ANI", "I-ANI"]
    tag_of = {"anna": 1, "paul": 1, "red": 2, "small": 2, "cat": 3, "dog": 3, "bird": 3}
    raw = splits(
        lambda row, index: {
            "id": str(index),
            "tokens": row["text"].split(),
            "ner_tags": [tag_of.get(word, 0) for word in row["text"].split()],
        },
        id=Value("string"),
        tokens=List(Value("string")),
        ner_tags=List(ClassLabel(names=names)),
    )
    config = AutoConfig.from_pretrained(model_path, num_labels=len(names), finetuning_task="ner")
    tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=True)
    model = AutoModelForTokenClassification.from_pretrained(model_path, config=config)
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))

    def tokenize_and_align_labels(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows["tokens"], padding=False, truncation=True, max_length=48, is_split_into_words=True)
        encoded["labels"] = []
        for row, tags in enumerate(rows["ner_tags"]):
            words = encoded.word_ids(batch_index=row)
            starts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            encoded["labels"].append(
                [tags[word] if is_start else -100 for word, is_start in zip(words, starts, strict=True)]
            )
        return encoded

    data = raw.map(tokenize_and_align_labels, batched=True)

    def compute_metrics(prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        logits, labels = prediction
        scored = labels != -100
        return {"accuracy": accuracy(np.argmax(logits, axis=2)[scored], labels[scored])}

    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=None),
        compute_metrics=compute_metrics,
        **extra,
    )
    metrics = train_and_evaluate(trainer, args)
    output = None
    if args.do_predict:
        output = trainer.predict(data["test"], metric_key_prefix="predict")
        predictions, labels, predict_metrics = output
        assert np.argmax(predictions, axis=2).shape == labels.shape
        report(trainer, "predict", predict_metrics)
    trainer.create_model_card(finetuned_from=model_path, tasks="token-classification")
    return Run(trainer, metrics, output)


# ---- run_swag ----


@dataclass
class MultipleChoiceCollator:
    """Flattens the choices, pads them together, and gives the batch its dimension of choices back."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        name = "label" if "label" in features[0] else "labels"
        labels = [feature.pop(name) for feature in features]
        choices = len(features[0]["input_ids"])
        flat = [{key: value[i] for key, value in feature.items()} for feature in features for i in range(choices)]
        batch = self.tokenizer.pad(flat, padding=True, return_tensors="pt")
        batch = {key: value.view(len(features), choices, -1) for key, value in batch.items()}
        return batch | {"labels": torch.tensor(labels, dtype=torch.int64)}


def run_swag(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Multiple choice with the script's own collator; the script does not predict."""
    set_seed(args.seed)
    endings = [f"ending{index}" for index in range(4)]
    animals = ["the cat .", "the dog .", "the bird .", "anna ."]
    raw = splits(
        lambda row, index: {
            "sent1": row["text"],
            "sent2": f"{row['subject']} {row['verb']}",
            **dict(zip(endings, np.roll(animals, index).tolist(), strict=True)),
            "label": np.roll(animals, index).tolist().index(f"the {row['animal']} ."),
        },
        sent1=Value("string"),
        sent2=Value("string"),
        **dict.fromkeys(endings, Value("string")),
        label=ClassLabel(num_classes=4),
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=True)
    model = AutoModelForMultipleChoice.from_pretrained(model_path, config=AutoConfig.from_pretrained(model_path))

    def preprocess_function(rows: dict[str, list]) -> dict[str, list]:
        first = [[context] * 4 for context in rows["sent1"]]
        second = [[f"{header} {rows[name][i]}" for name in endings] for i, header in enumerate(rows["sent2"])]
        encoded = tokenizer(list(chain(*first)), list(chain(*second)), truncation=True, max_length=48, padding=False)
        return {key: [value[i : i + 4] for i in range(0, len(value), 4)] for key, value in encoded.items()}

    data = raw.map(preprocess_function, batched=True)

    def compute_metrics(prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        predictions, label_ids = prediction
        return {"accuracy": accuracy(np.argmax(predictions, axis=1), label_ids)}

    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=MultipleChoiceCollator(tokenizer),
        compute_metrics=compute_metrics,
        **extra,
    )
    metrics = train_and_evaluate(trainer, args)
    trainer.create_model_card(finetuned_from=model_path, tasks="multiple-choice")
    return Run(trainer, metrics)


# ---- run_mlm and run_clm ----


def grouped_texts(tokenizer: PreTrainedTokenizerBase, block_size: int, **options: Any) -> DatasetDict:
    """The texts, tokenized, joined and cut into blocks."""
    raw = splits(lambda row, index: {"text": row["text"]})
    data = raw.map(lambda rows: tokenizer(rows["text"], **options), batched=True, remove_columns=["text"])

    def group_texts(rows: dict[str, list]) -> dict[str, list]:
        joined = {name: list(chain(*values)) for name, values in rows.items()}
        length = len(next(iter(joined.values()))) // block_size * block_size
        return {
            name: [values[i : i + block_size] for i in range(0, length, block_size)] for name, values in joined.items()
        }

    return data.map(group_texts, batched=True)


def argmax_of(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """The scripts' `preprocess_logits_for_metrics`: what the metrics need, and no logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def run_language_model(trainer: Trainer, args: TrainingArguments, model_path: str, tasks: str) -> Run:
    """The end of both scripts: a perplexity from the loss, and no prediction."""
    if args.do_train:
        train(trainer)
    metrics = trainer.evaluate()
    metrics["eval_samples"] = len(trainer.eval_dataset)
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    report(trainer, "eval", metrics)
    trainer.create_model_card(finetuned_from=model_path, tasks=tasks)
    return Run(trainer, metrics)


def run_mlm(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Masked language modelling."""
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=True)
    model = AutoModelForMaskedLM.from_pretrained(model_path, config=AutoConfig.from_pretrained(model_path))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    data = grouped_texts(tokenizer, 8, return_special_tokens_mask=True)

    def compute_metrics(prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        predictions, labels = (array.reshape(-1) for array in prediction)
        mask = labels != -100
        return {"accuracy": accuracy(predictions[mask], labels[mask])}

    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.3),
        compute_metrics=compute_metrics if args.do_eval else None,
        preprocess_logits_for_metrics=argmax_of if args.do_eval else None,
        **extra,
    )
    return run_language_model(trainer, args, model_path, "fill-mask")


def run_clm(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Causal language modelling: the labels are the inputs, which the model shifts."""
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=True)
    model = AutoModelForCausalLM.from_pretrained(model_path, config=AutoConfig.from_pretrained(model_path))
    data = grouped_texts(tokenizer, 8).map(lambda rows: {"labels": rows["input_ids"].copy()}, batched=True)

    def compute_metrics(prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        predictions, labels = prediction
        return {"accuracy": accuracy(predictions[:, :-1].reshape(-1), labels[:, 1:].reshape(-1))}

    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics if args.do_eval else None,
        preprocess_logits_for_metrics=argmax_of if args.do_eval else None,
        **extra,
    )
    return run_language_model(trainer, args, model_path, "text-generation")
