"""The queue of uploads alone, against a Hub on this machine: order, pauses, refusals, and what is kept on disk."""

import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import close_session, get_session, set_client_factory
from loopback_hub import LoopbackHub
from loopback_hub_client import use_hub

from ctcd_trainer.hub import errors as hub_errors
from ctcd_trainer.hub import upload_queue as uploads
from ctcd_trainer.hub.upload import Upload
from ctcd_trainer.hub.upload_queue import PUSH_FOLDER, UploadQueue

COMMIT = "POST /api/models/{}/commit/"


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def client(hub, monkeypatch):
    use_hub(monkeypatch, hub, token=hub.token)


@pytest.fixture
def queue(tmp_path):
    return UploadQueue(tmp_path)


def checkpoint(queue, step):
    """A checkpoint that holds its step."""
    folder = queue.output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "step.txt").write_text(str(step))
    return folder


def add(queue, step, *repos, **options):
    """Note a checkpoint for the roots of repositories."""
    return queue.add_folder(checkpoint(queue, step), [Upload(repo, ".", f"step {step}", **options) for repo in repos])


def pushed(hub, repo):
    """The steps that a repository was at, newest first."""
    return [int(commit.files["step.txt"].data) for commit in hub.commits(repo)[:-1]]


def tries(hub, repo):
    return len(hub.requests_like(COMMIT.format(repo)))


def noted(queue):
    path = queue.folder / "pending.json"
    return [(each["repo_id"], each["message"]) for each in json.loads(path.read_text())] if path.exists() else []


def kept(queue):
    return sorted(path.name.rpartition("-")[0] for path in queue.folder.iterdir() if path.is_dir())


# ---- When it is tried again ----


@pytest.mark.parametrize("before", [True, False])
def test_a_refusal_and_a_wish_to_wait_in_any_order_come_to_an_end(before, hub, queue, monkeypatch):
    monkeypatch.setattr(uploads, "_FIRST_WAIT", 0.0)
    wish, refusal = {"status": 429, "headers": {"Retry-After": "1"}, "times": 2}, {"status": 403, "times": 1}
    faults = [refusal, wish] if before else [wish, refusal]
    add(queue, 1, "me/a")
    hub.fail(COMMIT.format("me/a"), **faults[0])
    if before:
        queue.start(patiently=True).result()
        hub.fail(COMMIT.format("me/a"), **faults[1])
        queue.finish(timeout=30.0)
        assert pushed(hub, "me/a") == [1]
        return
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        hub.fail(COMMIT.format("me/a"), status=403, times=1000)

    monkeypatch.setattr(uploads.time, "sleep", sleep)
    monkeypatch.setattr(uploads.time, "monotonic", lambda: sum(slept) * 10.0)
    queue.finish()
    assert 0 < len(slept) < 5
    assert "403" in next(iter(queue.missing.values()))


def test_a_newer_state_takes_the_place_of_an_older_one_whose_repository_was_named_without_its_owner(hub, queue):
    add(queue, 1, "a")
    queue.name_in_full("a", "me/a")
    add(queue, 2, "me/a", revision="main")
    assert noted(queue) == [("me/a", "step 2")]
    queue.finish()
    assert pushed(hub, "me/a") == [2]


def test_a_repository_that_fails_is_left_alone_for_a_while_and_the_other_is_not(hub, queue):
    hub.fail(COMMIT.format("me/a"), times=1000)
    for step in (1, 2, 3):
        add(queue, step, "me/a", "me/b")
        queue.start(patiently=True).result()
    assert (tries(hub, "me/a"), pushed(hub, "me/b")) == (1, [3, 2, 1])
    assert noted(queue) == [("me/a", "step 3")]
    queue.finish()
    assert tries(hub, "me/a") == 2
    hub.heal()
    queue.finish()
    assert pushed(hub, "me/a") == [3]
    assert not queue.folder.exists()


def test_pauses_grow_with_each_failure(hub, queue, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now[0])
    hub.fail(COMMIT.format("me/a"), times=1000)
    add(queue, 1, "me/a")
    when = []
    while now[0] < 100:
        before = tries(hub, "me/a")
        queue.start(patiently=True).result()
        when += [now[0]] * (tries(hub, "me/a") - before)
        now[0] += 5
    assert when == [0, 10, 30, 70]


