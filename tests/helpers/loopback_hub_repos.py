"""Repositories of the loopback Hub, in memory: branches, tags, and commits that are visible whole or not at all."""

import base64
import fnmatch
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

LFS_SUFFIXES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.onnx", "*.parquet", "*.zip", "*.gz")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_SUFFIXES).encode()
LFS_SIZE = 10 * 2**20


class HubError(Exception):
    """An answer that is not a success: the status, the message and the code by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": " ".join(message.encode("ascii", "replace").decode().split()), **headers}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Blob:
    """The content of a file."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        data = self.data
        if self.lfs:  # what git holds of a large file is a pointer to it
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of its tree."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repository:
    """One repository; callers that change it hold the lock of the Hub."""

    id: str
    owner: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # uploaded large files by SHA-256, committed or not

    def __post_init__(self) -> None:
        self.append("main", {".gitattributes": Blob(GIT_ATTRIBUTES)}, "initial commit", "", self.owner)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a (shortened) commit id."""
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and re.fullmatch(r"[0-9a-f]{5,40}", revision):
            oid = next((oid for oid in self.commits if oid.startswith(revision)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """The commit of a revision and those before it, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def upload_mode(self, path: str, sample: bytes, size: int) -> str:
        """Whether the file goes into git ("regular") or into the large file storage ("lfs")."""
        if size == 0:
            return "regular"
        name = path.rpartition("/")[2]
        large = size > LFS_SIZE or any(fnmatch.fnmatch(name, pattern) for pattern in LFS_SUFFIXES)
        return "lfs" if large or b"\0" in sample else "regular"

    def commit(self, branch: str, lines: Iterable[Mapping[str, Any]], author: str) -> Commit:
        """Apply the lines of a commit request to the head of a branch, all of them or none.

        Raises:
            HubError: The branch is missing or has moved, or a line cannot be applied.
        """
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.resolve(branch)
        files, header = dict(head.files), {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
                if not head.oid.startswith(value.get("parentCommit", "")):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, "Your push was rejected because an LFS pointer pointed to a missing file.")
                files[value["path"]] = Blob(self.lfs[value["oid"]], lfs=True)
            elif line["key"] in ("deletedFile", "deletedFolder"):
                path = value["path"].rstrip("/")
                folder = line["key"] == "deletedFolder"
                gone = {name for name in files if name.startswith(f"{path}/") and folder} | ({path} & files.keys())
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise HubError(400, f"Unknown line in a commit: {line['key']}")
        if not header.get("summary"):
            raise HubError(400, "A commit needs a header with a summary")
        if "README.md" in files and files["README.md"] != head.files.get("README.md"):
            errors, _ = check_card(files["README.md"].data.decode())
            if errors:
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        return self.append(branch, files, header["summary"], header.get("description", ""), author)

    def append(self, branch: str, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        parent = self.branches.get(branch)
        tree = sorted((path, blob.git_oid) for path, blob in files.items())
        oid = hashlib.sha1(json.dumps([self.id, parent, title, message, tree, len(self.commits)]).encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        commit = Commit(oid, parent, title, message, author, date, dict(files))
        self.commits[oid] = commit
        self.branches[branch] = oid
        return commit


def card_data(readme: str) -> Any:
    """The YAML block at the top of a model card; `None` if there is none.

    Raises:
        yaml.YAMLError: The block is not YAML.
    """
    block = re.match(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", readme, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(block[1]) if block else None


def check_card(readme: str) -> tuple[list[str], list[str]]:
    """What the Hub refuses in the metadata of a model card, and what it warns of."""
    try:
        data = card_data(readme)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"the metadata must be a mapping, not {data!r}"], []
    errors = []
    try:
        ModelCardData(**data)  # parses `model-index`
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        errors.append(f"{type(error).__name__}: {error}")
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            validate_repo_id(base)
        except HFValidationError:
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from the Hub.')
    for name in ("tags", "datasets", "metrics", "language"):
        value = data.get(name) or []
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            errors.append(f'"{name}" must be a string or a list of strings, not {value!r}')
    return errors, []


def tree_entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as the tree and paths-info calls list it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return entry


def tree_folders(paths: Iterable[str]) -> list[dict[str, Any]]:
    """The folders above files, as the tree and paths-info calls list them."""
    folders = {path[: match.start()] for path in paths for match in re.finditer("/", path)}
    return [
        {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        for path in sorted(folders)
    ]
