"""Labels: their names in a config, and their numbers in a data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

#: Label of a position that is not scored, the convention of `torch.nn.CrossEntropyLoss` and of transformers.
IGNORE_INDEX = -100
#: Columns that Trainer's data collators take as labels.
LABEL_COLUMNS = ("labels", "label", "label_ids")
#: Column with the logits `(outputs,)` of a model that is not at hand, NaN where a row has none: the targets of the
#: edges from the frozen pre-trained teacher, in place of its predictions.
TARGETS = "pretrained_logits"


def own_labels(config: PreTrainedConfig) -> list[str] | None:
    """Return the names of the labels in the order of the outputs; `None` for the default names."""
    names = [config.id2label[index] for index in sorted(config.id2label)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def label_array(rows: Sequence[Any], first_row: int = 0) -> np.ndarray:
    """Turn labels, a number or a list of numbers for each row, into an array.

    Raises:
        ValueError: A row (the first one is `first_row`) has no label, a text, or another number of values.
    """
    labels = [label.tolist() if hasattr(label, "tolist") else label for label in rows]
    shape = np.shape(labels[0]) if labels and labels[0] is not None else ()
    for row, label in enumerate(labels, first_row):
        values = label if isinstance(label, (list, tuple)) else [label]
        if any(not isinstance(value, (int, float)) for value in values):
            raise ValueError(
                f"Label {label!r} of row {row} is no number. Encode labels as numbers (`Dataset.class_encode_column`)"
                f". Drop rows without a label, or give them the label {IGNORE_INDEX}."
            )
        if np.shape(label) != shape:
            raise ValueError(
                f"Label {label!r} of row {row} has the shape {np.shape(label)}, and the one of row 0 has {shape}. "
                "Give every row the same number of values."
            )
    return np.asarray(labels)
