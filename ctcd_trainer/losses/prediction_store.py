"""A key-value store of tensors on disk (SQLite): safe for several processes, and after a kill."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

_FILE, _TIMEOUT_SECONDS = "predictions.sqlite", 60.0
_TABLES = """
    CREATE TABLE IF NOT EXISTS fingerprint (id INTEGER PRIMARY KEY CHECK (id = 0), json TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS predictions (key BLOB PRIMARY KEY, tensors BLOB NOT NULL);
"""


class PredictionStore:
    """Entries (tensors by name) by key, which several processes can read and write at the same time.

    The folder must be on a local disk: SQLite is not safe on a network file system to which several machines write.

    Args:
        folder: The folder, made if it does not exist.
        fingerprint: Strings and numbers on which all entries depend besides their key.

    Raises:
        ValueError: The folder has entries of another fingerprint or of an older version, or its file is damaged.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._connections: dict[int, sqlite3.Connection] = {}  # by process: a fork must not touch its parent's
        if (self.folder / "fingerprint.json").exists():
            raise ValueError(self._refusal("has the predictions of an older version of ctcd_trainer"))
        with self._connected() as connection:
            connection.executescript(_TABLES)
            connection.execute("INSERT OR IGNORE INTO fingerprint VALUES (0, ?)", [json.dumps(fingerprint)])
            stored = json.loads(connection.execute("SELECT json FROM fingerprint").fetchone()[0])
        different = [name for name in {**stored, **fingerprint} if stored.get(name) != fingerprint.get(name)]
        if different:
            self.close()
            parts = (f"`{name}` is {stored.get(name)!r} there, {fingerprint.get(name)!r} here" for name in different)
            raise ValueError(self._refusal(f"has the predictions of another frozen teacher: {'; '.join(parts)}"))

    def get(self, keys: Sequence[bytes]) -> list[dict[str, Tensor] | None]:
        """Return the entries of some keys, `None` for a key that has none."""
        query = "SELECT tensors FROM predictions WHERE key = ?"
        with self._connected() as connection:
            rows = [connection.execute(query, [key]).fetchone() for key in keys]
        return [None if row is None else load(row[0]) for row in rows]

    def add(self, entries: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Write entries to the disk; a key that is there keeps its entry."""
        rows = [(key, save(dict(tensors))) for key, tensors in entries.items()]
        with self._connected() as connection:
            connection.executemany("INSERT OR IGNORE INTO predictions VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file until the next use."""
        if connection := self._connections.pop(os.getpid(), None):
            connection.close()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Give the connection of this process; commit at the end."""
        try:
            if os.getpid() not in self._connections:
                self._connections[os.getpid()] = _open(self.folder / _FILE)
            with self._connections[os.getpid()] as connection:
                yield connection
        except sqlite3.OperationalError:  # a full disk, a folder without write access
            raise
        except sqlite3.DatabaseError as error:
            raise ValueError(self._refusal(f"has a damaged file {_FILE} ({error})")) from error

    def _refusal(self, reason: str) -> str:
        return f"`pretrained_cache_dir={str(self.folder)!r}` {reason}. Name another folder, or delete this one."


def _open(path: Path) -> sqlite3.Connection:
    # Python serialises the calls of several threads.
    connection = sqlite3.connect(path, _TIMEOUT_SECONDS, check_same_thread=False)
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:  # SQLite does not wait for others that switch to this mode
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            connection.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing that was committed
            return connection
