"""Checks of tokenizers: models that get the same token ids must mean the same tokens by them."""

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..model_structure import config_of

logger = logging.get_logger(__name__)

#: The remedy if the tokenizers differ.
_CHOOSE = "Choose a model that shares the tokenizer, or cut one from the teacher with `create_student`."


def check_vocabularies(teacher: PreTrainedModel, other: PreTrainedModel, argument: str, processing_class: Any) -> None:
    """Refuse models with different tokenizers, since they receive the same token ids.

    Embeddings may be padded to different sizes over one tokenizer. Nothing is downloaded: the other model's tokenizer
    is compared if it is in the folder that the model was loaded from, or in the cache.

    Args:
        teacher: The teacher.
        other: The model that is paired with it.
        argument: Name of the argument that gave the other model.
        processing_class: The trainer's tokenizer, or a processor with a tokenizer. Without a tokenizer, the one that
            the teacher was saved with is taken.

    Raises:
        ValueError: The tokenizers differ, or the sizes do and the difference is no padding.
    """
    sizes = {"model": vocabulary_size(teacher), argument: vocabulary_size(other)}
    if None in sizes.values():
        return
    tokenizer, named = tokenizer_of(processing_class), "`processing_class`"
    if tokenizer is None:
        tokenizer, named = _saved_tokenizer(teacher), "`model`"
    if tokenizer is not None:
        check_tokenizer(other, argument, tokenizer, named, _CHOOSE)
        if all(_is_padded(size, len(tokenizer)) for size in sizes.values()):
            return
        check_tokenizer(teacher, "model", tokenizer, named, _CHOOSE)
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"`model` has `vocab_size={sizes['model']}` and `{argument}` has `vocab_size={sizes[argument]}`: they "
            f"receive the same token ids, which would mean different tokens to them. {_CHOOSE}"
        )


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer, or that of a processor; `None` without a tokenizer."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def check_tokenizer(
    model: PreTrainedModel, argument: str, tokenizer: PreTrainedTokenizerBase, named: str, remedy: str
) -> None:
    """Refuse a tokenizer that differs from the one that a model was saved with.

    Args:
        model: The model.
        argument: Name of the argument that gave the model.
        tokenizer: The tokenizer.
        named: Name of the argument that gave the tokenizer, for the message.
        remedy: The advice of the message.

    Raises:
        ValueError: An id is another token to the tokenizer that the model was saved with, or the model has fewer ids.
    """
    saved = _saved_tokenizer(model)
    tokens, own_tokens = (
        {index: token for token, index in one.get_vocab().items()} if one is not None else {}
        for one in (tokenizer, saved)
    )
    # Ids that only one of them has are added tokens. The size of the embeddings is checked below.
    different = [index for index in sorted(tokens.keys() & own_tokens.keys()) if tokens[index] != own_tokens[index]]
    if different:
        first = "; ".join(
            f"id {index} is {own_tokens[index]!r} for one and {tokens[index]!r} for the other"
            for index in different[:3]
        )
        raise ValueError(
            f"`{argument}` was trained with another tokenizer than {named}: {saved.name_or_path!r} has "
            f"{len(own_tokens)} tokens and {tokenizer.name_or_path!r} has {len(tokens)}, and {first}. {remedy}"
        )
    size = vocabulary_size(model)
    if size is not None and size < len(tokenizer):
        raise ValueError(
            f"`{argument}` has `vocab_size={size}`, and the tokenizer has {len(tokenizer)} tokens ({named}): ids "
            f"beyond the embeddings of `{argument}` would occur. {remedy}"
        )


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Return the number of token ids in a model's config; `None` for images and audio."""
    return getattr(model.config.get_text_config(), "vocab_size", None) if hasattr(model, "config") else None


def _is_padded(size: int, num_tokens: int) -> bool:
    """Tell whether a vocabulary size is the tokenizer's, possibly rounded up to a multiple of 8 or more."""
    return size == num_tokens or (size % 8 == 0 and 0 < size - num_tokens < 1024)


def _saved_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that a model was saved with, from a local folder or the cache of the Hub."""
    name = getattr(config_of(model), "name_or_path", "")
    if not name or (os.path.isdir(name) and not os.path.isfile(os.path.join(name, "tokenizer_config.json"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception as error:  # no tokenizer, or a missing library: no reason to stop a training
        logger.debug("No tokenizer of %s could be loaded to compare it: %r", name, error)
        return None
