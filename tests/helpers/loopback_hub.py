"""A small Hugging Face Hub in memory, to which tests talk with the real `huggingface_hub` and which they break.

```python
with LoopbackHub() as hub:
    use_hub(monkeypatch, hub)  # this process; for a subprocess: `env=hub.environment()`
    hub.fail("POST .*/commit/", status=500, times=2)
    trainer.push_to_hub()
    assert "student/config.json" in hub.files("me/pair")
```
"""

import base64
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import ModelCardData, close_session
from huggingface_hub.utils import validate_repo_id

#: Settings of the user's that a client must not see here.
_SETTINGS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE", "HF_HUB_CACHE")
_SETTINGS += ("HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN")


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of its tree."""

    oid: str
    title: str
    files: Mapping[str, bytes]


@dataclass
class Repository:
    """A repository: the commits of each branch, oldest first."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, "initial", {})]})

    def find(self, revision: str) -> Commit:
        commits = [commit for branch in self.branches.values() for commit in branch if commit.oid == revision]
        return self.branches[revision][-1] if revision in self.branches else commits[0]

    def append(self, branch: str, files: Mapping[str, bytes], title: str) -> Commit:
        commits = self.branches[branch]
        oid = hashlib.sha1(f"{commits[-1].oid} {title} {len(commits)}".encode()).hexdigest()
        commits.append(Commit(oid, title, files))
        return commits[-1]


@dataclass
class _Fault:
    match: str
    times: int
    status: int | None
    headers: Mapping[str, str]
    message: str
    seconds: float


class HubError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None, **data: str) -> None:
        super().__init__(message)
        text = " ".join(message.split())
        self.status, self.headers, self.data = status, {"X-Error-Message": text, **(headers or {})}, data


