"""Checks of tokens and data, made before any work starts. Each error names both values and a remedy."""

import os
from collections.abc import Collection, Mapping, Sized
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..tasks.base import Task
from ..tasks.labels import LABEL_COLUMNS

logger = logging.get_logger(__name__)

#: What helps if two models have not one tokenizer.
_CHOOSE = "Choose a model that shares the tokenizer, or cut one from the teacher with `create_student`."


def check_vocabularies(
    teacher: PreTrainedModel, other: PreTrainedModel | None, argument: str, processing_class: Any
) -> None:
    """Both models receive the same token ids, so the ids must mean the same to both.

    Models whose embeddings are padded to different sizes over one tokenizer are accepted. Nothing is fetched: the
    other model's tokenizer is compared where it lies in the folder that the model was loaded from or in the cache.

    Args:
        teacher: The teacher.
        other: The model that is paired with it, if there is one.
        argument: Name of the argument that gave it.
        processing_class: The trainer's; it counts if it is a tokenizer or has one. Without one, the tokenizer that the
            teacher was saved with stands for it.

    Raises:
        ValueError: The tokenizers differ, or the sizes do and the difference is no padding.
    """
    if other is None:
        return
    sizes = {"model": vocabulary_size(teacher), argument: vocabulary_size(other)}
    if None in sizes.values():
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    named = "`processing_class`"
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer, named = _saved_tokenizer(teacher), "`model`"
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        check_tokenizer(other, argument, tokenizer, named, _CHOOSE)
        if all(_is_padded(size, len(tokenizer)) for size in sizes.values()):
            return
        check_tokenizer(teacher, "model", tokenizer, named, _CHOOSE)
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"`model` has `vocab_size={sizes['model']}` and `{argument}` has `vocab_size={sizes[argument]}`: they "
            f"receive the same token ids, which would mean different tokens to them. {_CHOOSE}"
        )


def check_tokenizer(
    model: PreTrainedModel, argument: str, tokenizer: PreTrainedTokenizerBase, named: str, remedy: str
) -> None:
    """The ids that a tokenizer gives must be those that a model was trained with, as far as that can be told.

    Args:
        model: The model.
        argument: Name of the argument that gave it.
        tokenizer: The tokenizer.
        named: What the message calls the argument that gave it.
        remedy: What the message advises.

    Raises:
        ValueError: The model was saved with a tokenizer to which an id is another token, or it has fewer ids.
    """
    own = _saved_tokenizer(model)
    tokens, own_tokens = (
        {index: token for token, index in one.get_vocab().items()} if one is not None else {}
        for one in (tokenizer, own)
    )
    # Ids that only one of them has are added tokens; whether the embeddings reach that far is checked below.
    different = [index for index in sorted(tokens.keys() & own_tokens.keys()) if tokens[index] != own_tokens[index]]
    if different:
        first = "; ".join(
            f"id {index} is {own_tokens[index]!r} for one and {tokens[index]!r} for the other"
            for index in different[:3]
        )
        raise ValueError(
            f"`{argument}` was trained with another tokenizer than {named}: {own.name_or_path!r} has "
            f"{len(own_tokens)} tokens and {tokenizer.name_or_path!r} has {len(tokens)}, and {first}. {remedy}"
        )
    size = vocabulary_size(model)
    if size is not None and size < len(tokenizer):
        raise ValueError(
            f"`{argument}` has `vocab_size={size}`, and the tokenizer has {len(tokenizer)} tokens ({named}): ids "
            f"beyond the embeddings of `{argument}` would occur. {remedy}"
        )


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Number of token ids that a model's config states; `None` for a model of other inputs (images, audio)."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _is_padded(size: int, num_tokens: int) -> bool:
    """Whether a vocabulary size is the tokenizer's, or that one rounded up as is usual (to multiples of 8 or more)."""
    return size == num_tokens or (size % 8 == 0 and 0 < size - num_tokens < 1024)


def _saved_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a model was saved with, if it is in a local folder or in the cache of the Hub."""
    name = getattr(model.config, "name_or_path", "")
    if not name or (os.path.isdir(name) and not os.path.isfile(os.path.join(name, "tokenizer_config.json"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # the folder or the cache has none
        return None


def check_dataset(dataset: Any, argument: str) -> None:
    """A data set, or each of a dict of data sets, must have examples.

    Raises:
        ValueError: It is empty.
    """
    if isinstance(dataset, Mapping):
        for name, part in dataset.items():
            check_dataset(part, f"{argument}[{name!r}]")
    elif isinstance(dataset, Sized) and len(dataset) == 0:
        raise ValueError(f"`{argument}` is empty (0 examples). Check the file, the split or the filter it comes from.")


def check_labels(task: Task, dataset: Any, argument: str, learning: Collection[str] = ()) -> None:
    """The labels of a data set that has them at hand (a `datasets.Dataset` or a list of dicts) must fit the task.

    Other data sets (iterable, or computed on the fly) would have to be read whole, so they are not checked here.

    Args:
        task: The task.
        dataset: The data set.
        argument: Name of the argument that gave it.
        learning: The models that learn from others, and so from rows without a label too.

    Raises:
        ValueError: A label does not fit the task, or there is none and nothing else to learn from; the message has the
            row and the value.
    """
    if isinstance(dataset, Mapping):
        for name, part in dataset.items():
            check_labels(task, part, f"{argument}[{name!r}]", learning)
        return
    labels = None
    if hasattr(dataset, "column_names") and isinstance(dataset, Sized):
        column = next((name for name in LABEL_COLUMNS if name in (dataset.column_names or ())), None)
        labels = dataset.with_format(None)[column] if column else None
    elif isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], Mapping):
        column = next((name for name in LABEL_COLUMNS if name in dataset[0]), None)
        labels = [row[column] for row in dataset] if column else None
    if labels is not None:
        try:
            task.check_labels(labels)
            unlabelled = np.flatnonzero(task.unlabelled_rows(labels)) if task.per_row else ()
            if len(unlabelled) and argument == "train_dataset" and not learning:
                raise ValueError(
                    f"Row {unlabelled[0]} and {len(unlabelled) - 1} more have no label ({labels[unlabelled[0]]!r}), "
                    "and no model learns from another one in this mode. Drop these rows, or choose a mode with soft "
                    "losses (`distillation_mode='ctcd'`)."
                )
            if len(unlabelled):
                logger.warning(
                    "%d of %d rows of `%s` have no label (%r): only the soft losses use them%s.",
                    *(len(unlabelled), len(labels), argument, labels[unlabelled[0]]),
                    f", which train the {' and the '.join(learning)}" if argument == "train_dataset" else "",
                )
        except ValueError as error:
            raise ValueError(f"`{argument}`: {error}") from error
