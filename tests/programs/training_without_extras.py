# ruff: noqa: E402 - what is absent must be so before anything is imported
"""Trains, evaluates, saves, loads and resumes on plain lists of dicts: `python training_without_extras.py FOLDER`.

As a program it cannot import the packages of the extra `examples`. It prints the results as JSON.
"""

import json
import sys

ABSENT = ("datasets", "evaluate", "peft", "sklearn", "scipy", "matplotlib")

if __name__ == "__main__":
    for name in ABSENT:
        sys.modules[name] = None  # an import fails, and so does the search for its version

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from tiny import collate, tiny_args, tiny_bert, tiny_rows
from tiny_models import rows_of, tiny_batch, tiny_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import import_utils

import ctcd_trainer
from ctcd_trainer import CoDistillationTrainer, create_student


def train(folder: Path, models: list, rows: list[dict], bf16: bool, collator: Any, resume: str | None = None) -> dict:
    """Train a pair with a frozen teacher; losses of the evaluation and sums of the weights."""
    args = tiny_args(
        folder,
        distillation_mode="community",
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        bf16=bf16,
        pretrained_cache_dir=str(folder / "cache"),
    )
    trainer = CoDistillationTrainer(
        models[0],
        args,
        collator,
        rows,
        rows[:8],
        compute_metrics=lambda prediction: {"mean": float(prediction.predictions.mean())},
        student_model=models[1],
        pretrained_teacher=models[2],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.predict(rows[:8])
    trainer.create_model_card()
    weights = [sum(p.double().abs().sum().item() for p in model.parameters()) for model in models[:2]]
    return {"loss": metrics["eval_loss"], "student_loss": metrics["eval_student_loss"], "weights": weights}


def results_of(folder: Path, bf16: bool) -> dict[str, dict]:
    """Results of a classification, which is resumed as well, and of masked language models."""

    def classifiers() -> list:
        teacher = tiny_bert(3, 1)
        return [teacher, create_student(teacher, num_hidden_layers=2), tiny_bert(2, 3)]

    place, rows = folder / "classification", tiny_rows(16)
    results = {"classification": train(place, classifiers(), rows, bf16, collate)}
    results["resumed"] = train(place, classifiers(), rows, bf16, collate, resume=str(place / "checkpoint-1"))
    for model in (place, place / "student"):
        AutoModelForSequenceClassification.from_pretrained(model)
    models = [tiny_model("bert", "masked-lm", layers, seed) for layers, seed in ((2, 1), (1, 2), (2, 3))]
    rows = rows_of(tiny_batch("masked-lm", 8))
    return results | {"masked-lm": train(folder / "masked-lm", models, rows, bf16, None)}


def main() -> None:
    """Import every module of the package, train in both precisions, and print the results."""
    assert not import_utils.is_datasets_available()
    assert not import_utils.is_peft_available()
    for module in pkgutil.walk_packages(ctcd_trainer.__path__, "ctcd_trainer."):
        importlib.import_module(module.name)
    results = {name: results_of(Path(sys.argv[1], name), name == "bf16") for name in ("fp32", "bf16")}
    assert all(sys.modules[name] is None for name in ABSENT)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
