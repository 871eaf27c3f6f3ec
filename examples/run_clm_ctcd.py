#!/usr/bin/env python
"""Co-train a teacher and a student to continue text: `run_clm.py` of Hugging Face for two models.

A 12-layer teacher, pre-trained, and a 6-layer student cut from it, on a data set of the Hub:

    python examples/run_clm_ctcd.py --model_name_or_path openai-community/gpt2 --student_num_hidden_layers 6 \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --block_size 512 \
        --do_train --do_eval --output_dir out

Both from scratch, on your own text; the student's config is the teacher's but for what is given:

    python examples/run_clm_ctcd.py --model_type gpt2 --tokenizer_name openai-community/gpt2 \
        --config_overrides n_layer=6,n_embd=256,n_head=4,n_positions=256 --student_config_overrides n_layer=4 \
        --train_file train.txt --do_train --do_eval --output_dir out

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose package `examples` this is in


from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments
from examples.common.language_models import LanguageModelArguments, check_model_arguments, language_models
from examples.common.models import allowed_length, load_tokenizer
from examples.common.run import (
    card_of,
    checkpoint_to_resume,
    evaluate,
    finish,
    load_raw_data,
    parse_arguments,
    set_up_logging,
    train,
)
from examples.data.text import (
    Blocks,
    TextArguments,
    best_tokens,
    collate_blocks,
    next_token_accuracy,
    perplexities,
    select_splits,
    tokenize,
)


@dataclass
class CausalTextArguments(TextArguments):
    """Which texts the models are trained and evaluated on."""

    block_size: int | None = field(
        default=None,
        metadata={"help": "Number of tokens of an example. Default: what tokenizer and models allow, at most 1024."},
    )
    keep_linebreaks: bool = field(
        default=True, metadata={"help": "Whether the lines of a .txt file keep the line break at their end."}
    )

    @property
    def reader_options(self) -> dict[str, dict[str, Any]]:
        """As in the base class."""
        return {"text": {"keep_linebreaks": self.keep_linebreaks}}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script, with the arguments of the command line or these."""
    model_args, data_args, training_args = parse_arguments(
        LanguageModelArguments, CausalTextArguments, CoDistillationTrainingArguments, argv=argv
    )
    check_model_arguments(model_args, training_args)
    set_up_logging(training_args)
    checkpoint = checkpoint_to_resume(training_args)

    tokenizer = load_tokenizer(model_args)
    raw = load_raw_data(model_args, data_args, streaming=data_args.streaming)
    splits = select_splits(raw, data_args, training_args)
    models = language_models(AutoModelForCausalLM, model_args, training_args, tokenizer)
    length = allowed_length("block_size", data_args.block_size, tokenizer, models)
    examples = tokenize(splits, Blocks(tokenizer, length, masked=False), data_args, training_args)

    trainer = CoDistillationTrainer(
        **models,
        args=training_args,
        data_collator=collate_blocks,
        train_dataset=examples.get("train"),
        eval_dataset=examples.get("validation"),
        processing_class=tokenizer,
        compute_metrics=next_token_accuracy,
        preprocess_logits_for_metrics=best_tokens,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    metrics = evaluate(trainer, more_metrics=perplexities) if training_args.do_eval else {}
    finish(trainer, metrics, card_of(data_args, "text-generation"))


if __name__ == "__main__":
    main()
