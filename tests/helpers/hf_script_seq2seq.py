"""The structure of Hugging Face's `run_translation.py` and `run_summarization.py`; see `hf_scripts.py`."""

from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, Value
from hf_scripts import Run, report, splits, train
from tiny_tokenizer import TRANSLATIONS
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)


def run_translation(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Sequence-to-sequence with padding in the collator, which also makes the decoder's inputs."""
    raw = splits(
        lambda row, index: {
            "translation": {"en": row["text"], "es": " ".join(TRANSLATIONS[word] for word in row["text"].split())}
        },
    )

    def texts_of(rows: dict[str, list]) -> tuple[list[str], list[str]]:
        return tuple([pair[language] for pair in rows["translation"]] for language in ("en", "es"))

    return run_seq2seq(model_path, args, trainer_class, raw, texts_of, padding=False, tasks="translation", **extra)


def run_summarization(model_path: str, args: TrainingArguments, trainer_class: type[Trainer], **extra: Any) -> Run:
    """Sequence-to-sequence with a prefix, and with padding and ignored labels in the data."""
    raw = splits(
        lambda row, index: {
            "article": f"{row['text']} {row['subject']} likes the {row['animal']} .",
            "highlights": f"{row['subject']} {row['verb']}",
            "id": str(index),
        },
        article=Value("string"),
        highlights=Value("string"),
        id=Value("string"),
    )

    def texts_of(rows: dict[str, list]) -> tuple[list[str], list[str]]:
        return [f"sum: {article}" for article in rows["article"]], rows["highlights"]

    return run_seq2seq(
        model_path, args, trainer_class, raw, texts_of, padding="max_length", tasks="summarization", **extra
    )


def run_seq2seq(
    model_path: str,
    args: TrainingArguments,
    trainer_class: type[Trainer],
    raw: DatasetDict,
    texts_of: Callable[[dict[str, list]], tuple[list[str], list[str]]],
    *,
    padding: bool | str,
    tasks: str,
    **extra: Any,
) -> Run:
    """Run the common part of both scripts."""
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_path, config=AutoConfig.from_pretrained(model_path))

    def preprocess_function(rows: dict[str, list]) -> dict[str, list]:
        sources, targets = texts_of(rows)
        encoded = tokenizer(sources, max_length=40, padding=padding, truncation=True)
        labels = tokenizer(text_target=targets, max_length=24, padding=padding, truncation=True)["input_ids"]
        if padding == "max_length":
            labels = [[-100 if token == tokenizer.pad_token_id else token for token in row] for row in labels]
        return {**encoded, "labels": labels}

    data = raw.map(preprocess_function, batched=True, remove_columns=raw["train"].column_names)

    def decoded(token_ids: np.ndarray) -> list[str]:
        token_ids = np.where(token_ids != -100, token_ids, tokenizer.pad_token_id)
        return [text.strip() for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)]

    def compute_metrics(prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        predictions, labels = prediction
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        pairs = zip(decoded(predictions), decoded(labels), strict=True)
        return {
            "similarity": float(np.mean([SequenceMatcher(None, *pair).ratio() for pair in pairs])),
            "gen_len": float(np.mean(np.count_nonzero(predictions != tokenizer.pad_token_id, axis=1))),
        }

    args.generation_max_length = args.generation_max_length if args.generation_max_length is not None else 14
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=compute_metrics if args.predict_with_generate else None,
        **extra,
    )
    if args.do_train:
        train(trainer)
    metrics = trainer.evaluate(max_length=args.generation_max_length, num_beams=2, metric_key_prefix="eval")
    report(trainer, "eval", metrics)
    output = None
    if args.do_predict:
        output = trainer.predict(data["test"], metric_key_prefix="predict", max_length=10, num_beams=1)
        report(trainer, "predict", output.metrics)
        if args.predict_with_generate:
            path = Path(args.output_dir) / "generated_predictions.txt"
            path.write_text("\n".join(decoded(output.predictions)), encoding="utf-8")
    trainer.create_model_card(finetuned_from=model_path, tasks=tasks)
    return Run(trainer, metrics, output)
