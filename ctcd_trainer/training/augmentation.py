"""Augmentations: change the batches of a training, for all models or for one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..graph import LEARNERS
from ..model_structure import base_model, main_input_of
from ..tasks.base import Task
from ..tasks.labels import IGNORE_INDEX, LABEL_COLUMNS
from ..tasks.two_tokenizers import view_of

#: Takes a batch and returns the changed batch with the same rows. It may be called several times a step. One with a
#: true attribute `changes_tokens` is refused for models of images and audio; with `mixes_rows`, for tasks of tokens.
Augmentation = Callable[[dict[str, Any]], dict[str, Any]]
#: The models that get the changed batch: `"both"`, or the name of a learner.
Views = str


def augmented_batch(
    inputs: Mapping[str, Any], augmentation: Augmentation, views: Views, task: Task | None = None
) -> dict[str, Any]:
    """Change a batch for all models, or its inputs for one of them, which leaves the labels unchanged.

    Raises:
        ValueError: The task is `per_token`, and the two views differ in length.
    """
    labels = (Task if task is None else task).label_names
    if isinstance(augmentation, Mixup):
        augmentation.label_names = labels
    changed = augmentation(dict(inputs))
    if views == "both":
        return changed
    clean = {name: value for name, value in inputs.items() if name not in labels}
    changed = {name: value for name, value in changed.items() if name in clean}
    for name in changed if task is not None and task.per_token else ():
        before, after = (getattr(view[name], "shape", None) for view in (clean, changed))
        if before != after:
            raise ValueError(
                f"`augmented={views!r}`: `augmentation` changes the shape of `{name}` from {tuple(before)} to "
                f"{tuple(after)}. Keep the length, or use `augmented='both'` and change the labels, too."
            )
    batch = dict(inputs)
    for learner in LEARNERS:
        view = changed if learner == views else clean
        batch |= {f"{view_of(learner)}{name}": value for name, value in view.items()}
    return batch


def recounted(
    number: Tensor | int | None,
    augmentation: Augmentation,
    task: Task,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Tensor | int | None:
    """Correct Trainer's count of scored items, made before the batch was changed, for changed labels.

    A batch keeps its weight: its losses become means over the items that are scored now. With `Mixup` the count stays:
    each label is drawn from two rows, so a batch with unlabelled rows has as many labels as before on average.

    The number is that of the labels in the accumulated batch, or `(3,)` with those of labelled items and of rows, too.
    """
    same = all(before.get(name) is after.get(name) for name in task.label_names)
    if number is None or same or getattr(augmentation, "mixes_rows", False):
        return number
    old, new = (
        torch.stack([task.counted(batch).ne(IGNORE_INDEX).sum(), task.labelled(batch).sum()])
        for batch in (before, after)
    )
    ratios = new / old.clamp(min=1)
    number = torch.as_tensor(number, device=ratios.device)
    if number.ndim == 0:
        return number * ratios[0]
    return number * torch.cat([ratios[: len(number) - 1], ratios.new_ones(1)])  # all rows are still there


@dataclass
class _RandomTokens:
    """Draws random tokens that are neither padding nor special, each with the probability `rate`."""

    changes_tokens: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"`rate={self.rate}` is not valid: it is a probability, from 0 to 1.")
        self._special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))

    def _drawn(self, inputs: Mapping[str, Any]) -> Tensor:
        """Mark the drawn tokens: bool `(rows, length)`."""
        ids = inputs["input_ids"]
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        maskable = real & ~torch.isin(ids, self._special.to(ids))
        return maskable & (torch.rand(maskable.shape, device=maskable.device) < self.rate)


@dataclass
class TokenMasking(_RandomTokens):
    """Replaces random tokens by the mask token of the tokenizer, as in masked language modelling.

    Args:
        tokenizer: The tokenizer.
        rate: Probability of each token that is neither padding nor special, from 0 to 1.
    """

    rate: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"A {type(self.tokenizer).__name__} has no mask token. Use `WordDropout`.")

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mask some tokens of a batch."""
        masked = inputs["input_ids"].masked_fill(self._drawn(inputs), self.tokenizer.mask_token_id)
        return {**inputs, "input_ids": masked}


@dataclass
class WordDropout(_RandomTokens):
    """Hides random tokens from the attention of all others; arguments as of `TokenMasking`, with any tokenizer."""

    rate: float = 0.1

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Hide some tokens of a batch."""
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return {**inputs, "attention_mask": mask.masked_fill(self._drawn(inputs), 0)}


@dataclass
class Mixup:
    """Mixes every row of a batch with another row, for tasks of whole rows (arXiv 1710.09412, 1905.08941).

    The word embeddings, image or recording of the mixed row are `m * first + (1 - m) * second`, with `m` drawn from
    Beta(alpha, alpha), `alpha` above 0. Its label is the first row's with probability `m`, so that the gradient is
    that of the mixed loss on average.
    """

    mixes_rows: ClassVar[bool] = True
    alpha: float = 0.2
    #: The inputs that are labels; the trainer sets those of its task.
    label_names: Sequence[str] = field(default=LABEL_COLUMNS, init=False, repr=False)
    _share: Tensor | None = field(default=None, init=False, repr=False)
    _order: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"`alpha={self.alpha}` is not valid: it is above 0, and small values mix little.")

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mix images or recordings of a batch, and draw its labels. `within` mixes word embeddings in the models."""
        rows = next(value for value in inputs.values() if isinstance(value, Tensor))
        count, device = len(rows), rows.device
        self._share = torch.distributions.Beta(self.alpha, self.alpha).sample((count,)).to(device)
        self._order = torch.randperm(count).to(device)
        media = [name for name in ("pixel_values", "input_values") if name in inputs]
        changed = inputs | {name: self._mix(inputs[name]) for name in media}
        if "attention_mask" in inputs:
            changed["attention_mask"] = torch.maximum(inputs["attention_mask"], inputs["attention_mask"][self._order])
        first = torch.rand(count, device=device) < self._share
        for name in (name for name in self.label_names if name in inputs):
            value = inputs[name]
            changed[name] = torch.where(first.reshape(-1, *[1] * (value.ndim - 1)), value, value[self._order])
        return changed

    def _mix(self, values: Tensor) -> Tensor:
        rows = values.reshape(len(self._order), -1, *values.shape[1:])  # the choices of a row stay together
        share = self._share.reshape(-1, *[1] * (rows.ndim - 1)).to(values.dtype)
        return (share * rows + (1 - share) * rows[self._order]).reshape(values.shape)

    @contextmanager
    def within(self, models: list[PreTrainedModel]) -> Iterator[None]:
        """Mix the word embeddings of the models while the block runs, as the last batch was mixed."""
        readers = [base_model(model) for model in models if main_input_of(model) == "input_ids"]
        embeddings = {model.get_input_embeddings() for model in readers}  # of any class: PEFT may have wrapped them
        with ExitStack() as hooks:
            for module in embeddings:
                handle = module.register_forward_hook(lambda _module, _arguments, output: self._mix(output))
                hooks.callback(handle.remove)
            yield
