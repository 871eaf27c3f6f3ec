"""Changes to the batches of a training: for both models alike, or for one while the other one's view stays clean."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import EMBEDDINGS, DistillationArguments
from ..model_structure import base_model
from ..tasks.base import Task
from ..tasks.two_tokenizers import PREFIX

#: Takes a batch and gives the changed one, with the same rows and labels; it may be called several times a step.
Augmentation = Callable[[dict[str, Any]], dict[str, Any]]
Views = Literal["both", "teacher", "student"]


def augmented_batch(
    inputs: Mapping[str, Any], augmentation: Augmentation, views: Views, per_token: bool = False
) -> dict[str, Any]:
    """A batch in which both models, or one of them, get the changed inputs.

    Args:
        inputs: The batch.
        augmentation: What changes it.
        views: Who gets the changed one. Labels are those of the change if both do, and the batch's own otherwise.
        per_token: Whether the models are compared token by token, so that two views must be of the same tokens.

    Raises:
        ValueError: They are of another length.
    """
    changed = augmentation(dict(inputs))
    if views == "both":
        return changed
    clean = {name: value for name, value in inputs.items() if "label" not in name}
    changed = {name: value for name, value in changed.items() if name in clean}
    for name in changed if per_token else ():
        own, other = (getattr(each[name], "shape", None) for each in (clean, changed))
        if own != other:
            raise ValueError(
                f"`augmented={views!r}`: `augmentation` makes `{name}` {tuple(other)} of {tuple(own)}, and the models "
                "are compared token by token. Keep the length, or use `augmented='both'` and change the labels, too."
            )
    teachers, students = (changed, clean) if views == "teacher" else (clean, changed)
    return {**inputs, **teachers, **{f"{PREFIX}{name}": value for name, value in students.items()}}


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
        for name in (name for name in inputs if "label" in name):
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


def check_augmentation(
    augmentation: Augmentation | None,
    views: str,
    task: Task,
    teacher: PreTrainedModel,
    arguments: DistillationArguments,
    two_tokenizers: bool,
) -> None:
    """An augmentation must fit the task, the models and the other arguments.

    Args:
        augmentation: The augmentation.
        views: Who gets the changed batch.
        task: The task.
        teacher: The teacher.
        arguments: The distillation arguments.
        two_tokenizers: Whether the student has a tokenizer of its own.

    Raises:
        ValueError: The views are unknown or nothing is augmented, tokens are mixed up whose labels are not, or tokens
            are changed where there are none; the student has a tokenizer of its own; models that compute layers once
            for both would see different inputs; or a cache would take mixed rows for plain ones.
    """
    if views not in get_args(Views):
        raise ValueError(f"`augmented={views!r}` is unknown. Valid values: {', '.join(get_args(Views))}.")
    if augmentation is None:
        if views != "both":
            raise ValueError(f"`augmented={views!r}` has no effect without `augmentation` (None). Give both, or none.")
        return
    if two_tokenizers:
        raise ValueError(
            "`augmentation` and `student_processing_class` are both given, and it would change the tokens of one "
            "tokenizer as those of the other. Change the texts instead, before they are tokenized."
        )
    if views != "both" and arguments.share not in (None, EMBEDDINGS):
        raise ValueError(
            f"`augmented={views!r}` and `share={arguments.share!r}`: the shared layers are run once for both models, "
            f"which would see different inputs. Use `augmented='both'`, or `share={EMBEDDINGS!r}`."
        )
    main_input = base_model(teacher).main_input_name
    if isinstance(augmentation, (TokenMasking, WordDropout)) and main_input != "input_ids":
        raise ValueError(
            f"`{type(augmentation).__name__}` changes tokens, and a {type(base_model(teacher)).__name__} takes "
            f"`{main_input}`. Use `Mixup`, or a function of your own."
        )
    if isinstance(augmentation, Mixup) and arguments.pretrained_cache_dir is not None:
        raise ValueError(
            f"`Mixup` and `pretrained_cache_dir={arguments.pretrained_cache_dir!r}`: rows are mixed inside of the "
            "models, so that the cache would take mixed rows for plain ones. Leave out one of them."
        )
    if isinstance(augmentation, Mixup) and (views != "both" or not task.per_row):
        raise ValueError(
            f"`Mixup` with `augmented={views!r}` for {task.name}: it mixes whole rows with their labels, for both "
            "models. Use it with `augmented='both'` and a task of whole rows, or mask tokens instead."
        )


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"`rate={rate}` is not valid: it is a probability, from 0 to 1.")
