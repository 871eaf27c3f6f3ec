"""Checks of rows and batches against the models: a size that does not fit is named with the model that it is of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, default_data_collator

from ..model_structure import base_model, config_of, embeddings_of, most_positions
from ..tasks.base import Task
from ..tasks.labels import LABEL_COLUMNS
from .data import parts

#: Number of rows of a data set that are looked at before the training.
_LOOKED_AT = 100


def misfit(argument: str, model: nn.Module, inputs: Mapping[str, Any], task: Task | None) -> str | None:
    """Describe the first input that does not fit a model; `None` if all fit, as far as that can be told.

    Args:
        argument: Name of the argument that gave the model.
        model: The model.
        inputs: The model's part of a batch.
        task: The task; `None` not to look at the labels.
    """
    model = base_model(model)
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if isinstance(ids, Tensor):
        most, length = most_positions(model), ids.shape[-1]
        if most is not None and length > most and "position_ids" not in inputs:
            return (
                f"`{argument}` has {most} positions (`max_position_embeddings`), and rows of the data have {length} "
                f"tokens. Cut the rows (`tokenizer(..., truncation=True, max_length={most})`), or give `{argument}` "
                "more positions."
            )
        embeddings = embeddings_of(model, "get_input_embeddings")
        kinds = {"input_ids": getattr(embeddings, "num_embeddings", None)}
        kinds["token_type_ids"] = getattr(config_of(model), "type_vocab_size", None)
        for name, size in kinds.items():
            values = inputs.get(name)
            readable = isinstance(values, Tensor) and values.device.type == "cpu" and values.numel()
            if size and readable and int(values.max()) >= size:
                return (
                    f"`{argument}` has embeddings for {size} values of `{name}`, and the data have the value "
                    f"{int(values.max())}. Tokenize the data with the tokenizer of both models."
                )
    if (
        task is not None
        and task.per_token is not None
        and isinstance(labels, Tensor)
        and isinstance(ids, Tensor)
        and task.label_names == ("labels",)
    ):
        if task.per_row:
            sizes = (len(ids), len(ids) * (task.num_labels or 1))
            wrong, wanted = labels.numel() not in sizes, "one label for each row"
        elif getattr(config_of(model), "is_encoder_decoder", False):
            wrong, wanted = labels.ndim != 2, "a list of labels for each row"
        else:
            wrong, wanted = labels.shape != ids.shape, "one label for each token"
        if wrong:
            return (
                f"`{argument}` is a {type(model).__name__} ({task.name}), which needs {wanted}, and the data have "
                f"labels of the shape {tuple(labels.shape)} for `input_ids` of the shape {tuple(ids.shape)}. Load "
                "both models with the `AutoModelFor...` class of the data (`AutoModelForSequenceClassification` for "
                "one label a row, `AutoModelForTokenClassification` for one a token), or change the labels."
            )
    return None


def misfit_of_images(argument: str, model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Describe images of another size than a config has; some models take them all the same."""
    images, config = inputs.get("pixel_values"), config_of(model)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if not isinstance(images, Tensor) or images.ndim < 4 or size is None:
        return None
    wanted = (channels or images.shape[-3], *(size if isinstance(size, (list, tuple)) else (size, size)))
    given = tuple(images.shape[-3:])
    if given == wanted:
        return None
    return (
        f"`{argument}` takes images of {wanted} (channels, height, width: `num_channels`, `image_size`), and the data "
        f"have images of {given}. Choose a model for such images, or let the image processor resize them for both."
    )


