"""Checks of the data: examples, labels, inputs of a second tokenizer, and augmentations."""

from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch import nn
from transformers.utils import logging

from ..arguments import EMBEDDINGS, DistillationArguments
from ..edges import GATES, held_out_edges
from ..graph import LEARNERS
from ..model_structure import base_model, forward_parameters, main_input_of
from ..tasks.base import Task
from ..tasks.labelled import SequenceClassification
from ..tasks.labels import LABEL_COLUMNS, TARGETS
from ..tasks.two_tokenizers import prefix_of

logger = logging.get_logger(__name__)


def check_dataset(dataset: Any, argument: str) -> None:
    """Refuse a data set, or one of a dict of data sets, without examples."""
    for name, part in parts(dataset, argument):
        if isinstance(part, Sized) and len(part) == 0:
            raise ValueError(f"`{name}` is empty (0 examples). Check the file, the split or the filter it comes from.")


def check_labels(
    task: Task,
    dataset: Any,
    argument: str,
    learning: Collection[str] = (),
    taught: Collection[str] = (),
    default_collator: bool = False,
) -> None:
    """Refuse labels of a `datasets.Dataset` or a list of dicts that do not fit the task.

    Other data sets (iterable, or computed on the fly) would have to be read whole, so they are not checked.

    Args:
        task: The task.
        dataset: The data set, or a dict of data sets.
        argument: Name of the argument that gave it.
        learning: The models that learn from others, and so from rows without a label too.
        taught: The models that learn from labels (`..._hard_weight`).
        default_collator: Whether `default_data_collator` makes the batches: it turns lists in the column `label` into
            floats.

    Raises:
        ValueError: A label does not fit the task; or a row has none and no model learns from another one; or no row
            has one and a model learns from labels. The message has the row and the value.
    """
    for name, part in parts(dataset, argument):
        labels = _labels_of(part, task, default_collator)
        if labels is None:
            continue
        try:
            task.check_labels(labels)
            unlabelled = np.flatnonzero(task.unlabelled_rows(labels)) if not task.language_model else ()
            if len(unlabelled) == len(labels) and taught and name == "train_dataset":
                raise ValueError(
                    f"No row has a label (row 0: {labels[0]!r}), and the {' and the '.join(taught)} would learn from "
                    f"labels. Correct the labels, or train on soft losses only: "
                    f"{', '.join(f'`{learner}_hard_weight=0`' for learner in taught)}."
                )
            if len(unlabelled) and task.per_row:
                _check_unlabelled(labels, unlabelled, name, learning if name == "train_dataset" else None)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from error


def check_held_out(task: Task, datasets: Mapping[str, Any], arguments: DistillationArguments) -> None:
    """Refuse weights that follow from held-out labels where no evaluation row has a label."""
    names = [edge.weight_name for edge in held_out_edges(arguments.graph)]
    known = [_labels_of(part, task) for _, part in parts(datasets.get("eval_dataset"), "eval_dataset")]
    if names and all(labels is not None and task.unlabelled_rows(labels).all() for labels in known):
        raise ValueError(
            f"No row of `eval_dataset` has a label, and the weights {names} follow from held-out labels. Give rows "
            "their labels, or set these weights to numbers, without the schedule 'burn-in'."
        )


def _check_unlabelled(
    labels: Sequence[Any], unlabelled: Sequence[int], argument: str, learning: Collection[str] | None
) -> None:
    """Report rows without a label; refuse them in the training data if nothing learns from them (`learning`)."""
    label = labels[unlabelled[0]]
    if learning is not None and not learning:
        raise ValueError(
            f"Row {unlabelled[0]} and {len(unlabelled) - 1} more have no label ({label!r}), and no model learns from "
            "another one in this mode, or on labelled rows alone. Drop these rows, choose a mode with soft losses "
            "(`distillation_mode='ctcd'`), or set `edges={'student->teacher': {'rows': 'all'}}`."
        )
    logger.warning(
        "%d of %d rows of `%s` have no label (%r): only the soft losses use them%s.",
        *(len(unlabelled), len(labels), argument, label),
        f", which train the {' and the '.join(learning)}" if learning else "",
    )


def may_have_targets(dataset: Any) -> bool:
    """Tell whether a data set has a column of targets, or its columns are unknown."""
    columns = _columns_of(dataset)
    return dataset is not None and (not columns or TARGETS in columns)


def check_targets(task: Task, dataset: Any, argument: str, augmentation: Any = None) -> None:
    """Refuse targets in a column that the soft losses cannot use; they take the place of a frozen teacher.

    Raises:
        ValueError: The task has no prediction for a whole row, the augmentation mixes rows, or a target is not the
            logits of the row, or NaN for each of them. The message has the row.
    """
    remedy = f"Pass the model as `pretrained_teacher`, and the data without the column {TARGETS!r}."
    if not task.per_row:
        raise ValueError(
            f"`pretrained_teacher` is None, and the logits of every token in a column {TARGETS!r} would be too large "
            f"for {task.name}: the column is for tasks with one prediction a row. {remedy}"
        )
    if getattr(augmentation, "mixes_rows", False):
        raise ValueError(
            f"`augmentation` ({type(augmentation).__name__}) mixes rows inside of the models, and the targets in the "
            f"column {TARGETS!r} are of plain rows. {remedy}"
        )
    rows = _values_of(dataset, TARGETS)
    outputs, missing = task.num_labels if isinstance(task, SequenceClassification) else 0, 0
    for row, values in enumerate(rows if rows is not None else ()):
        try:
            target = np.asarray(values, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError):
            target = np.empty(0)
        missing += np.isnan(target).all()
        if len(target) != (outputs or max(len(target), 1)) or not (np.isfinite(target) | np.isnan(target).all()).all():
            raise ValueError(
                f"`{argument}`: the target {values!r} of row {row} ({TARGETS!r}) must be {outputs or 'finite'} "
                "logits, for all outputs of the models, or NaN for each of them if the row has no target."
            )
    if rows is not None and missing == len(rows):
        raise ValueError(f"`{argument}`: no row has a target ({TARGETS!r} is NaN everywhere). {remedy}")


