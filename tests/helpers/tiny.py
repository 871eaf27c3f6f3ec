"""Tiny models and data for the tests: made from configs, without a network."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments

VOCAB_SIZE = 48
PROBLEMS = {
    "single_label": {"num_labels": 3, "problem_type": "single_label_classification"},
    "multi_label": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
}


def tiny_bert(
    num_layers: int = 2, seed: int = 0, problem: str = "single_label", dropout: float = 0.0, **config: Any
) -> BertForSequenceClassification:
    """A BERT with a head, whose predictions are far enough from uniform that soft losses matter."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.3,
        **PROBLEMS[problem],
        **config,
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**settings))
    torch.set_rng_state(state)
    return model


def tiny_rows(count: int = 24, problem: str = "single_label", ragged: bool = False, seed: int = 0) -> list[dict]:
    """Rows of random token ids with labels of the problem."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator)) if ragged else 8
        ids = torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
        if problem == "single_label":
            label = int(torch.randint(0, 3, (1,), generator=generator))
        elif problem == "multi_label":
            label = torch.randint(0, 2, (4,), generator=generator).float().tolist()
        else:
            label = float(torch.randn((), generator=generator))
        rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * length, "labels": label})
    return rows


class OnTheFly(torch.utils.data.Dataset):
    """A map-style data set, whose rows and labels nobody knows beforehand."""

    def __init__(self, rows: Sequence[dict]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def collate(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Pad to the longest row."""
    batch = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True)
        for name in ("input_ids", "attention_mask")
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def tiny_args(output_dir: Path, **arguments: Any) -> CoDistillationTrainingArguments:
    """Arguments of a short, silent training on the CPU, in the order of the data."""
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # gradients that are only rounding errors must not become steps
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return CoDistillationTrainingArguments(output_dir=str(output_dir), **settings)


def tiny_trainer(output_dir: Path, problem: str = "single_label", **options: Any) -> CoDistillationTrainer:
    """A trainer of a 3-layer teacher and a 2-layer student; options are of the trainer or else of the arguments."""
    own_names = inspect.signature(CoDistillationTrainer).parameters.keys() - {"args"}
    settings = {name: options.pop(name) for name in own_names if name in options}
    if "model_init" not in settings:
        settings.setdefault("model", tiny_bert(3, seed=1, problem=problem))
    if "student_model_init" not in settings:
        settings.setdefault("student_model", tiny_bert(2, seed=2, problem=problem))
    if options.get("distillation_mode") == "community":
        settings.setdefault("pretrained_teacher", tiny_bert(2, seed=3, problem=problem))
    settings.setdefault("train_dataset", tiny_rows(problem=problem))
    settings.setdefault("data_collator", collate)
    return CoDistillationTrainer(args=tiny_args(output_dir, **options), **settings)


def train_alone(model: PreTrainedModel, output_dir: Path, **options: Any) -> PreTrainedModel:
    """Train one model with plain Trainer on the same data, and return it."""
    rows = options.pop("train_dataset", tiny_rows())
    trainer = Trainer(model, tiny_args(output_dir, **options), data_collator=collate, train_dataset=rows)
    trainer.train()
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return copy.deepcopy(model.state_dict())


def assert_same_weights(
    actual: torch.nn.Module | dict, expected: torch.nn.Module | dict, tolerance: float = 0.0
) -> None:
    """Every weight equal, bit for bit or to an absolute tolerance."""
    first, second = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (actual, expected))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that differ from a copy."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
