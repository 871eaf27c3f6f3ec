"""Models, GLUE folders and files for `run_glue_ctcd.py`, made from a few words."""

import json
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from script_runs import save_bert
from transformers import BertForSequenceClassification, BertModel

from examples.data.glue import TASK_TO_TEXT

TEXT = "the a film was good bad not very dull bright and but story plot actor scene it felt long short"
WORDS = TEXT.split()
GLUE_LABELS = {
    "cola": ["unacceptable", "acceptable"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "mrpc": ["not_equivalent", "equivalent"],
}


def save_model(folder: Path, layers: int = 3, seed: int = 0, head: bool = True, **config: object) -> str:
    model_class = BertForSequenceClassification if head else BertModel
    return save_bert(folder, WORDS, layers, seed, model_class, **config)


def sentences(count: int, seed: int, low: int = 2, high: int = 12) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(low, high))) for _ in range(count)]


def glue_rows(task: str, count: int, seed: int, labelled: bool = True) -> Dataset:
    rows = {name: sentences(count, seed + i) for i, name in enumerate(TASK_TO_TEXT[task])}
    generator = np.random.default_rng(seed)
    if task == "stsb":
        labels, feature = generator.uniform(0, 5, count).tolist(), Value("float32")
    else:
        names = GLUE_LABELS[task]
        labels, feature = generator.integers(0, len(names), count).tolist(), ClassLabel(names=names)
    rows |= {"label": labels if labelled else [-1] * count, "idx": list(range(count))}
    text = {name: Value("string") for name in TASK_TO_TEXT[task]}
    return Dataset.from_dict(rows, Features({**text, "label": feature, "idx": Value("int32")}))


def save_glue(folder: Path, task: str) -> str:
    """A folder in the layout of the Hub's `nyu-mll/glue` with one task."""
    parts = ["validation", "test"]
    if task == "mnli":
        parts = [f"{part}_{kind}" for part in parts for kind in ("matched", "mismatched")]
    files = []
    for seed, split in enumerate(["train", *parts]):
        path = folder / task / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        glue_rows(task, 12 + seed, 10 * seed, labelled="test" not in split).to_parquet(path)
        files.append(f"  - split: {split}\n    path: {task}/{split}-*\n")
    header = f"---\nconfigs:\n- config_name: {task}\n  data_files:\n{''.join(files)}---\n"
    (folder / "README.md").write_text(header)
    return str(folder)


def save_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def save_files(folder: Path, labels: list, suffix: str = "csv") -> dict[str, str]:
    """Training and validation files with these labels in turn."""
    return {
        f"{split}_file": save_rows(
            folder / f"{split}.{suffix}",
            [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(sentences(12, seed))],
        )
        for seed, split in enumerate(["train", "validation"])
    }
