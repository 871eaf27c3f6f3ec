"""A small Hugging Face Hub on loopback, which tests talk to with the real `huggingface_hub` and break on purpose.

```python
with LoopbackHub() as hub:
    use_hub(monkeypatch, hub)  # this process; for a subprocess: `env=hub.environment()`
    hub.fail("POST .*/commit/", status=500, times=2)
    trainer.push_to_hub(token=hub.token)
    assert "student/config.json" in hub.files("me/pair")
```
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from loopback_hub_api import HubApi
from loopback_hub_calls import User, repo_key
from loopback_hub_repos import Blob, Commit, Repository
from loopback_hub_server import HubServer, Traffic

# Where else the client would look for tokens, caches and modes.
OTHER_SETTINGS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_OIDC_RESOURCE",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
)


class LoopbackHub(Traffic):
    """A Hub on 127.0.0.1, in memory, from entering the context to leaving it.

    Large files are up- and downloaded at a second port of another name, as the storage of the real Hub is another
    host, which takes no tokens.
    The user "me" owns `token`; more are made with `add_token`.

    Args:
        part_size: Large files above this size are uploaded in parts; `None` for never.
    """

    def __init__(self, part_size: int | None = None) -> None:
        super().__init__()
        self.token = "hf_loopbackMe"
        self._api = HubApi()
        self._api.part_size = part_size
        self._servers: list[HubServer] = []
        self.add_token(self.token, "me")

    def __enter__(self) -> "LoopbackHub":
        self.folder = Path(tempfile.mkdtemp(prefix="loopback-hub-"))
        self._servers = [HubServer(self, self._api) for _ in range(2)]
        names = ("127.0.0.1", "localhost")  # a client may take ports of one name for one host, and send its token
        self._api.endpoint, self._api.storage = (
            f"http://{name}:{server.server_port}" for name, server in zip(names, self._servers, strict=True)
        )
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.closing.set()
        for server in self._servers:
            server.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.errors and error is None:
            raise self.errors[0]

    # ---- Looking at it ----

    @property
    def endpoint(self) -> str:
        """The address of the Hub, for `HF_ENDPOINT` or `HfApi(endpoint=...)`."""
        return self._api.endpoint

    @property
    def repos(self) -> Mapping[str, Repository]:
        """The repositories by id; those of data sets and Spaces as `datasets/<id>` and `spaces/<id>`."""
        return MappingProxyType(self._api.repos)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of all files of a revision (but of `.gitattributes`, which every repository begins with)."""
        with self._api.lock:
            files = self.repos[repo_id].resolve(revision).files
        return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, newest first; the last is that of the creation."""
        with self._api.lock:
            return self.repos[repo_id].history(revision)

    # ---- Changing it ----

    def add_token(self, token: str, user: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """A token of a user, who may also write to organisations; `role` is "write" or "read"."""
        self._api.users[token] = User(user, role, orgs)
        return token

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """A new repository, as if somebody had created it."""
        with self._api.lock:
            self._api.repos[repo_key("models", repo_id)] = Repository(repo_id, repo_id.split("/")[0], private)
            return self.repos[repo_id]

    def commit(self, repo_id: str, files: Mapping[str, bytes], title: str = "by another", branch: str = "main") -> str:
        """Add files to a branch, as if somebody had pushed them, and return the id of the commit."""
        with self._api.lock:
            repo = self.repos[repo_id]
            blobs = {
                path: Blob(data, repo.upload_mode(path, data[:512], len(data)) == "lfs")
                for path, data in files.items()
            }
            repo.lfs.update({blob.sha256: blob.data for blob in blobs.values() if blob.lfs})
            files = {**repo.resolve(branch).files, **blobs}
            return repo.append(branch, files, title, "", "somebody").oid

    # ---- Clients ----

    def environment(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """The environment of a subprocess whose Hub this is, with an own cache (`home` is its `HF_HOME`).

        The waits of the client between its tries cannot be shortened there: 1, 2, 4, 8 and 8 seconds.
        """
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **({} if token is None else {"HF_TOKEN": token}),
        }
        return {name: value for name, value in os.environ.items() if name not in OTHER_SETTINGS} | settings
