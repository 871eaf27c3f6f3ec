"""`diagnose`: run two models on held-out rows."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..arguments import CoDistillationTrainingArguments
from ..model_structure import restored
from ..tasks.base import Task
from ..trainer import CoDistillationTrainer
from .diagnosis import Diagnosis
from .measuring import Measurements


def diagnose(
    teacher: PreTrainedModel | str | os.PathLike,
    student: PreTrainedModel | str | os.PathLike,
    dataset: Any,
    *,
    data_collator: Callable | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    batch_size: int = 64,
    task: Task | str | None = None,
    weight: float = 1.0,
    train_dataset: Any = None,
) -> Diagnosis:
    """Measure what two models, as they are now, can learn from each other: one forward pass of each over the rows.

    Nothing is trained, and the models are not changed (but are moved to the device on which Trainer would train).

    Args:
        teacher: The larger model, or its name or path.
        student: The smaller model, or its name or path.
        dataset: Rows with labels that no model was trained on, as `Trainer` takes them for `eval_dataset`.
        data_collator: Makes batches of rows, as `Trainer` takes it.
        processing_class: The tokenizer or processor of both models, as `Trainer` takes it.
        batch_size: Number of rows that are run together.
        task: The task, or its name, if the class of the models does not tell it.
        weight: Weight of the soft losses beside hard losses of weight 1, for the share of the label in the targets.
        train_dataset: Rows on which the models were trained. With them the diagnosis tells what they have memorised.

    Raises:
        ValueError: The models or the data do not fit together (messages call the data `eval_dataset`), no row has a
            label, there are fewer than 10 rows, or several processes run.
        FloatingPointError: A model predicts NaN.

    Example:
        ```python
        print(diagnose(teacher, student, dev_dataset, processing_class=tokenizer))
        ```
    """
    if not weight > 0:
        raise ValueError(f"`weight={weight}` is not valid: give the weight of the soft losses, a number above 0.")
    models = [model for model in (teacher, student) if isinstance(model, nn.Module)]
    with restored(models), tempfile.TemporaryDirectory() as folder:
        args = CoDistillationTrainingArguments(
            folder,
            distillation_mode="kd",  # its teacher may be frozen or quantised
            per_device_eval_batch_size=batch_size,
            dataloader_pin_memory=False,
            report_to="none",
        )
        trainer = CoDistillationTrainer(
            teacher,
            args,
            data_collator,
            train_dataset,
            dataset,
            processing_class,
            student_model=student,
            task=task,
        )
        if trainer.accelerator.num_processes > 1:
            raise ValueError(
                f"`diagnose` runs in one process, and this is one of {trainer.accelerator.num_processes}. Start it "
                "without a launcher."
            )
        pair = trainer.pair.eval()
        found = [
            Measurements(
                lambda name, batch: pair(learner=name, **batch), pair.task, trainer.get_eval_dataloader(rows), brief
            )
            for rows, brief in ((dataset, False), (train_dataset, True))
            if rows is not None
        ]
    return Diagnosis.of(pair.task.name, weight, *found)
