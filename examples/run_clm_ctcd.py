#!/usr/bin/env python
"""Co-train a teacher and a student to continue text: `run_clm.py` of Hugging Face for two models.

A 12-layer teacher, pre-trained, and a 6-layer student cut from it, on a data set of the Hub:

    python examples/run_clm_ctcd.py --model_name_or_path openai-community/gpt2 --student_num_hidden_layers 6 \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --block_size 512 \
        --do_train --do_eval --output_dir out

Both from scratch, on your own text; the student has the teacher's config, with the changes that are given:

    python examples/run_clm_ctcd.py --model_type gpt2 --tokenizer_name openai-community/gpt2 \
        --config_overrides n_layer=6,n_embd=256,n_head=4,n_positions=256 --student_config_overrides n_layer=4 \
        --train_file train.txt --do_train --do_eval --output_dir out

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds `examples` from any folder

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainingArguments

from examples.common.arguments import option
from examples.common.language_models import run_language_models
from examples.data.text import Blocks, TextArguments, collate_blocks, next_token_accuracy


@dataclass
class CausalTextArguments(TextArguments):
    """The texts to train and to evaluate on."""

    block_size: int | None = option(
        None, "Number of tokens of an example. Default: what tokenizer and models allow, at most 1024."
    )
    keep_linebreaks: bool = option(True, "Keep the line break at the end of each line of a .txt file.")

    @property
    def reader_options(self) -> dict[str, dict[str, Any]]:
        """As in the base class."""
        return {"text": {"keep_linebreaks": self.keep_linebreaks}}


def prepare(
    tokenizer: PreTrainedTokenizerBase, data_args: CausalTextArguments, training_args: TrainingArguments
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the function that turns texts into examples of a given `length`, and the data collator."""
    return partial(Blocks, tokenizer, masked=False), collate_blocks


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script, with the arguments of the command line or of `argv`."""
    run_language_models(
        CausalTextArguments, AutoModelForCausalLM, "block_size", prepare, next_token_accuracy, "text-generation", argv
    )


if __name__ == "__main__":
    main()
