"""Aligning the student with its teacher before the training: `--align_steps N`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctcd_trainer import CoDistillationTrainingArguments, align_student
from ctcd_trainer.training.warm_start import FOLDER

from .arguments import ModelArguments, logger

#: The arguments of the training that hold for the aligning as well.
_SAME = (
    *("seed", "use_cpu", "bf16", "fp16", "gradient_checkpointing", "gradient_accumulation_steps", "disable_tqdm"),
    *("per_device_train_batch_size", "max_grad_norm", "optim", "weight_decay", "lr_scheduler_type", "log_level"),
    *("dataloader_num_workers", "ddp_find_unused_parameters", "feature_loss", "feature_layers"),
)


def aligned(
    models: Mapping[str, Any],
    rows: Any,
    model_args: ModelArguments,
    training_args: CoDistillationTrainingArguments,
    checkpoint: str | bool | None,
    data_collator: Callable | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Return the models with an aligned student, or with a function that cuts and aligns it if it is a function.

    Args:
        models: The models, by the argument of `CoDistillationTrainer` that takes them.
        rows: The training rows, or those of `--align_file`; their labels are not read.
        model_args: The arguments.
        training_args: The arguments of the training.
        checkpoint: The checkpoint from which the training goes on. The student in it is aligned already.
        data_collator: The data collator.
        processing_class: The tokenizer.
    """
    if not model_args.align_steps or not training_args.do_train or "student_model" not in models:
        return dict(models)
    in_warm_start = isinstance(checkpoint, str) and FOLDER in Path(checkpoint).parts[-2:]
    if isinstance(checkpoint, str) and not in_warm_start and model_args.generations == 1:
        logger.info("`--align_steps %d`: the student of %s is aligned already.", model_args.align_steps, checkpoint)
        return dict(models)
    student = models["student_model"]

    def make(teacher: PreTrainedModel) -> PreTrainedModel:
        made = student if isinstance(student, nn.Module) else student(teacher)
        logger.info("Aligning the student with the teacher for %d steps.", model_args.align_steps)
        same = {name: getattr(training_args, name) for name in _SAME}
        return align_student(
            *(teacher, made, rows),
            max_steps=model_args.align_steps,
            data_collator=data_collator,
            processing_class=processing_class,
            **same,
        )

    return {**models, "student_model": make(models["model"]) if isinstance(student, nn.Module) else make}
