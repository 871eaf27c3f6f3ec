"""Keep the predictions of the frozen pre-trained teacher on disk, so that later epochs and trainings do not run it.

A prediction is found by the content of its row: the inputs that the model takes, without labels and without the
padding behind them. So a row is found again in another order, in batches of another size and with other padding. The
cache keeps what the losses compare: the logits of each row or of each token; for a language model that runs without
logits, the hidden states at the scored positions.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..model_structure import base_model, is_peft_model
from ..tasks.base import Task
from ..tasks.labels import IGNORE_INDEX
from .fused_linear import LinearHead, ScoredPositions
from .head_tap import HeadTap
from .prediction_store import PredictionStore

logger = logging.get_logger(__name__)

#: Raise this when the stored tensors or the keys change.
_FORMAT = 2
#: Config entries of a model or an adapter that do not change a prediction, or that the weights show.
_IGNORED_SETTINGS = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save"),
    *("peft_version", "revision"),
}
#: Give up after this many batches without a hit once the first epoch is over.
_PATIENCE = 50

#: Runs the model on a batch; with positions, up to its output layer.
RunModel = Callable[[Mapping[str, Any], ScoredPositions | None], Any]


class PretrainedCache:
    """Look predictions up, and run the model on the missing rows.

    Args:
        folder: The folder, on a disk of this machine.
        model: The frozen teacher.
        task: Its task.
        precision: `mixed_precision` of the training arguments: `"no"`, `"bf16"` or `"fp16"`.

    Raises:
        ValueError: The folder has predictions of another model, in another precision or of an older version.
    """

    def __init__(self, folder: str | os.PathLike, model: nn.Module, task: Task, precision: str) -> None:
        self._store = PredictionStore(folder, fingerprint_of(model, task, precision))
        self._task = task
        self._reset()

    def _reset(self) -> None:
        self._found = self._rows = self._batches_in_vain = 0
        self._first_epoch: float | None = None
        self._given_up = False

    def outputs(
        self,
        run: RunModel,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any],
        tap: HeadTap | None = None,
        head_at: ScoredPositions | None = None,
        epoch: float = 0.0,
    ) -> dict[str, Tensor] | LinearHead:
        """Return the compared outputs of the model for a batch.

        Args:
            run: Runs the model.
            inputs: The batch, with labels.
            taken: The part of the batch that the model takes.
            tap: The output layer of a language model that runs without logits.
            head_at: The scored positions, with a `tap`.
            epoch: The present epoch, as a fraction.

        Returns:
            The outputs by name, 0 at padding tokens; with a `tap`, the head with its hidden states.
        """
        if self._given_up:
            return run(inputs, head_at)
        batch = _Batch(self._task, inputs, taken, fused=tap is not None)
        keys = batch.keys()
        entries = self._store.get(keys)
        missing = [row for row, entry in enumerate(entries) if entry is None]
        self._count(len(keys), len(missing), epoch)
        if missing:
            part = inputs
            if not batch.divisible:
                missing = list(range(len(keys)))
            elif len(missing) < len(keys):
                part = batch.rows_of(inputs, missing)
                head_at = ScoredPositions(self._task.targets(part)) if tap is not None else head_at
            computed = dict(zip(missing, batch.split(run(part, head_at), missing), strict=True))
            if not self._given_up:
                self._store.add({keys[row]: entry for row, entry in computed.items()})
            entries = [computed.get(row, entry) for row, entry in enumerate(entries)]
        joined = batch.join(entries)
        return joined if tap is None else tap.head(joined["hidden"])

    def _count(self, rows: int, missing: int, epoch: float) -> None:
        self._rows += rows
        self._found += rows - missing
        self._first_epoch = epoch if self._first_epoch is None else self._first_epoch
        if not self._found and epoch >= self._first_epoch + 1:
            self._batches_in_vain += 1
        if self._batches_in_vain == _PATIENCE:
            self._given_up = True
            self._warn(", and nothing more is kept")

    def _warn(self, consequence: str = "") -> None:
        logger.warning(
            "No row after the first epoch was in `pretrained_cache_dir='%s'`, so the frozen teacher was run on all of "
            "them%s. Are the inputs, or the positions that are scored, made anew in each epoch (random masks, crops)? "
            "Make them once, before the training, or leave the argument out.",
            *(self._store.folder, consequence),
        )

    def finish(self) -> None:
        """End a training: close the file, and log how many rows were found."""
        self._store.close()
        if self._batches_in_vain and not self._given_up:
            self._warn()
        if self._rows:
            text = "Predictions of the frozen teacher: %d of %d rows were found in %s."
            logger.info(text, self._found, self._rows, self._store.folder)
        self._reset()


class _Batch:
    """The rows of a batch: their keys, and their parts of the outputs."""

    def __init__(self, task: Task, inputs: Mapping[str, Any], taken: Mapping[str, Any], fused: bool) -> None:
        self._task, self._taken = task, taken
        scored = task.targets(inputs).ne(IGNORE_INDEX)
        self._count = len(scored)
        #: Whether the model can be run on some of the rows.
        self.divisible = all(self._of_rows(v) or v is None or isinstance(v, (int, float, str)) for v in taken.values())
        #: The scored positions of a language model that runs without logits.
        self._scored = scored.cpu() if fused else None
        #: By input that has a value for each token: the axis of the tokens in a row, and how many of them count.
        self._lengths: dict[str, tuple[int, list[int]]] = {}
        mask = taken.get("attention_mask")
        if task.per_token is not None and self._of_rows(mask) and mask.ndim > 1:
            counts = mask.ne(0)
            if scored.shape == mask.shape:  # labels at padding: unusual, but they are scored
                counts = counts | scored
            # Trimming too little costs one more forward pass; trimming too much would confuse two rows.
            self._trim(task.token_inputs, counts)
        if fused:
            self._trim(task.decoder_token_inputs, scored)
        #: The number of tokens of each row, and of the batch, if each token has a prediction.
        self._tokens: list[int] | None = None
        if task.per_token and not fused and "attention_mask" in self._lengths and mask.ndim == 2:
            self._tokens, self._width = self._lengths["attention_mask"][1], mask.shape[1]

    def _of_rows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[:1] == (self._count,)

    def _trim(self, names: Iterable[str], counts: Tensor) -> None:
        """Trim inputs behind the last token that counts; `counts` is bool, `(rows, ..., tokens)`."""
        axis = counts.ndim - 1
        last = torch.arange(1, counts.shape[-1] + 1, device=counts.device).mul(counts).flatten(1).amax(-1).tolist()
        for name in names:
            if self._of_rows(self._taken.get(name)) and self._taken[name].shape[: axis + 1] == counts.shape:
                self._lengths[name] = (axis - 1, last)

    def keys(self) -> list[bytes]:
        """Return the key of each row: a hash of its inputs and of all else that changes a prediction."""
        shared = hashlib.blake2b(b"outputs" if self._scored is None else b"hidden", digest_size=16)
        columns = {}
        for name, value in sorted(self._taken.items()):
            if self._of_rows(value):
                columns[name] = value.cpu()
            elif name != "use_cache":  # for generation
                _add(shared, name, value)
        keys = []
        for row in range(self._count):
            key = shared.copy()
            for name, column in columns.items():
                axis, lengths = self._lengths.get(name, (0, None))
                _add(key, name, column[row] if lengths is None else column[row].narrow(axis, 0, lengths[row]))
            if self._scored is not None:
                _add(key, "scored", self._scored[row].nonzero())
            keys.append(key.digest())
        return keys

    def rows_of(self, inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """Return a batch of some of the rows."""
        return {
            name: value[torch.tensor(rows, device=value.device)] if self._of_rows(value) else value
            for name, value in inputs.items()
        }

    def split(self, outputs: Any, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the parts of the outputs to keep for each of some rows, on the CPU."""
        if self._scored is not None:
            hidden = outputs.hidden.cpu().split(self._scored[list(rows)].sum(-1).tolist())
            return [{"hidden": part.clone()} for part in hidden]
        outputs = self._task.named(outputs)
        values = {name: outputs[name].cpu() for name in self._task.compared_outputs}
        if self._tokens is None:
            return [{name: value[i : i + 1].clone() for name, value in values.items()} for i in range(len(rows))]
        lengths = [self._tokens[row] for row in rows]
        return [{name: value[i, :n].clone() for name, value in values.items()} for i, n in enumerate(lengths)]

    def join(self, entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the outputs of the batch, from the entries of all rows."""
        device = next(value.device for value in self._taken.values() if isinstance(value, Tensor))
        joined = {}
        for name in entries[0]:
            parts = [entry[name] for entry in entries]
            if self._tokens is not None:
                padding = (0, 0) * (parts[0].ndim - 1)
                parts = [nn.functional.pad(part, (*padding, 0, self._width - len(part)))[None] for part in parts]
            joined[name] = torch.cat(parts).to(device)
        return joined


def fingerprint_of(model: nn.Module, task: Task, precision: str) -> dict[str, Any]:
    """Return all that the predictions of a model depend on besides its inputs."""
    weights = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        _add(weights, name, value)
    config = model.config.to_dict()
    if is_peft_model(model):
        adapters = {name: adapter.to_dict() for name, adapter in model.peft_config.items()}
        config |= {"adapters": adapters, "active": model.active_adapter}
    text = json.dumps(_plain(config), sort_keys=True, default=str)
    return {
        "format": _FORMAT,
        "model": type(base_model(model)).__name__,
        "config": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "weights": weights.hexdigest(),
        "mixed_precision": precision,
        "task": type(task).__name__,
    }


def _plain(value: Any) -> Any:
    """Drop the settings that do not change a prediction; the rest is the same in every process and after loading."""
    if isinstance(value, Mapping):
        names = [name for name in value if name not in _IGNORED_SETTINGS and not str(name).startswith("_")]
        return {str(name): _plain(value[name]) for name in names}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_plain(setting) for setting in value] if isinstance(value, (list, tuple)) else value


def _add(digest: Any, name: str, value: Any) -> None:
    """Add a named value to a hash."""
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value!r};".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
