"""The loopback Hub, seen by the real client: what is pushed can be loaded, and every fault can be injected."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationDelete, HfApi, constants, errors, snapshot_download
from loopback_hub import LoopbackHub
from loopback_hub_client import use_hub
from tiny import assert_same_weights, tiny_bert
from tiny_tokenizer import bert_tokenizer
from transformers import AutoModelForSequenceClassification, pipeline

CARD = "---\ntags:\n- tiny\npipeline_tag: text-classification\nlibrary_name: transformers\n---\n# Tiny\n"
LARGE = bytes(range(256)) * 1024
load = AutoModelForSequenceClassification.from_pretrained


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def waits(hub, monkeypatch):
    return use_hub(monkeypatch, hub, token=hub.token)


@pytest.fixture
def api(hub, waits):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """A small and a large file, and one in a folder."""
    (tmp_path / "files" / "student").mkdir(parents=True)
    (tmp_path / "files" / "config.json").write_text('{"a": 1}')
    (tmp_path / "files" / "weights.bin").write_bytes(LARGE)
    (tmp_path / "files" / "student" / "notes ä.txt").write_text("hello")
    return tmp_path / "files"


@pytest.fixture
def pushed(api, folder):
    api.create_repo("pair")
    api.upload_folder(repo_id="me/pair", folder_path=folder)
    return "me/pair"


def content(folder):
    """The files of a folder, as `LoopbackHub.files` gives those of a repository."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- Pushing and loading ----


def test_a_pushed_pair_is_loaded_from_its_repository_and_its_subfolder(hub, api, tmp_path):
    tokenizer = bert_tokenizer()
    teacher, student = (tiny_bert(layers, vocab_size=len(tokenizer)) for layers in (3, 2))
    teacher.save_pretrained(tmp_path / "out")
    student.save_pretrained(tmp_path / "out" / "student")
    tokenizer.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text(CARD)
    repo_id = api.create_repo("pair").repo_id
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path / "out")

    assert hub.files("me/pair") == content(tmp_path / "out")
    assert_same_weights(load("me/pair"), teacher)
    assert_same_weights(load("me/pair", subfolder="student"), student)
    classify = pipeline(model="me/pair")
    assert_same_weights(classify.model, teacher)
    assert set(classify("the cat sees paul .")[0]) == {"label", "score"}
    assert content(snapshot_download("me/pair")) == content(tmp_path / "out")


def test_large_files_go_to_the_storage_and_the_rest_into_one_commit(hub, pushed, folder):
    assert hub.files(pushed) == content(folder)
    assert [commit.title for commit in hub.commits(pushed)] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]
    assert [path for path, blob in hub.repos[pushed].resolve("main").files.items() if blob.lfs] == ["weights.bin"]
    assert len(hub.requests_like("^PUT /storage/me/pair/")) == 1
    assert {request.token for request in hub.requests if request.path.startswith("/storage")} == {None}
    assert {request.token for request in hub.requests if request.path.startswith("/api")} == {hub.token}


def test_only_what_has_changed_is_pushed_again(hub, pushed, api, folder):
    before, uploads = hub.commits(pushed), len(hub.requests_like("^PUT"))
    api.upload_folder(repo_id=pushed, folder_path=folder)
    assert hub.commits(pushed) == before

    (folder / "config.json").write_text("new")
    (folder / "weights.bin").rename(folder / "more.bin")
    api.upload_folder(repo_id=pushed, folder_path=folder, delete_patterns="*.bin")
    assert len(hub.requests_like("^PUT")) == uploads
    assert hub.files(pushed) == content(folder)


def test_files_and_folders_are_deleted(hub, pushed, api):
    operations = [CommitOperationDelete("student/"), CommitOperationDelete("config.json")]
    api.create_commit(pushed, operations, commit_message="less")
    assert set(hub.files(pushed)) == {"weights.bin"}
    with pytest.raises(errors.EntryNotFoundError):
        api.create_commit(pushed, [CommitOperationDelete("config.json")], commit_message="twice")


def test_large_files_can_be_uploaded_in_parts(monkeypatch, folder):
    with LoopbackHub(part_size=100_000) as hub:
        use_hub(monkeypatch, hub, token=hub.token)
        huggingface_hub.create_repo("pair")
        huggingface_hub.upload_folder(repo_id="me/pair", folder_path=folder)
        assert hub.files("me/pair") == content(folder)
        assert len(hub.requests_like("^PUT /storage")) == 3


def test_revisions_branches_and_tags_keep_what_they_point_at(hub, pushed, api, folder):
    first = hub.commits(pushed)[0].oid
    api.create_tag(pushed, tag="v1")
    api.create_branch(pushed, branch="try/this", revision="v1")
    old = content(folder)
    (folder / "config.json").write_text('{"a": 2}')
    api.upload_folder(repo_id=pushed, folder_path=folder, revision="try/this")

    for revision, files in {"main": old, "v1": old, first: old, "try/this": content(folder)}.items():
        assert content(snapshot_download(pushed, revision=revision)) == files
        assert api.model_info(pushed, revision=revision).sha == hub.commits(pushed, revision)[0].oid
    refs = api.list_repo_refs(pushed)
    assert {ref.name for ref in refs.branches} == {"main", "try/this"}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert [x.commit_id for x in api.list_repo_commits(pushed)] == [x.oid for x in hub.commits(pushed)]
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_tag(pushed, tag="v1")
    for call in (snapshot_download, api.model_info):
        with pytest.raises(errors.RevisionNotFoundError):
            call(pushed, revision="v2")


