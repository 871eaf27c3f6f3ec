"""Tensors by key in a folder: written by several processes at once, read without loading, whole after a kill."""

import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

_FINGERPRINT = "fingerprint.json"
_SUFFIX = ".safetensors"
#: What a kill may cost at most: entries are written when they take this memory or have waited for this time.
_FLUSH_BYTES, _FLUSH_SECONDS = 2**26, 60.0


class PredictionStore:
    """Entries by key. An entry is some tensors by name, all with the same first dimension.

    Each flush writes one file per kind of entry under a name of its own, and puts it in place when it is complete; so
    several processes can share a folder without a lock, and read what the others have written. Two that add the same
    key write it twice, which is no harm.

    Args:
        folder: The folder; it is made if it is not there.
        fingerprint: What all entries depend on besides their key; strings and numbers.

    Raises:
        ValueError: The folder was made with another fingerprint.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check(fingerprint)
        self._shards: dict[str, Mapping[str, Tensor]] = {}
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._listed = -1
        self._pending: dict[bytes, Mapping[str, Tensor]] = {}
        self._pending_bytes, self._pending_since = 0, 0.0

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        """Write the fingerprint, or compare it with the one that is there."""
        path = self.folder / _FINGERPRINT
        if not path.exists():
            temporary = self._temporary_path()
            temporary.write_text(json.dumps(fingerprint, indent=2) + "\n")
            os.replace(temporary, path)
            return
        try:
            there = dict(json.loads(path.read_text()))
        except ValueError:
            there = {}
        different = [name for name in {**there, **fingerprint} if there.get(name) != fingerprint.get(name)]
        if different:
            parts = "; ".join(
                f"`{name}` is {there.get(name)!r} there, {fingerprint.get(name)!r} here" for name in different
            )
            raise ValueError(
                f"`pretrained_cache_dir={str(self.folder)!r}` has the predictions of another frozen teacher: {parts}. "
                "Name another folder, or delete this one."
            )

    def _temporary_path(self) -> Path:
        return self.folder / f".{uuid.uuid4().hex}.tmp"

    def get(self, keys: Sequence[bytes]) -> list[Mapping[str, Tensor] | None]:
        """The entries of some keys, `None` for each that is not there. Do not write to their tensors."""
        if any(key not in self._pending and key not in self._places for key in keys):
            self._find_shards()
        return [self._entry(key) for key in keys]

    def _entry(self, key: bytes) -> Mapping[str, Tensor] | None:
        if key in self._pending:
            return self._pending[key]
        if key not in self._places:
            return None
        shard, start, stop = self._places[key]
        return {name: tensor[start:stop] for name, tensor in self._shards[shard].items()}

    def add(self, key: bytes, entry: Mapping[str, Tensor]) -> None:
        """Keep an entry, with tensors on the CPU that nobody changes; it is written later, see `flush`."""
        if key in self._pending or key in self._places:
            return
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending[key] = entry
        self._pending_bytes += sum(tensor.nbytes for tensor in entry.values())
        if self._pending_bytes > _FLUSH_BYTES or time.monotonic() - self._pending_since > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last time."""
        kinds: dict[tuple, list[bytes]] = {}
        for key, entry in self._pending.items():
            kind = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in entry.items())
            kinds.setdefault(kind, []).append(key)
        for (first, *_), keys in kinds.items():
            entries = [self._pending[key] for key in keys]
            lengths = torch.tensor([len(entry[first[0]]) for entry in entries])
            tensors = {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}
            temporary, name = self._temporary_path(), f"{uuid.uuid4().hex}{_SUFFIX}"
            joined = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
            # Not `save_file`, whose files other users of the folder cannot read.
            temporary.write_bytes(save({**tensors, "_keys": joined, "_ends": lengths.cumsum(0)}))
            os.replace(temporary, self.folder / name)
            self._open_shard(name)
        self._pending.clear()
        self._pending_bytes = 0

    def _find_shards(self) -> None:
        """Open the files that are new in the folder."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._listed:
            return
        self._listed = changed
        for name in sorted(os.listdir(self.folder)):
            if name.endswith(_SUFFIX) and name not in self._shards:
                self._open_shard(name)

    def _open_shard(self, name: str) -> None:
        """Map a file into memory, and note which entries it has."""
        path = self.folder / name
        try:
            with safe_open(path, "pt") as file:
                tensors = {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118
            keys, ends = tensors.pop("_keys"), tensors.pop("_ends").tolist()
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s cannot be read and is passed over: %s", path, error)
            keys, ends, tensors = torch.empty(0, 1, dtype=torch.uint8), [], {}
        self._shards[name] = tensors
        for key, start, stop in zip(keys.numpy(), [0, *ends], ends, strict=False):
            self._places[key.tobytes()] = (name, start, stop)