@pytest.mark.parametrize(
    "fault", [{"status": 401}, {"status": 403}, {"status": 404}, "bad name", "no folder"], ids=str
)
def test_what_waiting_does_not_mend_is_tried_once_and_again_at_the_end(fault, hub, queue, caplog, monkeypatch):
    monkeypatch.setattr(uploads, "_FIRST_WAIT", 0.0)
    repo = "me/a/b" if fault == "bad name" else "me/a"
    if isinstance(fault, dict):
        hub.fail(COMMIT.format("me/a"), times=1000, **fault)
    made = []
    make = Upload.make
    monkeypatch.setattr(Upload, "make", lambda upload, *args: made.append(upload.repo_id) or make(upload, *args))
    for step in (1, 2, 3):
        if fault != "no folder" or step == 1:
            added = add(queue, step, repo)
        if fault == "no folder":
            shutil.rmtree(queue.output_dir / added[0].folder, ignore_errors=True)
        add(queue, 10 + step, "me/other")
        queue.start(patiently=True).result()
    assert made.count(repo) == 1
    assert len([record for record in caplog.records if "at the end only" in record.getMessage()]) == 1
    assert pushed(hub, "me/other") == [13, 12, 11]
    queue.finish()
    assert made.count(repo) == 2
    last = 1 if fault == "no folder" else 3
    assert noted(queue) == [(repo, f"step {last}")]
    assert list(queue.missing.values()) != ["not tried yet"]

    hub.heal()
    if fault == "no folder":
        shutil.copytree(queue.output_dir / "checkpoint-1", queue.output_dir / added[0].folder)
    later = UploadQueue(queue.output_dir)
    later.finish()
    assert bool(later.missing) == (fault == "bad name")
    if fault != "bad name":
        assert pushed(hub, "me/a") == [last]


@pytest.mark.parametrize("status", [429, 503])
def test_at_the_end_it_waits_as_long_as_the_hub_asks(status, hub, queue, monkeypatch):
    monkeypatch.setattr(uploads, "_FIRST_WAIT", 0.0)
    hub.fail(COMMIT.format("me/a"), status=status, headers={"Retry-After": "1"}, times=2)
    add(queue, 1, "me/a")
    start = time.monotonic()
    queue.finish()
    assert 2 <= time.monotonic() - start < 10
    assert pushed(hub, "me/a") == [1]


def test_at_the_end_it_does_not_wait_longer_than_it_may(hub, queue, monkeypatch):
    hub.fail(COMMIT.format("me/a"), status=429, headers={"Retry-After": "5"}, times=1000)
    add(queue, 1, "me/a")
    start = time.monotonic()
    queue.finish(timeout=2)
    monkeypatch.setattr(uploads, "_PATIENCE", 2.0)
    queue.finish()
    assert time.monotonic() - start < 4
    assert [upload.message for upload in queue.missing] == ["step 1"]


def test_what_was_not_tried_says_so(queue):
    add(queue, 1, "me/a")
    assert list(queue.missing.values()) == ["not tried yet"]


# ---- What is uploaded ----


def test_a_newer_state_takes_the_place_of_one_that_waits_unless_each_is_wanted(hub, queue):
    for step in (1, 2, 3):
        add(queue, step, "me/newest")
        add(queue, 10 + step, "me/each", always=True)
    queue.finish()
    assert pushed(hub, "me/newest") == [3]
    assert pushed(hub, "me/each") == [13, 12, 11]


def test_a_state_that_has_failed_does_not_undo_a_newer_one(hub, queue):
    hub.fail(COMMIT.format("me/a"), times=1)
    add(queue, 1, "me/a", always=True)
    add(queue, 2, "me/a", always=True)
    queue.finish()
    queue.finish()
    assert pushed(hub, "me/a") == [2]
    assert not queue.missing