def test_trees_are_listed_as_they_are(hub, pushed, api):
    files = hub.files(pushed)
    listed = {entry.path: entry for entry in api.list_repo_tree(pushed, recursive=True)}
    assert listed.keys() == {*files, ".gitattributes", "student"}
    assert {path: listed[path].size for path in files} == {path: len(data) for path, data in files.items()}
    assert {path for path in files if listed[path].lfs} == {"weights.bin"}
    assert [entry.path for entry in api.list_repo_tree(pushed, "student")] == ["student/notes ä.txt"]
    top = {entry.path for entry in api.list_repo_tree(pushed)}
    assert top == {"config.json", "weights.bin", "student", ".gitattributes"}
    assert [entry.path for entry in api.get_paths_info(pushed, ["config.json", "none"])] == ["config.json"]
    assert [api.file_exists(pushed, name) for name in ("weights.bin", "none")] == [True, False]


# ---- Rights ----


def test_private_repositories_are_seen_by_their_owner_only(hub, waits, folder):
    stranger = HfApi(token=hub.add_token("hf_you", "you"))
    owner, nobody = HfApi(token=hub.token), HfApi(token=False)
    owner.create_repo("secret", private=True)
    owner.upload_folder(repo_id="me/secret", folder_path=folder)
    for api, status in ((stranger, 404), (nobody, 401)):
        for call in (api.model_info, api.snapshot_download, api.list_repo_files):
            with pytest.raises(errors.RepositoryNotFoundError) as error:
                call("me/secret")
            assert error.value.response.status_code == status
    assert content(owner.snapshot_download("me/secret")) == content(folder)
    owner.update_repo_settings("me/secret", private=False)
    assert nobody.model_info("me/secret").private is False


def test_a_private_model_is_pushed_and_loaded_with_a_token(hub, monkeypatch):
    use_hub(monkeypatch, hub)
    tiny_bert().push_to_hub("me/model", private=True, token=hub.token)
    with pytest.raises(OSError, match="me/model"):
        load("me/model")
    assert_same_weights(load("me/model", token=hub.token), tiny_bert())


def test_what_a_token_may_not_do_is_refused(hub, pushed, folder):
    hub.add_token("hf_read", "me", role="read")
    hub.add_token("hf_you", "you", orgs=("lab",))
    for token, status in (("hf_unknown", "401"), ("hf_read", "403"), ("hf_you", "403")):
        api = HfApi(token=token)
        for call, arguments in (
            (api.upload_folder, {"repo_id": pushed, "folder_path": folder}),
            (api.create_tag, {"repo_id": pushed, "tag": "v1"}),
            (api.create_repo, {"repo_id": "me/new"}),
        ):
            with pytest.raises(errors.HfHubHTTPError, match=status):
                call(**arguments)
    assert HfApi(token="hf_you").create_repo("lab/new").repo_id == "lab/new"
    assert HfApi(token="hf_read").model_info(pushed).sha == hub.commits(pushed)[0].oid
    assert HfApi(token="hf_you").whoami()["name"] == "you"
    assert (set(hub.repos), len(hub.commits(pushed))) == ({pushed, "lab/new"}, 2)


def test_a_repository_that_exists_is_not_created_again(hub, pushed, api):
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_repo(pushed)
    assert api.create_repo("pair", exist_ok=True).repo_id == pushed
    assert len(hub.commits(pushed)) == 2
    api.delete_repo(pushed)
    assert not api.repo_exists(pushed)


@pytest.mark.parametrize(
    "metadata", ["tags: [", "base_model: /home/me/model", "model-index:\n- name: x\n", "tags: {a: 1}", "- a"]
)
def test_a_card_with_bad_metadata_is_refused(metadata, hub, pushed, api):
    card = f"---\n{metadata}\n---\n".encode()
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(repo_id=pushed, path_or_fileobj=card, path_in_repo="README.md")
    assert "README.md" not in hub.files(pushed)


# ---- Faults ----


def test_a_stale_parent_is_a_conflict(hub, pushed, api):
    parent = hub.commits(pushed)[0].oid
    other = hub.commit(pushed, {"config.json": b"theirs"})
    push = {"repo_id": pushed, "path_or_fileobj": b"mine", "path_in_repo": "config.json"}
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as error:
        api.upload_file(**push, parent_commit=parent)
    assert error.value.response.status_code == 412
    assert hub.files(pushed)["config.json"] == b"theirs"
    api.upload_file(**push, parent_commit=other)
    assert hub.files(pushed)["config.json"] == b"mine"


