"""Tiny tokenizers for the tests: made in memory from a handful of words, without a network.

None is trained: the trainers of `tokenizers` number the tokens in another order each time.
"""

from transformers import BartTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, T5Tokenizer

#: The words of all the tests' sentences, with their translations.
TRANSLATIONS = {
    "the": "el",
    "small": "chico",
    "red": "rojo",
    "cat": "gato",
    "dog": "perro",
    "bird": "ave",
    "anna": "ana",
    "paul": "pablo",
    "sees": "ve",
    "likes": "quiere",
    "follows": "sigue",
    "who": "quien",
    "sum": "suma",
    ".": ".",
    "?": "?",
    ":": ":",
}
WORDS = sorted({*TRANSLATIONS, *TRANSLATIONS.values()})
LETTERS = sorted(set("".join(WORDS)))
MODEL_MAX_LENGTH = 64


def bert_tokenizer() -> BertTokenizer:
    """WordPiece with BERT's special tokens; DistilBERT uses it as well. Words of more than 5 letters are split."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(
        vocab=_numbered([*tokens, *(word for word in WORDS if len(word) <= 5)]), model_max_length=MODEL_MAX_LENGTH
    )


def gpt2_tokenizer() -> GPT2Tokenizer:
    """Byte-level BPE with GPT-2's one special token, and so no padding."""
    vocab, merges = _byte_level_bpe(["<|endoftext|>"])
    return GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=MODEL_MAX_LENGTH)


def bart_tokenizer() -> BartTokenizer:
    """Byte-level BPE with BART's special tokens in BART's order."""
    vocab, merges = _byte_level_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return BartTokenizer(vocab=vocab, merges=merges, model_max_length=MODEL_MAX_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram with T5's special tokens in T5's order, without sentinels."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -4.0) for letter in LETTERS] + [(f"▁{word}", -3.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MODEL_MAX_LENGTH)


#: The tokenizers by the `model_type` of the models that use them.
TOKENIZERS = {
    "bert": bert_tokenizer,
    "distilbert": bert_tokenizer,
    "gpt2": gpt2_tokenizer,
    "bart": bart_tokenizer,
    "t5": t5_tokenizer,
}


def tiny_tokenizer(model_type: str) -> PreTrainedTokenizerBase:
    """The tiny tokenizer for models of a `model_type`."""
    return TOKENIZERS[model_type]()


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _byte_level_bpe(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: each word with the space before it grows letter by letter. Other bytes are left out."""
    words = [f"Ġ{word}" for word in WORDS]
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    return _numbered([*special, "Ġ", *LETTERS, *("".join(merge) for merge in merges)]), list(merges)
