"""Cross-fitting: soft targets for training rows, from teachers that have not seen these rows.

A teacher that has trained on a row predicts its label again. So one teacher is trained without each part of the data
and predicts it (Dao et al. 2021, arXiv 2104.09732). The predictions become a column of the data set.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .checks import check_output_dir
from .saving.atomic_folders import whole_file
from .tasks.labels import TARGETS

logger = logging.get_logger(__name__)

#: The files of a data set's folds, and of the predictions for a fold.
_FOLDS, _PREDICTIONS = "folds.json", "predictions.npy"


def cross_fit(
    make_trainer: Callable[[Any, str], Trainer],
    dataset: Any,
    folds: int = 5,
    *,
    output_dir: str | os.PathLike,
    seed: int = 0,
    groups: str | Sequence[Any] | None = None,
) -> Any:
    """Train a teacher without each fold of the data, let it predict the fold, and add the predictions as a column.

    With the column `pretrained_logits`, a training without `pretrained_teacher` takes the targets of its edges
    `..._from_pretrained` from it. It works for heads with one prediction a row.

    Call it again after a kill: finished folds are read from `output_dir`, and the one that was cut goes on at its last
    checkpoint.

    Args:
        make_trainer: Makes the trainer of a fold, any `Trainer`, from its training rows and its `output_dir`. Give it
            a new model each time.
        dataset: A `datasets.Dataset`, as the trainers take it.
        folds: Number of folds, and so of teachers. Each trains on all rows but those of one fold.
        output_dir: Folder of all folds.
        seed: Seed of the division into folds.
        groups: A column, or a value for each row. Rows of one value are in one fold, so that no teacher sees a copy of
            a row that it predicts; give the column of the texts if some occur twice.

    Returns:
        The data set with the column, `(outputs,)` for each row.

    Raises:
        ValueError: The numbers do not fit each other, the data set has the column already, `output_dir` holds folds
            of other rows, or a trainer has another output folder or predicts no logits for each row.

    Example:
        ```python
        def make_trainer(rows, output_dir):
            args = TrainingArguments(output_dir, num_train_epochs=3)
            return Trainer(new_teacher(), args, train_dataset=rows, processing_class=tokenizer)

        train_dataset = cross_fit(make_trainer, train_dataset, output_dir="teachers")
        args = CoDistillationTrainingArguments("out", distillation_mode="community")
        CoDistillationTrainer(teacher, args, train_dataset=train_dataset, student_model=student).train()
        ```
    """
    if not all(hasattr(dataset, name) for name in ("select", "add_column", "column_names")):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__}, and `cross_fit` divides a `datasets.Dataset`. Make one "
            "(`Dataset.from_list(rows)`)."
        )
    if TARGETS in dataset.column_names:
        raise ValueError(f"`dataset` has a column {TARGETS!r} already. Remove it (`remove_columns`), or use it.")
    fold_of_row = _division(dataset, folds, seed, groups)
    root = Path(output_dir)
    _check_same_folds(root, dataset, fold_of_row)
    targets: np.ndarray | None = None
    for fold in range(folds):
        rows = np.flatnonzero(fold_of_row == fold)
        file = root / f"fold-{fold + 1}" / _PREDICTIONS
        if not file.exists():
            logger.info("Fold %d of %d: training without %d rows.", fold + 1, folds, len(rows))
            trainer = make_trainer(dataset.select(np.flatnonzero(fold_of_row != fold)), str(file.parent))
            predictions = _predictions_for(trainer, dataset.select(rows), file.parent)
            if trainer.is_world_process_zero():
                with whole_file(file) as written:
                    np.save(written, predictions)
            trainer.accelerator.wait_for_everyone()
        predictions = np.load(file)
        targets = np.empty((len(dataset), predictions.shape[1]), np.float32) if targets is None else targets
        targets[rows] = predictions
    return dataset.add_column(TARGETS, list(targets))


def _division(dataset: Any, folds: int, seed: int, groups: str | Sequence[Any] | None) -> np.ndarray:
    """Return the fold of each row `(rows,)`; the folds have the same number of groups, give or take one."""
    if isinstance(groups, str):
        if groups not in dataset.column_names:
            raise ValueError(f"`groups={groups!r}` is no column of `dataset`, which has {dataset.column_names}.")
        groups = dataset[groups]
    if groups is not None and len(groups) != len(dataset):
        raise ValueError(
            f"`groups` has {len(groups)} values, and `dataset` has {len(dataset)} rows. Give one for each."
        )
    names: dict[Any, int] = {}
    group_of_row = [
        names.setdefault(group, len(names)) for group in (range(len(dataset)) if groups is None else groups)
    ]
    if not 2 <= folds <= len(names):
        raise ValueError(
            f"`folds={folds}` is not valid for {len(names)} rows or groups: give a number from 2 to {len(names)}."
        )
    return (np.random.default_rng(seed).permutation(len(names)) % folds)[group_of_row]


def _check_same_folds(root: Path, dataset: Any, fold_of_row: np.ndarray) -> None:
    """Refuse a folder with the folds of other rows, whose predictions would be taken for those of these rows."""
    content = hashlib.sha256(fold_of_row.tobytes())
    for batch in dataset.with_format("arrow").iter(1000):
        content.update(repr(batch.to_pydict()).encode())
    folds = {"rows": len(dataset), "content": content.hexdigest()}
    file = root / _FOLDS
    if not file.exists():
        root.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(folds), encoding="utf-8")
    elif json.loads(file.read_text(encoding="utf-8")) != folds:
        raise ValueError(
            f"`output_dir={str(root)!r}` holds the folds of another data set, or another `folds`, `seed` or `groups`. "
            "Give another folder, or delete this one."
        )


def _predictions_for(trainer: Trainer, rows: Any, folder: Path) -> np.ndarray:
    """Train a teacher, or the rest of it after a kill, and return its logits `(rows, outputs)` for other rows."""
    check_output_dir(trainer.args.output_dir, folder, f"the fold in {folder.name}")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    logits = trainer.predict(rows).predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float32)
    logits = logits[:, None] if logits.ndim == 1 else logits
    if logits.ndim != 2 or len(logits) != len(rows) or not np.isfinite(logits).all():
        raise ValueError(
            f"The trainer in {str(folder)!r} predicts {logits.shape} for {len(rows)} rows, and targets are the finite "
            "logits of each row, (rows, outputs). `cross_fit` is for heads with one prediction a row."
        )
    return logits