def check_own_inputs(
    learner: str, model: nn.Module, task: Task, datasets: Mapping[str, Any], share: str | None = None
) -> None:
    """Refuse a second tokenizer where models share parts, tokens are compared, or the data have no inputs of it."""
    named = f"`{learner}_processing_class`"
    if share is not None:
        raise ValueError(
            f"`share={share!r}` and {named} are both given: models of two tokenizers have different inputs, so that "
            "no output of a shared part is the same. Leave out one of them."
        )
    if not task.per_row:
        raise ValueError(
            f"{named} is given, and {task.name} compares the predictions for each token: with two tokenizers these "
            f"are not the same tokens. Choose a {learner} of the teacher's tokenizer."
        )
    prefix = prefix_of(learner)
    wanted = {f"{prefix}{name}" for name in forward_parameters(model)}
    for argument, dataset in datasets.items():
        for name, part in parts(dataset, argument):
            columns = _columns_of(part)
            if columns and not wanted & set(columns):
                raise ValueError(
                    f"{named} is given, and `{name}` has no inputs of the {learner}, only {columns}. Add the output "
                    f"of its tokenizer, with {prefix!r} before each name."
                )


def check_augmentation(
    augmentation: Any,
    views: str,
    task: Task,
    teacher: nn.Module,
    arguments: DistillationArguments,
    two_tokenizers: bool,
) -> None:
    """Refuse an augmentation that does not fit the task, the models or the other arguments.

    Augmentations that change tokens have the attribute `changes_tokens`, those that mix rows `mixes_rows`.
    """
    valid = ("both", *LEARNERS)
    if views not in valid:
        raise ValueError(f"`augmented={views!r}` is unknown. Valid values: {', '.join(valid)}.")
    if augmentation is None and views != "both":
        raise ValueError(f"`augmented={views!r}` has no effect without `augmentation` (None). Give both, or none.")
    if augmentation is not None and two_tokenizers:
        raise ValueError(
            "`augmentation` and `student_processing_class` are both given, and it would change the tokens of one "
            "tokenizer as those of the other. Change the texts instead, before they are tokenized."
        )
    if views != "both" and arguments.share not in (None, EMBEDDINGS):
        raise ValueError(
            f"`augmented={views!r}` and `share={arguments.share!r}`: the shared layers are run once for both models, "
            f"which would see different inputs. Use `augmented='both'`, or `share={EMBEDDINGS!r}`."
        )
    name, main_input = type(augmentation).__name__, main_input_of(teacher)
    if getattr(augmentation, "changes_tokens", False) and main_input != "input_ids":
        raise ValueError(
            f"`{name}` changes tokens, and a {type(base_model(teacher)).__name__} takes `{main_input}`. Use `Mixup`, "
            "or a function that changes these."
        )
    if getattr(augmentation, "mixes_rows", False):
        gated = [edge for edge in arguments.graph.edges if GATES[edge.gate].needs_labels]
        if gated:
            raise ValueError(
                f"`{name}` and the gate {gated[0].gate!r} of {gated[0].name}: the label of a mixed row is that of one "
                "of two rows, so that no prediction is right or wrong. Leave out one of them."
            )
        _check_mixing(name, views, task, arguments.pretrained_cache_dir)


def _check_mixing(name: str, views: str, task: Task, cache: str | None) -> None:
    if cache is not None:
        raise ValueError(
            f"`{name}` and `pretrained_cache_dir={cache!r}`: rows are mixed inside of the models, so that the cache "
            "would take mixed rows for plain ones. Leave out one of them."
        )
    if views != "both" or not task.per_row:
        raise ValueError(
            f"`{name}` with `augmented={views!r}` for {task.name}: it mixes whole rows with their labels, for both "
            "models. Use it with `augmented='both'` and a task of whole rows, or mask tokens instead."
        )


def parts(dataset: Any, argument: str) -> list[tuple[str, Any]]:
    """List the data sets of a dict, or the only one, with their names for a message."""
    if not isinstance(dataset, Mapping):
        return [(argument, dataset)]
    return [pair for name, part in dataset.items() for pair in parts(part, f"{argument}[{name!r}]")]


def _columns_of(dataset: Any) -> list[str]:
    """List the columns of a data set; none if they are unknown."""
    if isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], Mapping):
        return list(dataset[0])
    return getattr(dataset, "column_names", None) or []


def _labels_of(dataset: Any, task: Task, default_collator: bool = False) -> Sequence[Any] | None:
    """Return the labels of a data set; `None` if it has none, or would have to be read for them.

    Trainer's data collators call a column `label` or `label_ids` by the name `labels`.
    """
    names = LABEL_COLUMNS if "labels" in task.label_names else task.label_names
    column = next((name for name in names if name in _columns_of(dataset)), None)
    labels = _values_of(dataset, column)
    if labels is None:
        return None
    if default_collator and column == "label" and len(labels) and isinstance(labels[0], list):
        return [
            [float(v) if isinstance(v, int) else v for v in row] if isinstance(row, list) else row for row in labels
        ]
    return labels


def _values_of(dataset: Any, column: str | None) -> Sequence[Any] | None:
    """Return a column of a data set; `None` if it has none, or would have to be read for it."""
    if column not in _columns_of(dataset) or not isinstance(dataset, Sized):
        return None
    stored = isinstance(dataset, (list, tuple))
    return [row[column] for row in dataset] if stored else dataset.with_format(None)[column]