class LoopbackHub:
    """A Hub of models on 127.0.0.1, while the context is open. The user "me" owns `token`."""

    def __init__(self) -> None:
        self.token = "hf_loopbackMe"
        self.users = {self.token: "me"}
        self.repos: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.errors: list[Exception] = []
        self.faults: list[_Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def __enter__(self) -> "LoopbackHub":
        self._folder = tempfile.TemporaryDirectory(prefix="loopback-hub-")
        self.folder = Path(self._folder.name)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads, self._server.block_on_close, self._server.hub = True, False, self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()
        if self.errors:
            raise self.errors[0]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of all files of a revision."""
        return dict(self.repos[repo_id].find(revision).files)

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first; the last one is empty."""
        return self.repos[repo_id].branches[branch][::-1]

    def add_token(self, token: str, user: str) -> str:
        """Give a user another token."""
        self.users[token] = user
        return token

    def create(self, repo_id: str) -> Repository:
        """A new repository, as if somebody had created it."""
        return self.repos.setdefault(repo_id, Repository())

    def commit(self, repo_id: str, files: Mapping[str, bytes]) -> None:
        """Add files to the main branch, as if somebody had pushed them."""
        self.repos[repo_id].append("main", {**self.files(repo_id), **files}, "by another")

    def requests_like(self, match: str) -> list[str]:
        """The requests so far ("METHOD path") in which a regular expression is found."""
        return [request for request in list(self.requests) if re.search(match, request)]

    def fail(
        self,
        match: str,
        status: int | None = 500,
        times: int = 1000,
        headers: Mapping[str, str] | None = None,
        message: str = "failed on purpose",
    ) -> None:
        """Answer an error to the next requests that match; with the status `None` cut the connection."""
        self.faults.append(_Fault(match, times, status, headers or {}, message, 0.0))

    def delay(self, match: str, seconds: float, times: int = 1000) -> None:
        """Answer the next requests that match after a while."""
        self.faults.append(_Fault(match, times, 200, {}, "", seconds))

    def heal(self) -> None:
        """Let no more requests fail."""
        self.faults.clear()

    def release(self) -> None:
        """Answer what is delayed, and wait for uploads, which would go on to the Hub of the next test."""
        self.heal()
        self.closing.set()
        for thread in threading.enumerate():
            if thread.name == "ctcd-uploads":
                thread.join(60)

    def environment(self, token: str, home: Path) -> dict[str, str]:
        """The environment of a subprocess that uses this Hub; `home` is its `HF_HOME`."""
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {name: value for name, value in os.environ.items() if name not in _SETTINGS} | settings


class _Handler(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP API that pushes and downloads need. All files are regular ones, without LFS."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {unquote(path)}"
        with hub.lock:
            hub.requests.append(request)
            fault = next((x for x in hub.faults if x.times > 0 and re.search(x.match, request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.seconds:
            hub.closing.wait(fault.seconds)
        if fault is not None and fault.status is None:
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        try:
            if fault is not None and fault.status != 200:
                raise HubError(fault.status, fault.message, fault.headers)
            with hub.lock:
                status, headers, answer = 200, {}, self._answer(path, body)
            if isinstance(answer, tuple):
                headers, answer = answer
        except HubError as error:
            status, headers, answer = error.status, error.headers, {"error": str(error), **error.data}
        except Exception as error:  # a mistake in this file
            hub.errors.append(error)
            status, headers, answer = 500, {}, {"error": repr(error)}
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_GET

    def _user(self) -> str | None:
        return self.server.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        found, owner = self.server.hub.repos.get(repo_id), repo_id.split("/")[0]
        if write and self._user() != owner:
            raise HubError(403 if self._user() else 401, f"You have no right to write to {owner}")
        if found is None or (found.private and self._user() != owner):
            raise HubError(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        return found

    def _answer(self, path: str, body: bytes) -> Any:
        """The answer to a request: JSON, or headers and the content of a file."""
        hub = self.server.hub
        lines = [json.loads(line) for line in body.splitlines()] if body else [{}]
        if path == "/api/repos/create":
            owner = lines[0].get("organization") or self._user()
            repo_id = f"{owner}/{lines[0]['name']}"
            answer = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
            if repo_id in hub.repos:
                raise HubError(409, "You already created this repository", **answer)
            if self._user() is None or owner != self._user():
                raise HubError(403 if self._user() else 401, f"You have no right to write to {owner}")
            hub.repos[repo_id] = Repository(private=lines[0].get("visibility") == "private")
            return answer
        if path == "/api/validate-yaml":
            return self._check_card(lines[0]["content"])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo_id, revision, name = map(unquote, match.groups())
            commit = self._find(self._repository(repo_id), revision)
            if name not in commit.files:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
                raise HubError(404, "Entry not found", headers)
            etag = hashlib.sha1(commit.files[name]).hexdigest()
            return {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"'}, commit.files[name]
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/([a-z-]+)/([^/]+)(?:/(.+))?)?", path)
        if match is None:
            raise HubError(404, f"The loopback Hub has no {path}")
        repo_id, what, revision, folder = (unquote(group or "") for group in match.groups())
        repository = self._repository(repo_id, write=what in ("auth-check", "branch", "preupload", "commit"))
        if what == "auth-check":
            return {}
        if what == "branch":
            if revision in repository.branches:
                raise HubError(409, "Reference already exists")
            repository.branches[revision] = list(repository.branches["main"])
            return {}
        files = dict(self._find(repository, revision or "main").files)
        if what == "tree":
            entries = [{"type": "file", "path": name, "oid": "", "size": len(files[name])} for name in sorted(files)]
            return [entry for entry in entries if entry["path"].startswith(folder)]
        if what == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return {"files": [{"path": each["path"], **modes} for each in lines[0]["files"]]}
        if what == "commit":
            for line in lines[1:]:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    del files[line["value"]["path"]]
            commit = repository.append(revision, files, lines[0]["value"]["summary"])
            return {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid}
        card = re.match(r"\A---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        data = yaml.safe_load(card[1]) if card else {}
        sha = self._find(repository, revision or "main").oid
        return {"id": repo_id, "sha": sha, "private": repository.private, "siblings": [], "tags": [], **data}

    def _find(self, repository: Repository, revision: str) -> Commit:
        try:
            return repository.find(revision)
        except IndexError:
            raise HubError(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"}) from None

    def _check_card(self, content: str) -> dict[str, list]:
        """Refuse a card whose metadata the real Hub would refuse."""
        block = re.match(r"\A---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else {}
            ModelCardData(**data)
            bases = data.get("base_model") or []
            for base in [bases] if isinstance(bases, str) else bases:
                validate_repo_id(base)
        except Exception as error:
            raise HubError(400, f"Invalid metadata in README.md: {error!r}") from error
        return {"errors": [], "warnings": []}


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, token: str | None = None) -> None:
    """Point this process's huggingface_hub and transformers, which are already imported, to a Hub, logged in as "me".

    Until `monkeypatch` undoes this, the process cannot connect to other machines, and the client never sleeps.
    """
    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", token or hub.token)
    cache = str(hub.folder / "cache")
    values = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", cache)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)  # read when it was imported
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            raise ConnectionRefusedError(f"Not loopback: {address}")
        connect(self, address)

    monkeypatch.setattr("socket.socket.connect", connect_here)
    close_session()  # its client has read the proxies
