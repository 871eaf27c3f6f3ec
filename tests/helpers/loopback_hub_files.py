"""Uploads to and downloads from the loopback Hub, and the storage of large files behind it."""

import base64
import json
import re
import secrets
from collections.abc import Mapping
from urllib.parse import quote

from loopback_hub_calls import Answer, Call, HubCalls, json_answer, repo_key, route
from loopback_hub_repos import Blob, HubError, Repository, check_card


class FileCalls(HubCalls):
    """Calls that carry the content of files."""

    def __init__(self) -> None:
        super().__init__()
        self.part_size: int | None = None
        self._signature = secrets.token_hex(8)
        self._parts: dict[tuple[str, str, int], bytes] = {}

    # ---- Uploads ----

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Answer:
        found = [[{"message": text} for text in texts] for texts in check_card(call.json["content"])]
        return json_answer({"errors": found[0], "warnings": found[1]}, 400 if found[0] else 200)

    @route("POST", "/api/{kind}/{repo}/preupload/{revision}")
    def preupload(self, call: Call, kind: str, repo: str, revision: str) -> Answer:
        found = self.repository(call, repo, kind, write=True)
        present = found.resolve(revision).files
        files = [
            {
                "path": file["path"],
                "uploadMode": found.upload_mode(file["path"], base64.b64decode(file["sample"]), file["size"]),
                "shouldIgnore": False,
                "oid": present[file["path"]].etag if file["path"] in present else None,
            }
            for file in call.json["files"]
        ]
        return json_answer({"files": files, "commitOid": found.resolve(revision).oid})

    @route("POST", "/api/{kind}/{repo}/commit/{revision}")
    def commit(self, call: Call, kind: str, repo: str, revision: str) -> Answer:
        found = self.repository(call, repo, kind, write=True)
        if "create_pr" in call.query:
            raise HubError(400, "The loopback Hub has no pull requests")
        lines = [json.loads(line) for line in call.body.splitlines()]
        commit = found.commit(revision, lines, self.user(call).name)
        url = f"{self.endpoint}/{repo_key(kind, repo)}/commit/{commit.oid}"
        return json_answer({"success": True, "commitUrl": url, "commitOid": commit.oid, "hookOutput": ""})

    @route("POST", "/{prefix}{repo}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, call: Call, repo: str, kind: str = "models") -> Answer:
        found = self.repository(call, repo, kind, write=True)
        transfer, objects = "basic", []
        for wanted in call.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size, "authenticated": True}
            if oid not in found.lfs:
                upload = {"href": self._signed("store", kind, repo, oid), "header": {}}
                if self.part_size is not None and size > self.part_size:
                    transfer, count = "multipart", -(-size // self.part_size)
                    parts = {f"{n:05d}": f"{upload['href']}&part={n}" for n in range(1, count + 1)}
                    complete = f"{self.endpoint}/api/complete-multipart/{repo_key(kind, repo)}/{oid}"
                    upload = {"href": complete, "header": {"chunk_size": str(self.part_size), **parts}}
                verify = {"href": f"{self.endpoint}/{repo_key(kind, repo)}.git/info/lfs/objects/verify", "header": {}}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return json_answer({"transfer": transfer, "objects": objects})

    @route("POST", "/{prefix}{repo}\\.git/info/lfs/objects/verify")
    def lfs_verify(self, call: Call, repo: str, kind: str = "models") -> Answer:
        data = self.repository(call, repo, kind, write=True).lfs.get(call.json["oid"])
        if data is None or len(data) != call.json["size"]:
            raise HubError(404, f"The large file {call.json['oid']} has not arrived")
        return json_answer({})

    @route("POST", "/api/complete-multipart/{prefix}{repo}/{name}")
    def complete_parts(self, call: Call, repo: str, name: str, kind: str = "models") -> Answer:
        # As on the real Hub, nobody is asked for a token here: the client sends none.
        key = repo_key(kind, repo)
        parts = [self._parts.get((key, name, part["partNumber"]), b"") for part in call.json["parts"]]
        return self._keep(self.repos[key], name, b"".join(parts))

    @route("PUT", "/storage/{prefix}{repo}/{name}")
    def store(self, call: Call, repo: str, name: str, kind: str = "models") -> Answer:
        self._check_signature(call)
        key = repo_key(kind, repo)
        if "part" in call.query:
            self._parts[key, name, int(call.query["part"][0])] = call.body
            return Answer(headers={"ETag": f'"{Blob(call.body).git_oid}"'})
        return self._keep(self.repos[key], name, call.body)

    def _keep(self, repository: Repository, oid: str, data: bytes) -> Answer:
        if Blob(data).sha256 != oid:
            raise HubError(400, f"The upload is not the file {oid}: {len(data)} bytes")
        repository.lfs[oid] = data
        return json_answer({"success": True}, headers={"ETag": f'"{oid}"'})

    # ---- Downloads ----

    @route("GET", "/{prefix}{repo}/resolve/{revision}/{path}")
    def resolve(self, call: Call, repo: str, revision: str, path: str, kind: str = "models") -> Answer:
        commit = self.repository(call, repo, kind).resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        if not blob.lfs:
            return ranged(call, blob.data, {**headers, "ETag": f'"{blob.etag}"'})
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        return Answer(status=302, headers={**headers, "Location": self._signed("fetch", kind, repo, blob.etag)})

    @route("GET", "/storage/{prefix}{repo}/{name}")
    def fetch(self, call: Call, repo: str, name: str, kind: str = "models") -> Answer:
        self._check_signature(call)
        return ranged(call, self.repos[repo_key(kind, repo)].lfs[name], {"ETag": f'"{name}"'})

    def _signed(self, what: str, kind: str, repo: str, oid: str) -> str:
        return f"{self.storage}/storage/{quote(repo_key(kind, repo))}/{oid}?signature={what}-{self._signature}"

    def _check_signature(self, call: Call) -> None:
        # Storage behind the real Hub refuses a token beside a signature, so that a client that leaks it is found.
        if call.token is not None:
            raise HubError(400, "Only one auth mechanism allowed")
        what = "store" if call.method == "PUT" else "fetch"
        if call.query.get("signature") != [f"{what}-{self._signature}"]:
            raise HubError(403, "The signature does not match")


def ranged(call: Call, data: bytes, headers: Mapping[str, str]) -> Answer:
    """The bytes that a `Range` header asks for, or all."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", "").strip())
    if match is None or match[0] == "bytes=-":
        return Answer(data, headers=headers)
    start = int(match[1]) if match[1] else max(len(data) - int(match[2]), 0)
    stop = min(int(match[2]) + 1, len(data)) if match[1] and match[2] else len(data)
    if start >= len(data):
        return Answer(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})
