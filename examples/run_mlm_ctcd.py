#!/usr/bin/env python
"""Co-train a teacher and a student to fill in masked words: `run_mlm.py` of Hugging Face for two models.

A 12-layer teacher, pre-trained, and a 6-layer student cut from it, on a data set of the Hub:

    python examples/run_mlm_ctcd.py --model_name_or_path google-bert/bert-base-uncased --student_num_hidden_layers 6 \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --max_seq_length 128 \
        --do_train --do_eval --output_dir out

Both from scratch, on your own text; the student has the teacher's config, with the changes that are given:

    python examples/run_mlm_ctcd.py --model_type bert --tokenizer_name google-bert/bert-base-uncased \
        --config_overrides num_hidden_layers=6,hidden_size=384,num_attention_heads=12,intermediate_size=1536 \
        --student_config_overrides num_hidden_layers=4 --train_file train.txt --line_by_line \
        --do_train --do_eval --output_dir out

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds `examples` from any folder

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from examples.common.arguments import option
from examples.common.language_models import run_language_models
from examples.common.run import padding_multiple
from examples.data.text import Blocks, Lines, TextArguments, masked_accuracy


@dataclass
class MaskedTextArguments(TextArguments):
    """The texts to train and to evaluate on, and the masks."""

    max_seq_length: int | None = option(
        None, "Number of tokens of an example. Default: what tokenizer and models allow, at most 1024."
    )
    line_by_line: bool = option(False, "Take each text as an example, instead of blocks of joined texts.")
    pad_to_max_length: bool = option(
        False, "With `--line_by_line`: pad to `max_seq_length` instead of the longest text of the batch."
    )
    mlm_probability: float = option(0.15, "Share of the tokens that are masked.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"`--mlm_probability {self.mlm_probability}` is not valid: it must be above 0, at most 1."
            )


def prepare(
    tokenizer: PreTrainedTokenizerBase, data_args: MaskedTextArguments, training_args: TrainingArguments
) -> tuple[Callable[..., Any], DataCollatorForLanguageModeling]:
    """Return the function that turns texts into examples of a given `length`, and the collator that masks them.

    Raises:
        ValueError: The tokenizer has no mask token.
    """
    if tokenizer.mask_token is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no mask token, so its models cannot fill in words. Give "
            "another one, or train them to continue text with `run_clm_ctcd.py`."
        )
    ragged = data_args.line_by_line and not data_args.pad_to_max_length
    collator = DataCollatorForLanguageModeling(
        tokenizer,
        mlm_probability=data_args.mlm_probability,
        pad_to_multiple_of=padding_multiple(training_args) if ragged else None,
    )
    if data_args.line_by_line:
        return partial(Lines, tokenizer, pad=data_args.pad_to_max_length), collator
    return partial(Blocks, tokenizer, masked=True), collator


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script, with the arguments of the command line or of `argv`."""
    run_language_models(
        MaskedTextArguments, AutoModelForMaskedLM, "max_seq_length", prepare, masked_accuracy, "fill-mask", argv
    )


if __name__ == "__main__":
    main()
