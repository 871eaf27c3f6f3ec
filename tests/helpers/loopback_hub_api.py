"""What the loopback Hub answers: the HTTP API that `huggingface_hub` speaks.

Everything is a function of a `Call` and the repositories; sockets and faults are in `loopback_hub.py`.
"""

from urllib.parse import parse_qs

import yaml
from loopback_hub_calls import Answer, Call, is_private, json_answer, repo_key, route
from loopback_hub_files import FileCalls
from loopback_hub_repos import HubError, Repository, card_data, tree_entry, tree_folders


class HubApi(FileCalls):
    """All calls: accounts, repositories, branches, tags and trees beside those of `FileCalls`."""

    # ---- Accounts and repositories ----

    @route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Answer:
        user = self.user(call, required=True)
        orgs = [{"type": "org", "name": name} for name in user.orgs]
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        return json_answer({"type": "user", "name": user.name, "orgs": orgs, "auth": access})

    @route("POST", "/api/repos/create")
    def create_repo(self, call: Call) -> Answer:
        namespace = call.json.get("organization") or self.user(call, required=True).name
        self.writer(call, namespace)
        kind, repo = f"{call.json.get('type') or 'model'}s", f"{namespace}/{call.json['name']}"
        key = repo_key(kind, repo)
        data = {"url": f"{self.endpoint}/{key}", "name": repo, "id": repo}
        if key in self.repos:
            return json_answer({"error": f"You already created this {kind[:-1]} repo: {repo}", **data}, 409)
        self.repos[key] = Repository(repo, namespace, is_private(call.json))
        return json_answer(data)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, call: Call) -> Answer:
        namespace = call.json.get("organization") or self.user(call, required=True).name
        kind, repo = f"{call.json.get('type') or 'model'}s", f"{namespace}/{call.json['name']}"
        self.repository(call, repo, kind, write=True)
        del self.repos[repo_key(kind, repo)]
        return json_answer({})

    @route("PUT", "/api/{kind}/{repo}/settings")
    def change_settings(self, call: Call, kind: str, repo: str) -> Answer:
        self.repository(call, repo, kind, write=True).private = is_private(call.json)
        return json_answer({"private": is_private(call.json)})

    @route("GET", "/api/{kind}/{repo}(?:/revision/{revision})?")
    def repo_info(self, call: Call, kind: str, repo: str, revision: str = "main") -> Answer:
        found = self.repository(call, repo, kind)
        commit = found.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in call.query:
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling |= {"size": len(blob.data), "blobId": blob.git_oid}
                if blob.lfs:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
        readme = commit.files.get("README.md")
        try:
            card = card_data(readme.data.decode()) if readme else None
        except yaml.YAMLError:
            card = None
        card = card if isinstance(card, dict) else {}
        known = {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
        return json_answer(
            {
                "id": repo,
                "modelId": repo,
                "author": found.owner,
                "sha": commit.oid,
                "private": found.private,
                "gated": False,
                "disabled": False,
                "lastModified": commit.date,
                "tags": card.get("tags") or [],
                "cardData": card,
                "siblings": siblings,
                **known,
            }
        )

    @route("GET", "/api/{kind}/{repo}/auth-check(?:/{name})?")
    def auth_check(self, call: Call, kind: str, repo: str, name: str = "") -> Answer:
        self.repository(call, repo, kind, write=name == "write")
        return json_answer({})

    # ---- Branches, tags, trees ----

    @route("GET", "/api/{kind}/{repo}/refs")
    def refs(self, call: Call, kind: str, repo: str) -> Answer:
        found = self.repository(call, repo, kind)
        refs = {
            key: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in targets.items()]
            for key, ref, targets in (("branches", "heads", found.branches), ("tags", "tags", found.tags))
        }
        return json_answer({**refs, "converts": [], "pullRequests": []})

    @route("GET", "/api/{kind}/{repo}/commits/{revision}")
    def list_commits(self, call: Call, kind: str, repo: str, revision: str) -> Answer:
        commits = self.repository(call, repo, kind).history(revision)
        return json_answer(
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in commits
            ]
        )

    @route("POST", "/api/{kind}/{repo}/branch/{name}")
    def create_branch(self, call: Call, kind: str, repo: str, name: str) -> Answer:
        found = self.repository(call, repo, kind, write=True)
        if name in found.branches:
            raise HubError(409, f"Reference already exists: {name}")
        found.branches[name] = found.resolve(call.json.get("startingPoint") or "main").oid
        return json_answer({})

    @route("POST", "/api/{kind}/{repo}/tag/{revision}")
    def create_tag(self, call: Call, kind: str, repo: str, revision: str) -> Answer:
        found = self.repository(call, repo, kind, write=True)
        name = call.json["tag"]
        if name in found.tags:
            raise HubError(409, f"Tag reference exists already: {name}")
        found.tags[name] = found.resolve(revision).oid
        return json_answer({})

    @route("DELETE", "/api/{kind}/{repo}/(?P<what>branch|tag)/{name}")
    def delete_ref(self, call: Call, kind: str, repo: str, what: str, name: str) -> Answer:
        found = self.repository(call, repo, kind, write=True)
        refs = found.tags if what == "tag" else found.branches
        if refs.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return json_answer({})

    @route("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?")
    def list_tree(self, call: Call, kind: str, repo: str, revision: str, path: str = "") -> Answer:
        files = self.repository(call, repo, kind).resolve(revision).files
        prefix = f"{path.strip('/')}/" if path else ""
        entries = [*tree_folders(files), *(tree_entry(name, blob) for name, blob in sorted(files.items()))]
        below = [entry for entry in entries if entry["path"].startswith(prefix)]
        if prefix and not below:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        if call.query.get("recursive", ["false"])[0].lower() != "true":
            below = [entry for entry in below if "/" not in entry["path"][len(prefix) :]]
        return json_answer(below)

    @route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
    def paths_info(self, call: Call, kind: str, repo: str, revision: str) -> Answer:
        files = self.repository(call, repo, kind).resolve(revision).files
        paths = parse_qs(call.body.decode()).get("paths", [])
        entries = [*tree_folders(files), *(tree_entry(name, blob) for name, blob in sorted(files.items()))]
        return json_answer([entry for entry in entries if entry["path"] in paths])