def test_a_pull_request_is_pushed_to_and_no_branch_is_made_for_it(hub, queue):
    repo = hub.create("me/a")
    repo.branches["refs/pr/1"] = repo.branches["main"]
    add(queue, 1, "me/a", revision="refs/pr/1")
    queue.finish()
    assert hub.files("me/a", "refs/pr/1") == {"step.txt": b"1"}
    assert not hub.files("me/a")
    assert not hub.requests_like("/branch/")


def test_a_card_of_others_is_spared_and_an_own_one_is_replaced(hub, queue):
    hub.create("me/a")
    for there, then in ((b"# By hand", b"# By hand"), (b"<!-- ctcd_trainer has written this -->", b"new")):
        hub.commit("me/a", {"README.md": there, "student/README.md": there})
        folder = queue.output_dir / "models"
        (folder / "student").mkdir(parents=True, exist_ok=True)
        for path in (folder, folder / "student"):
            (path / "README.md").write_text("new")
        queue.add_folder(folder, [Upload("me/a", ".", "all", spare_card=True)])
        queue.finish()
        assert hub.files("me/a") == {"README.md": then, "student/README.md": b"new"}


# ---- What is kept on the disk ----


def test_checkpoints_that_are_there_take_no_space_and_of_those_that_are_gone_only_the_newest_are_kept(
    hub, queue, caplog
):
    hub.fail(".", times=1000)
    folders = []
    for step in range(1, 9):
        add(queue, step, "me/a", always=True)
        queue.start(patiently=True).result()
        folders.append(queue.output_dir / f"checkpoint-{step}")
        if step > 2:  # as rotation with `save_total_limit=2` does
            shutil.rmtree(folders[step - 3])
    assert kept(queue) == [f"checkpoint-{step}" for step in (4, 5, 6, 7, 8)]
    alone = [path for path in queue.folder.rglob("step.txt") if path.stat().st_nlink == 1]
    assert sorted(path.read_text() for path in alone) == ["4", "5", "6"]
    dropped = [record.getMessage() for record in caplog.records if "Not pushed any more" in record.getMessage()]
    assert [f"checkpoint-{step}-" in text for step, text in enumerate(dropped, 1)] == [True] * 3
    hub.heal()
    queue.finish()
    assert pushed(hub, "me/a") == [8, 7, 6, 5, 4]


def test_models_that_may_change_are_copied_without_checkpoints_and_what_is_ours(hub, queue):
    folder = queue.output_dir
    for name in ("model", "student/_hidden", "student/checkpoint-9/a", "_partial/a", "checkpoint-1/a", "runs/log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    hub.fail(".", times=1)
    queue.add_folder(folder, [Upload("me/a", ".", "models")], live=True)
    with (folder / "model").open("r+") as file:  # as a save that is killed leaves it
        file.truncate(1)
    queue.finish()
    queue.finish()
    names = ("model", "student/_hidden", "student/checkpoint-9/a", "runs/log")
    assert hub.files("me/a") == dict.fromkeys(names, b"old")


def test_without_room_for_a_copy_nothing_is_noted_and_nothing_left(queue, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    folder = checkpoint(queue, 1)
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        queue.add_folder(folder, [Upload("me/a", ".", "1")])
    assert not queue.missing
    assert not (queue.output_dir / PUSH_FOLDER).exists()


# ---- The client ----


def test_the_limit_of_silence_outlives_the_session_of_the_client(queue):
    for _ in range(2):
        assert get_session().timeout.read == hub_errors._SILENCE
        close_session()


def test_a_limit_that_the_user_has_set_is_kept(queue, tmp_path):
    def client():
        client = huggingface_hub.utils._http.default_client_factory()
        client.timeout = 7.0
        return client

    set_client_factory(client)
    for _ in range(2):
        UploadQueue(tmp_path)
        assert get_session().timeout.read == 7.0


def test_an_unreadable_note_is_said_and_does_not_stop_anything(hub, tmp_path, caplog):
    (tmp_path / PUSH_FOLDER).mkdir()
    Path(tmp_path, PUSH_FOLDER, "pending.json").write_text("{")
    queue = UploadQueue(tmp_path)
    assert "cannot be read" in caplog.text
    add(queue, 1, "me/a")
    queue.finish()
    assert pushed(hub, "me/a") == [1]