@pytest.mark.parametrize(
    ("where", "fault", "expected"),
    [
        ("POST .*/preupload/", {"status": 503, "times": 2}, [1, 2]),
        ("POST .*/info/lfs/objects/batch", {"status": 500, "times": 2}, [1, 2]),
        ("PUT /storage", {"status": 429, "headers": {"Retry-After": "7"}}, [8]),  # the client adds a second
    ],
)
def test_the_client_rides_out_errors_of_the_server(where, fault, expected, hub, api, waits, folder):
    api.create_repo("pair")
    fault = hub.fail(where, **fault)
    api.upload_folder(repo_id="me/pair", folder_path=folder)
    assert (fault.left, waits) == (0, expected)
    assert hub.files("me/pair") == content(folder)


@pytest.mark.parametrize(
    ("where", "status", "times"),
    [
        ("POST .*/commit/", 500, 1),
        ("PUT /storage", 500, 6),
        ("POST .*/commit/", 409, 1),
        ("POST .*/preupload/", 403, 1),
    ],
)
def test_what_does_not_get_through_leaves_the_old_state(where, status, times, hub, pushed, api, folder):
    before = hub.files(pushed)
    (folder / "config.json").write_text("new")
    (folder / "weights.bin").write_bytes(LARGE[::-1])
    fault = hub.fail(where, status=status, times=times)
    with pytest.raises((errors.HfHubHTTPError, RuntimeError)):
        api.upload_folder(repo_id=pushed, folder_path=folder)
    assert (fault.left, hub.files(pushed)) == (0, before)
    api.upload_folder(repo_id=pushed, folder_path=folder)
    assert hub.files(pushed) == content(folder)


def test_an_upload_that_is_cut_in_the_middle_is_begun_again(hub, api, waits, folder):
    api.create_repo("pair")
    fault = hub.drop("PUT /storage", after_bytes=100_000, times=2)
    api.upload_folder(repo_id="me/pair", folder_path=folder)
    assert (fault.left, len(hub.requests_like("PUT /storage")), len(waits)) == (0, 3, 2)
    assert hub.files("me/pair") == content(folder)


@pytest.mark.parametrize("after_bytes", [0, 20, None])
def test_a_commit_is_made_unless_it_is_cut_in_the_middle(after_bytes, hub, pushed, api, folder):
    before = hub.files(pushed)
    (folder / "config.json").write_text("new")
    hub.drop("POST .*/commit/", after_bytes)
    with pytest.raises(Exception, match=r"(?i)disconnected|reset|broken pipe"):
        api.upload_folder(repo_id=pushed, folder_path=folder)
    assert hub.files(pushed) == (content(folder) if after_bytes is None else before)


def test_a_download_that_is_cut_in_the_middle_goes_on_where_it_was(hub, pushed, waits):
    fault = hub.drop("GET /storage", after_bytes=100_000)
    assert Path(huggingface_hub.hf_hub_download(pushed, "weights.bin")).read_bytes() == LARGE
    assert (fault.left, len(hub.requests_like("GET /storage")), waits) == (0, 2, [1])


def test_a_slow_download_times_out_and_is_tried_again(hub, pushed, monkeypatch):
    use_hub(monkeypatch, hub, timeout=1.0)
    fault = hub.delay("GET /storage", seconds=5)
    assert Path(huggingface_hub.hf_hub_download(pushed, "weights.bin")).read_bytes() == LARGE
    assert (fault.left, len(hub.requests_like("GET /storage"))) == (0, 2)


def test_a_hub_that_is_down_is_said_to_be_until_it_is_healed(hub, pushed, waits):
    hub.fail(".", status=502, times=1000)
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download(pushed)
    hub.heal()
    assert content(snapshot_download(pushed)) == hub.files(pushed)


def test_a_subprocess_has_its_own_hub_cache_and_token(hub, tmp_path):
    script = "import huggingface_hub as h; print(h.create_repo('new').repo_id, h.constants.HF_HUB_CACHE)"
    environment = hub.environment(token=hub.token, home=tmp_path / "home")
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["me/new", str(tmp_path / "home" / "hub")]
    assert set(hub.repos) == {"me/new"}
    hub.wait_for("POST /api/repos/create", seconds=0)
    with pytest.raises(TimeoutError, match="1 of 2 requests"):
        hub.wait_for("POST /api/repos/create", seconds=0.01, count=2)


def test_afterwards_everything_is_as_before(hub):
    def state():
        return vars(constants).copy(), huggingface_hub.hf_api.api.endpoint, dict(os.environ)

    before = state()
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_hub(monkeypatch, hub, token="hf_other")
        assert huggingface_hub.get_token() == "hf_other"
        with pytest.raises(errors.HfHubHTTPError):
            huggingface_hub.model_info("me/none")
        with pytest.raises(ConnectionRefusedError, match="Not loopback"):
            socket.create_connection(("192.0.2.1", 80), timeout=1)
    assert len(hub.requests) == 1
    assert state() == before
    assert huggingface_hub.is_offline_mode()
