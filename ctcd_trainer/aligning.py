"""Start a cut student on unlabelled rows: it learns the layers of its teacher before any label is seen."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .arguments import CoDistillationTrainingArguments
from .checks import argument_of
from .graph import STUDENT
from .model_structure import restored
from .tasks import Task, find_task, named_task
from .tasks.labels import LABEL_COLUMNS
from .trainer import CoDistillationTrainer

logger = logging.get_logger(__name__)


def align_student(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    dataset: Any,
    *,
    feature_loss: str = "hidden",
    feature_layers: str | None = None,
    max_steps: int = -1,
    num_train_epochs: float = 1.0,
    learning_rate: float = 2e-4,
    per_device_train_batch_size: int = 32,
    data_collator: Callable[..., Any] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    task: Task | str | None = None,
    seed: int = 42,
    output_dir: str | os.PathLike | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Train a student, in place, to have the layers of its teacher, on rows whose labels are not read.

    Args:
        teacher: The teacher. Its weights, `requires_grad` and mode stay as they are.
        student: The student, such as one of `create_student`.
        dataset: Rows of the form that the task has (pairs of texts as pairs), tokenized. Labels are left out, except
            those of language models, from which decoder inputs are made.
        feature_loss: How layers are compared; see `CoDistillationTrainingArguments`.
        feature_layers: The layers that are compared; see `CoDistillationTrainingArguments`.
        max_steps: Number of optimizer steps; by default `num_train_epochs` counts.
        num_train_epochs: Number of epochs.
        learning_rate: Learning rate of the student.
        per_device_train_batch_size: Rows of a batch on each process.
        data_collator: The data collator, as Trainer takes it.
        processing_class: The tokenizer, to pad with.
        task: The task, or its name, if the class of the models does not tell it.
        seed: The seed. It is set, so that the state of the random generators is another one afterwards.
        output_dir: A folder for checkpoints. If it has one, the training goes on from there. By default none is kept.
        **arguments: Other arguments of `CoDistillationTrainingArguments`.

    Returns:
        The student.

    Raises:
        ValueError: The models have no layers that can be compared, or arguments contradict each other.

    Example:
        ```python
        student = create_student(teacher, num_hidden_layers=3)
        align_student(teacher, student, unlabelled_rows, max_steps=500, processing_class=tokenizer)
        ```
    """
    found = find_task(teacher) if task is None else named_task(task, teacher.config)
    if not found.language_model:
        dataset = _without(dataset, {*LABEL_COLUMNS, *found.label_names})
    saving = {"save_strategy": "no"} if output_dir is None else {"save_steps": 0.2, "save_total_limit": 1}
    with restored([teacher]), ExitStack() as afterwards:
        folder = output_dir or afterwards.enter_context(tempfile.TemporaryDirectory())
        args = CoDistillationTrainingArguments(
            output_dir=str(folder),
            distillation_mode="kd",
            student_hard_weight=0.0,
            student_from_teacher_weight=0.0,
            student_feature_weight=1.0,
            feature_loss=feature_loss,
            feature_layers=feature_layers,
            max_steps=max_steps,
            num_train_epochs=num_train_epochs,
            learning_rate=learning_rate,
            student_learning_rate=learning_rate,
            per_device_train_batch_size=per_device_train_batch_size,
            seed=seed,
            **{"report_to": "none", "logging_steps": 50, "logging_first_step": True, **saving, **arguments},
        )
        trainer = CoDistillationTrainer(
            teacher,
            args,
            data_collator,
            dataset,
            processing_class=processing_class,
            student_model=student,
            task=task,
        )
        try:
            trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
        finally:
            for links in trainer.pair.feature_links.values():
                links.remove()
        losses = [log[name] for log in trainer.state.log_history if (name := f"{STUDENT}_feature_loss") in log]
        if losses and trainer.is_world_process_zero():
            logger.info(
                "The layers of `%s` were trained to be those of `%s` (%s): %d steps, feature loss %.4f to %.4f.",
                *(argument_of(STUDENT), argument_of(trainer.pair.primary), feature_loss, trainer.state.global_step),
                *(losses[0], losses[-1]),
            )
    return student


def _without(dataset: Any, names: set[str]) -> Any:
    """Return a `datasets.Dataset` or a list of dicts without some columns; any other data set as it is."""
    if hasattr(dataset, "remove_columns"):
        return dataset.remove_columns([name for name in dataset.column_names or () if name in names])
    if isinstance(dataset, (list, tuple)):
        return [{name: value for name, value in row.items() if name not in names} for row in dataset]
    return dataset
