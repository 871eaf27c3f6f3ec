"""Preparing tasks whose splits have names of their own."""

from dataclasses import replace
from pathlib import Path

import yaml
from datasets import ClassLabel, Dataset, Features, Value
from tiny_tokenizer import bert_tokenizer
from toy_protocol import write_toy

from examples.paper.prepare import prepare_glue
from examples.paper.settings import load_scale


def test_mnli_is_scored_on_its_matched_part(tmp_path: Path) -> None:
    names = ["entailment", "neutral", "contradiction"]
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})
    labels = {"train": [0, 1, 2] * 10, "validation_matched": [2, 0, 1, 1], "validation_mismatched": [0] * 6}
    for split, values in labels.items():
        rows = {"premise": ["the dog"] * len(values), "hypothesis": ["a cat sleeps"] * len(values), "label": values}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "glue" / "mnli" / f"{split}.parquet")
    files = [{"split": split, "path": f"mnli/{split}.parquet"} for split in labels]
    configs = [{"config_name": "mnli", "data_files": files}]
    (tmp_path / "glue" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    scale = replace(load_scale(write_toy(tmp_path / "toy")), glue=str(tmp_path / "glue"), tasks={"mnli": {}})
    tensors, settings = prepare_glue(scale, "mnli", bert_tokenizer())
    assert tensors["validation.labels"].tolist() == [2, 0, 1, 1]
    assert [len(tensors[f"{part}.labels"]) for part in ("train", "dev")] == [27, 3]
    assert settings["num_labels"] == 3
    assert settings["id2label"] == dict(enumerate(names))