@contextmanager
def explained(runs: Mapping[str, tuple[nn.Module, Mapping[str, Any]]], task: Task) -> Iterator[None]:
    """Run models; if one raises an error because an input does not fit, raise one that names the model.

    Args:
        runs: Each model and its inputs, by the name of the argument that gave the model.
        task: The task.

    Raises:
        ValueError: An input does not fit a model; other errors of the models stay as they are.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        problem = None
        with suppress(Exception):  # the first error tells more than a second one
            problems = [misfit(name, *run, task) or misfit_of_images(name, *run) for name, run in runs.items()]
            problem = next(filter(None, problems), None)
        if problem is None:
            raise
        raise ValueError(problem) from error


def check_rows(task: Task, dataset: Any, argument: str, models: Mapping[str, nn.Module], collator: Any) -> None:
    """Refuse a list of dicts or a `datasets.Dataset` whose first rows do not fit a model.

    The longest of the first rows stands for them. Other data sets, and rows that a collator of the user changes, are
    checked when a model gets them; see `explained`.

    Args:
        task: The task.
        dataset: The data set, or a dict of data sets.
        argument: Name of the argument that gave it.
        models: The models, by the name of the argument that gave them.
        collator: The data collator; `None` for Trainer's.

    Raises:
        ValueError: A row does not fit; the message has both sizes.
    """
    if collator not in (None, default_data_collator) and type(collator) is not DataCollatorWithPadding:
        return
    for name, part in parts(dataset, argument):
        rows = _first_rows(part)
        if not rows:
            continue
        batch = _batch_of(max(rows, key=lambda row: len(row["input_ids"]) if "input_ids" in row else 0))
        for of_model, model in models.items():
            problem = misfit(of_model, model, batch, task)
            images = misfit_of_images(of_model, model, batch)
            if images is not None and not _runs_on(model, batch["pixel_values"].shape):
                problem = images
            if problem is not None:
                raise ValueError(f"`{name}`: {problem}")


def _first_rows(dataset: Any) -> Sequence[Mapping[str, Any]]:
    """Return the first rows of a data set that can be read without side effects; none of others."""
    if isinstance(dataset, (list, tuple)):
        return [row for row in dataset[:_LOOKED_AT] if isinstance(row, Mapping)]
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "select"):
        return []
    if dataset.format["type"] == "custom":  # a transform of the user, which may draw random numbers
        return []
    number = _LOOKED_AT if "input_ids" in dataset.column_names else 1  # of images, which have one size
    return list(dataset.with_format(None).select(range(min(number, len(dataset)))))


def _batch_of(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make a batch of one row, of the columns that are numbers."""
    batch = {}
    for name, value in row.items():
        with suppress(TypeError, ValueError, RuntimeError):
            batch[name] = torch.as_tensor(value)[None]
    label = next((name for name in LABEL_COLUMNS if name in batch), None)
    return batch if label is None else batch | {"labels": batch[label]}


def _runs_on(model: nn.Module, shape: Sequence[int]) -> bool:
    """Tell whether a model takes images of a shape, without computing anything."""
    model = base_model(model)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            type(model)(model.config).eval()(pixel_values=torch.empty(shape))
    except NotImplementedError:  # an operation that needs values
        return True
    except (RuntimeError, ValueError):
        return False
    except Exception:  # a class that is made in another way
        return True
    return True


@dataclass
class CheckedCollator:
    """A data collator whose errors name the remedy, and whose labels are checked before a device gets them.

    Attributes:
        collator: The data collator.
        data: The use of the data (`training`), for the messages.
        task: The task whose labels are checked; `None` if they have been checked.
    """

    collator: Any
    data: str
    task: Task | None = None

    def __call__(self, features: Sequence[Any]) -> Any:
        """Collate the examples.

        Raises:
            ValueError: The rows differ in length and the collator does not pad, or a label is no class.
        """
        try:
            batch = self.collator(features)
        except (RuntimeError, ValueError) as error:
            lengths = {len(row["input_ids"]) for row in features if isinstance(row, Mapping) and "input_ids" in row}
            if len(lengths) < 2 or hasattr(self.collator, "tokenizer"):
                raise
            raise ValueError(
                f"Rows of the {self.data} data have {min(lengths)} and {max(lengths)} `input_ids`, and the data "
                "collator does not pad them to one length. Pass the tokenizer as `processing_class`, or "
                "`data_collator=DataCollatorWithPadding(tokenizer)`."
            ) from error
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if self.task is not None and isinstance(labels, Tensor) and not labels.is_floating_point():
            try:
                self.task.check_labels(labels)
            except ValueError as error:
                raise ValueError(f"A batch of the {self.data} data: {error}") from error
        return batch
