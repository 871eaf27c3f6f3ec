#!/usr/bin/env python
"""Co-train a teacher and a student to fill in masked words: `run_mlm.py` of Hugging Face for two models.

A 12-layer teacher, pre-trained, and a 6-layer student cut from it, on a data set of the Hub:

    python examples/run_mlm_ctcd.py --model_name_or_path google-bert/bert-base-uncased --student_num_hidden_layers 6 \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --max_seq_length 128 \
        --do_train --do_eval --output_dir out

Both from scratch, on your own text; the student's config is the teacher's but for what is given:

    python examples/run_mlm_ctcd.py --model_type bert --tokenizer_name google-bert/bert-base-uncased \
        --config_overrides num_hidden_layers=6,hidden_size=384,num_attention_heads=12,intermediate_size=1536 \
        --student_config_overrides num_hidden_layers=4 --train_file train.txt --line_by_line \
        --do_train --do_eval --output_dir out

The teacher is saved in the output folder and the student in its folder `student`; both load without this project.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose package `examples` this is in


from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

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
    Lines,
    TextArguments,
    best_tokens,
    masked_accuracy,
    perplexities,
    select_splits,
    tokenize,
)


@dataclass
class MaskedTextArguments(TextArguments):
    """Which texts the models are trained and evaluated on, and what is masked of them."""

    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Number of tokens of an example. Default: what tokenizer and models allow, at most 1024."},
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "Whether each text is an example, instead of blocks of joined texts."}
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "With `--line_by_line`: pad to `max_seq_length` instead of the longest text of the batch."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"`--mlm_probability {self.mlm_probability}` is not valid: it must be above 0, at most 1."
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script, with the arguments of the command line or these."""
    model_args, data_args, training_args = parse_arguments(
        LanguageModelArguments, MaskedTextArguments, CoDistillationTrainingArguments, argv=argv
    )
    check_model_arguments(model_args, training_args)
    set_up_logging(training_args)
    checkpoint = checkpoint_to_resume(training_args)

    tokenizer = load_tokenizer(model_args)
    if tokenizer.mask_token is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no mask token, so its models cannot fill in words. Give "
            "another one, or train them to continue text with `run_clm_ctcd.py`."
        )
    ragged = data_args.line_by_line and not data_args.pad_to_max_length
    collator = DataCollatorForLanguageModeling(
        tokenizer,
        mlm_probability=data_args.mlm_probability,
        # sizes that tensor cores like
        pad_to_multiple_of=8 if ragged and (training_args.fp16 or training_args.bf16) else None,
    )
    raw = load_raw_data(model_args, data_args, streaming=data_args.streaming)
    splits = select_splits(raw, data_args, training_args)
    models = language_models(AutoModelForMaskedLM, model_args, training_args, tokenizer)
    length = allowed_length("max_seq_length", data_args.max_seq_length, tokenizer, models)
    if data_args.line_by_line:
        preprocess = Lines(tokenizer, length, data_args.pad_to_max_length)
    else:
        preprocess = Blocks(tokenizer, length, masked=True)
    examples = tokenize(splits, preprocess, data_args, training_args)

    trainer = CoDistillationTrainer(
        **models,
        args=training_args,
        data_collator=collator,
        train_dataset=examples.get("train"),
        eval_dataset=examples.get("validation"),
        processing_class=tokenizer,
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=best_tokens,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    metrics = evaluate(trainer, more_metrics=perplexities) if training_args.do_eval else {}
    finish(trainer, metrics, card_of(data_args, "fill-mask"))


if __name__ == "__main__":
    main()
