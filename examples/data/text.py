"""Text for language models: the splits, tokens in blocks of one length or line by line, and the metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, IterableDatasetDict
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments, default_data_collator

from ctcd_trainer.training import meters
from examples.common.arguments import TABLE_READERS, DataArguments, option

from . import loading
from .loading import Rows, first_rows, split_of, wanted_splits


@dataclass
class TextArguments(DataArguments):
    """The texts to train and to evaluate on."""

    text_column_name: str | None = option(None, "Column of the texts. Default: `text`, or else the first one.")
    validation_split_percentage: int = option(
        5, "Percentage of the training texts, from their start, that is used if there are no validation texts."
    )
    streaming: bool = option(False, "Read and preprocess the data while training (needs `--max_steps`).")
    max_train_samples: int | None = option(None, "Use only the first N training examples: blocks of tokens, or lines.")
    max_eval_samples: int | None = option(
        None, "Use only the first N validation examples: blocks of tokens, or lines."
    )

    readers: ClassVar[Mapping[str, str]] = {**TABLE_READERS, "txt": "text"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"`--validation_split_percentage {self.validation_split_percentage}` is not valid: it must be from 1 "
                "to 99, so that both parts have texts."
            )


# ---- Splits ----


def select_splits(
    raw: DatasetDict | IterableDatasetDict, data_args: TextArguments, training_args: TrainingArguments
) -> dict[str, Rows]:
    """Load the texts to train and to evaluate on; without validation texts, the first training texts become these.

    Returns:
        The splits `train`, for training, and `validation`, for evaluation, with one column of text.

    Raises:
        ValueError: A split that is wanted has no texts.
    """
    splits: dict[str, Rows] = dict(raw)
    if training_args.do_eval and "validation" not in splits and "train" in splits:
        percentage = data_args.validation_split_percentage
        if data_args.streaming:
            raise ValueError(
                f"`--do_eval` needs the split 'validation', and the data has only {list(raw)}. The length of a "
                f"stream is unknown, so {percentage} % cannot be split off. Give `--validation_file`, or leave out "
                "`--streaming`."
            )
        count = len(splits["train"]) * percentage // 100
        if count == 0:
            raise ValueError(
                f"`--validation_split_percentage {percentage}` of {len(splits['train'])} training texts is none. "
                "Raise it, or give `--validation_file`."
            )
        splits["validation"] = splits["train"].take(count)
        splits["train"] = splits["train"].skip(count)
    wanted = wanted_splits(data_args, training_args)
    return {split: _texts(split_of(splits, split), data_args.text_column_name) for split in wanted}


def _texts(rows: Rows, column: str | None) -> Rows:
    """Only the column of text, under the name `text`."""
    columns = rows.column_names or list(next(iter(rows)))  # a stream may not know them
    if column is not None and column not in columns:
        raise ValueError(f"`--text_column_name {column}`: the data has no such column, only {columns}.")
    column = column or ("text" if "text" in columns else columns[0])
    return (
        rows.select_columns(column) if column == "text" else rows.select_columns(column).rename_column(column, "text")
    )


# ---- Tokens ----


@dataclass(frozen=True)
class Blocks:
    """Turns a batch of texts into blocks of one length, for `Dataset.map(..., batched=True)`.

    It joins the texts and drops the rest at the end of a batch of texts, so nothing is padded.

    Attributes:
        tokenizer: The tokenizer.
        length: Number of tokens of a block.
        masked: Whether tokens will be masked later; then special tokens are marked.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    masked: bool

    def __call__(self, batch: Mapping[str, Sequence[str | None]]) -> dict[str, list]:
        """Tokens of a batch of texts."""
        texts = [text or "" for text in batch["text"]]
        tokens = self.tokenizer(
            texts,
            return_special_tokens_mask=self.masked,
            return_token_type_ids=False,  # GPT-2 would add embeddings for them
            verbose=False,  # no warning about long texts: they are cut into blocks
        )
        joined = {name: list(chain.from_iterable(values)) for name, values in tokens.items()}
        end = len(joined["input_ids"]) // self.length * self.length
        starts = range(0, end, self.length)
        return {name: [values[i : i + self.length] for i in starts] for name, values in joined.items()}


@dataclass(frozen=True)
class Lines:
    """Turns each text of a batch into one example, for `Dataset.map(..., batched=True)`.

    Attributes:
        tokenizer: The tokenizer.
        length: Number of tokens at which texts are cut.
        pad: Whether to pad to `length` instead of the longest text of a batch.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    pad: bool

    def __call__(self, batch: Mapping[str, Sequence[str | None]]) -> dict[str, list]:
        """Tokens of the texts that are not empty."""
        texts = [text for text in batch["text"] if text and not text.isspace()]
        tokens = self.tokenizer(
            texts,
            padding="max_length" if self.pad else False,
            truncation=True,
            max_length=self.length,
            return_special_tokens_mask=True,
        )
        return dict(tokens)


def tokenize(
    splits: Mapping[str, Rows], preprocess: Blocks | Lines, data_args: TextArguments, training_args: TrainingArguments
) -> dict[str, Rows]:
    """The first examples of each split, as many as are wanted.

    Raises:
        ValueError: A split has too little text for one example.
    """
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    if data_args.streaming:
        examples = {name: rows.map(preprocess, batched=True, remove_columns=["text"]) for name, rows in splits.items()}
    else:
        examples = loading.tokenize(splits, preprocess, data_args, training_args)
    for split, found in examples.items():
        if isinstance(found, Dataset) and len(found) == 0:
            raise ValueError(
                f"The {len(splits[split])} texts of the split {split!r} make no example of {preprocess.length} "
                "tokens. Give more text, or shorter examples (`--block_size`, `--max_seq_length`)."
            )
    return {split: first_rows(found, limits[split]) for split, found in examples.items()}


def collate_blocks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch whose labels are its tokens, for models that predict the next token."""
    batch = default_data_collator(rows)
    return batch | {"labels": batch["input_ids"].clone()}


# ---- Metrics ----


def best_tokens(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The likeliest token at each position. Keeping the logits of a data set would fill the memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def masked_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the masked tokens that are predicted."""
    return _accuracy(prediction.predictions, prediction.label_ids)


def next_token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the tokens that are predicted from the tokens before them."""
    return _accuracy(prediction.predictions[:, :-1], prediction.label_ids[:, 1:])


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    scored = labels != -100
    return {"accuracy": float((predictions == labels)[scored].mean())} if scored.any() else {}


#: The perplexity of each model that has a loss, also of a single model.
perplexities = partial(meters.perplexities, prefix="eval")
