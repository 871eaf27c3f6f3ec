"""The paper's protocol at toy size: a corpus, two GLUE tasks and a tiny pre-trained model, made from a few words."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from tiny_tokenizer import WORDS, bert_tokenizer
from transformers import BertConfig, BertForPreTraining

GRID: list[dict[str, Any]] = [
    {
        "task": "mlm",
        "seed": [0, 1],
        "method": ["alone", "kd", "reversed", "ctcd", "community", "community-kd"],
        "then": ["rte"],
    },
    {"task": "mlm", "seed": 1, "method": "kd", "then": ["stsb"]},  # a model of the block above, on another task
    {"task": "mlm", "seed": 0, "method": ["student-from-teacher", "teacher-from-student"]},
    {"task": "mlm", "seed": 0, "method": "ctcd", "temperature": 2.0},
    {"task": "mlm", "seed": 0, "method": ["alone", "ctcd"], "rows": 8},
    {"task": "mlm", "seed": 0, "method": ["alone", "ctcd"], "teacher_init": "scratch", "student_init": "scratch"},
    {"task": ["rte", "stsb"], "seed": 0, "method": ["alone", "kd", "reversed", "ctcd", "community"]},
]


def write_toy(folder: Path, grid: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """Write the corpus, the tasks, the model and the YAML file of a toy scale; returns the YAML file.

    Args:
        folder: Where to write.
        grid: The grid; every method by default.
        **settings: Other settings of the scale.
    """
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))

    corpus = folder / "corpus"
    for split, count in {"train": 200, "validation": 60}.items():
        Dataset.from_dict({"text": [sentence() for _ in range(count)]}).to_parquet(corpus / f"{split}.parquet")
    glue = folder / "glue"
    label = {"rte": ClassLabel(names=["entailment", "not_entailment"]), "stsb": Value("float32")}
    for task, feature in label.items():
        features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": feature})
        for split, count in {"train": 60, "validation": 20}.items():
            rows = [(sentence(), sentence(), draw.randint(0, 1)) for _ in range(count)]
            columns = dict(zip(features, map(list, zip(*rows, strict=True)), strict=True))
            Dataset.from_dict(columns, features=features).to_parquet(glue / task / f"{split}.parquet")
    configs = [
        {
            "config_name": task,
            "data_files": [{"split": split, "path": f"{task}/{split}.parquet"} for split in ("train", "validation")],
        }
        for task in label
    ]
    (glue / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")

    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertForPreTraining(config).save_pretrained(folder / "model")

    scale = {
        "name": "toy",
        "text": [{"path": str(corpus)}],
        "glue": str(glue),
        "models": {"source": str(folder / "model"), "student": {"num_hidden_layers": 2}},
        "block_length": 16,
        "score_blocks": 8,
        "curve_rows": 8,
        "evaluations": 3,
        "checkpoints": 1,
        "tasks": {"rte": {"max_length": 24}, "stsb": {"train_rows": 40}},
        "defaults": {
            "mlm": {"steps": 6, "batch_size": 4, "learning_rate": 1e-3},
            "finetuning": {"epochs": 1, "rows": 24, "batch_size": 8, "learning_rate": 1e-3},
            "cotraining": {"epochs": 1, "rows": 24, "batch_size": 8, "learning_rate": 1e-3},
        },
        "grid": GRID if grid is None else grid,
        **settings,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(scale))
    return path


def numbers(path: Path) -> dict[str, Any]:
    """The results of a file by key, without what depends on the machine and the hour."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({result["key"] for result in results}) == len(results)
    for result in results:
        del result["compute"]["seconds"], result["environment"]
    return {result["key"]: result for result in results}


def call(module: object, *arguments: object) -> None:
    """Run the `main` of a module with arguments of the command line."""
    argv, sys.argv = sys.argv, [module.__name__, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = argv
