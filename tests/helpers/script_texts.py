"""Models and files of text for `run_mlm_ctcd.py` and `run_clm_ctcd.py`, made from a few words."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tiny_tokenizer import TRANSLATIONS, tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

WORDS = list(TRANSLATIONS)


def save_model(folder: Path, model_type: str = "gpt2", layers: int = 3, seed: int = 0, **config: object) -> str:
    tokenizer = tiny_tokenizer(model_type)
    torch.manual_seed(seed)
    settings = {"vocab_size": len(tokenizer), "initializer_range": 0.3, **config}
    if model_type == "gpt2":
        settings |= {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=layers, n_head=2, n_positions=32, **settings))
    else:
        shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
        model = BertForMaskedLM(BertConfig(num_hidden_layers=layers, **shape, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(4, 14))) for _ in range(count)]


def save_texts(path: Path, rows: list[str], column: str = "text") -> str:
    data = Dataset.from_dict({column: rows, "source": ["x"] * len(rows)})
    if path.suffix == ".txt":
        path.write_text("\n".join(rows))
    elif path.suffix == ".csv":
        data.to_csv(path)
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.to_json(path)
    return str(path)


def save_files(folder: Path, suffix: str = "txt") -> dict[str, str]:
    return {
        "train_file": save_texts(folder / f"train.{suffix}", texts(60)),
        "validation_file": save_texts(folder / f"validation.{suffix}", texts(20, seed=1)),
    }
