"""The calls of the loopback Hub: what a request and an answer are, how a call finds its answer, and who may what."""

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from loopback_hub_repos import HubError, Repository

PARTS = {
    "{kind}": "(?P<kind>models|datasets|spaces)",
    "{prefix}": "(?:(?P<kind>datasets|spaces)/)?",
    "{repo}": "(?P<repo>[^/]+/[^/]+)",
    "{revision}": "(?P<revision>[^/]+)",
    "{name}": "(?P<name>[^/]+)",
    "{path}": "(?P<path>.+)",
}
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


@dataclass(frozen=True)
class User:
    """Who a token belongs to."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """A request: the path still quoted, and the token of its `Authorization` header."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    token: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    """A response."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def error_answer(error: HubError) -> Answer:
    return json_answer({"error": error.message}, error.status, error.headers)


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    for part, group in PARTS.items():
        pattern = pattern.replace(part, group)

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubCalls:
    """Repositories and tokens, and the calls that have been registered with `route`. `lock` guards all of them."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.users: dict[str, User] = {}
        self.lock = threading.RLock()
        self.endpoint = self.storage = ""

    def answer(self, call: Call) -> Answer:
        """The answer to a call; what is refused or not known is an answer, too."""
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(call.path)
            if match and method == ("GET" if call.method == "HEAD" else call.method):
                groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                try:
                    with self.lock:
                        return function(self, call, **groups)
                except HubError as error:
                    return error_answer(error)
        return error_answer(HubError(404, f"The loopback Hub has no {call.method} {call.path}"))

    # ---- Rights ----

    def user(self, call: Call, required: bool = False) -> User | None:
        """Whose token it is; `None` without a token, unless one is required."""
        if call.token is None and not required:
            return None
        if call.token is None:
            raise HubError(401, "Invalid username or password.")
        if call.token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[call.token]

    def writer(self, call: Call, namespace: str) -> User:
        """Whose token it is, if it may write there."""
        user = self.user(call, required=True)
        if user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if namespace not in (user.name, *user.orgs):
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
        return user

    def repository(self, call: Call, repo: str, kind: str = "models", write: bool = False) -> Repository:
        """A repository that the caller may see, or else nobody learns whether it exists."""
        user = self.user(call)
        found = self.repos.get(repo_key(kind, repo))
        hidden = found is not None and found.private and not (user and found.owner in (user.name, *user.orgs))
        if found is None or hidden:
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.writer(call, found.owner)
        return found


def repo_key(kind: str, repo: str) -> str:
    """The name of a repository in addresses and in `LoopbackHub.repos`."""
    return repo if kind == "models" else f"{kind}/{repo}"


def is_private(settings: Mapping[str, Any]) -> bool:
    """Whether a request asks for a private repository, by the older or the newer name of the setting."""
    return bool(settings.get("private")) or settings.get("visibility") == "private"
