"""Changes to the batches of a training, for all models alike or for one of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..graph import LEARNERS
from ..model_structure import base_model
from ..tasks.base import Task
from ..tasks.labels import IGNORE_INDEX, LABEL_COLUMNS
from ..tasks.two_tokenizers import prefix_of

#: Takes a batch and returns the changed one, with the same rows. It may be called several times a step. With the
#: attribute `changes_tokens`, it is refused for models of images and audio; with `mixes_rows`, for tasks of tokens.
Augmentation = Callable[[dict[str, Any]], dict[str, Any]]
#: The models that get the changed batch: `"both"`, or the name of a learner.
Views = str


def augmented_batch(
    inputs: Mapping[str, Any], augmentation: Augmentation, views: Views, task: Task | None = None
) -> dict[str, Any]:
    """A batch in which all models, or one of them, get the changed inputs.

    Args:
        inputs: The batch.
        augmentation: Changes it.
        views: The models that get the changed batch. The labels are the changed ones if all do, else the batch's own.
        task: Its `label_names` are the labels, and with `per_token` two views must have the same tokens.

    Raises:
        ValueError: They have other lengths.
    """
    changed = augmentation(dict(inputs))
    if views == "both":
        return changed
    labels = (Task if task is None else task).label_names
    clean = {name: value for name, value in inputs.items() if name not in labels}
    changed = {name: value for name, value in changed.items() if name in clean}
    for name in changed if task is not None and task.per_token else ():
        own, other = (getattr(each[name], "shape", None) for each in (clean, changed))
        if own != other:
            raise ValueError(
                f"`augmented={views!r}`: `augmentation` makes `{name}` {tuple(other)} of {tuple(own)}, and the models "
                "are compared token by token. Keep the length, or use `augmented='both'` and change the labels, too."
            )
    batch = dict(inputs)
    for learner in LEARNERS:
        view = changed if learner == views else clean
        batch |= {f"{prefix_of(learner)}{name}": value for name, value in view.items()}
    return batch


def recounted(
    number: Tensor | int | None,
    augmentation: Augmentation,
    task: Task,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Tensor | int | None:
    """The count of scored items that a changed batch is divided by.

    Trainer counts before the batches are changed. Where an augmentation changes labels, the batch keeps the weight
    that it had: its losses are means over what is scored now. `Mixup` keeps the count: it draws each label from two
    rows, so with unlabelled rows a batch has more or fewer labels than before, but as many on average.

    Args:
        number: Number of scored items in the accumulated batch; `(2,)` with the number of compared rows.
        augmentation: The augmentation.
        task: Counts.
        before: The batch.
        after: The changed batch.
    """
    same = all(before.get(name) is after.get(name) for name in task.label_names)
    if number is None or same or getattr(augmentation, "mixes_rows", False):
        return number
    old, new = (task.counted(batch).ne(IGNORE_INDEX).sum() for batch in (before, after))
    ratio = new / old.clamp(min=1)
    number = torch.as_tensor(number, device=ratio.device)
    return number * (ratio if number.ndim == 0 else torch.stack([ratio, torch.ones_like(ratio)]))


def _maskable(inputs: Mapping[str, Any], special: frozenset[int]) -> Tensor:
    """Which tokens of a text are neither padding nor special, bool `(rows, length)`."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return real & ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device, dtype=ids.dtype))


@dataclass
class TokenMasking:
    """Puts the mask token in the place of tokens that are drawn at random, as in masked language modelling.

    Args:
        tokenizer: The tokenizer, with a mask token.
        rate: Probability of each token that is neither padding nor special.

    Raises:
        ValueError: The tokenizer has no mask token, or the rate is none.
    """

    changes_tokens: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    rate: float = 0.15

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                f"A {type(self.tokenizer).__name__} has no mask token, so tokens cannot be masked. Use `WordDropout`, "
                "which leaves them out."
            )
        self._special = frozenset(self.tokenizer.all_special_ids)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with some tokens masked."""
        maskable = _maskable(inputs, self._special)
        drawn = maskable & (torch.rand(maskable.shape, device=maskable.device) < self.rate)
        return {**inputs, "input_ids": inputs["input_ids"].masked_fill(drawn, self.tokenizer.mask_token_id)}


@dataclass
class WordDropout:
    """Hides tokens that are drawn at random from the attention of all others.

    Args:
        tokenizer: The tokenizer.
        rate: Probability of each token that is neither padding nor special.

    Raises:
        ValueError: The rate is none.
    """

    changes_tokens: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    rate: float = 0.1

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        self._special = frozenset(self.tokenizer.all_special_ids)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with some tokens hidden."""
        maskable = _maskable(inputs, self._special)
        drawn = maskable & (torch.rand(maskable.shape, device=maskable.device) < self.rate)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return {**inputs, "attention_mask": mask.masked_fill(drawn, 0)}


@dataclass
class Mixup:
    """Mixes each row with another one of the batch: word embeddings, images or sounds (arXiv 1710.09412, 1905.08941).

    The mixed row is `m` of the first and `1 - m` of the second, with `m` from Beta(alpha, alpha). Its label is that of
    the first with probability `m`, which gives the gradient of the mixed loss on average. For tasks of whole rows.

    Args:
        alpha: Parameter of the Beta distribution.

    Raises:
        ValueError: `alpha` is not above 0.
    """

    mixes_rows: ClassVar[bool] = True
    alpha: float = 0.2
    _share: Tensor | None = field(default=None, init=False, repr=False)
    _order: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"`alpha={self.alpha}` is not valid: it is above 0, and small values mix little.")

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with drawn labels; embeddings are mixed in the models (`within`)."""
        rows = next(value for value in inputs.values() if isinstance(value, Tensor))
        count, device = len(rows), rows.device
        self._share = torch.distributions.Beta(self.alpha, self.alpha).sample((count,)).to(device)
        self._order = torch.randperm(count).to(device)
        changed = dict(inputs)
        for name in ("pixel_values", "input_values"):
            if name in inputs:
                changed[name] = self._mix(inputs[name])
        if "attention_mask" in inputs:
            changed["attention_mask"] = torch.maximum(inputs["attention_mask"], inputs["attention_mask"][self._order])
        first = torch.rand(count, device=device) < self._share
        for name in (name for name in LABEL_COLUMNS if name in inputs):
            value = inputs[name]
            changed[name] = torch.where(first.reshape(-1, *[1] * (value.ndim - 1)), value, value[self._order])
        return changed

    def _mix(self, values: Tensor) -> Tensor:
        rows = values.reshape(len(self._order), -1, *values.shape[1:])  # the choices of one row stand together
        share = self._share.reshape(-1, *[1] * (rows.ndim - 1)).to(values.dtype)
        return (share * rows + (1 - share) * rows[self._order]).reshape(values.shape)

    @contextmanager
    def within(self, models: list[PreTrainedModel]) -> Iterator[None]:
        """Mix the word embeddings of the models, in the way of the last batch."""
        readers = [base_model(model) for model in models if base_model(model).main_input_name == "input_ids"]
        embeddings = {model.get_input_embeddings() for model in readers}  # of any class: PEFT may have wrapped them
        with ExitStack() as hooks:
            for module in embeddings:
                handle = module.register_forward_hook(lambda _module, _arguments, output: self._mix(output))
                hooks.callback(handle.remove)
            yield


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"`rate={rate}` is not valid: it is a probability, from 0 to 1.")
