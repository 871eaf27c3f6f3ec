"""The uploads without a trainer, to a Hub on this machine: order, second tries, and what is on the disk."""

import os
import shutil
import time
from types import SimpleNamespace

import pytest

from ctcd_trainer.hub import repositories
from ctcd_trainer.hub.repositories import PairUploads
from ctcd_trainer.hub.upload_queue import Repository, Upload, UploadQueue, take_snapshot

COMMIT = "POST /api/models/{}/commit/"


class Queue(UploadQueue):
    """A queue to which checkpoints that hold their step are added for the roots of repositories."""

    def __init__(self, output_dir):
        super().__init__(output_dir)
        self.repositories = {}

    def checkpoint(self, step):
        folder = self.output_dir / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "step.txt").write_text(str(step))
        return folder

    def finish(self):
        self.start().result(60)

    def add_step(self, step, *repos, **options):
        found = [self.repositories.setdefault(repo, Repository(repo)) for repo in repos]
        self.add(self.checkpoint(step), [Upload(repo, ".", f"step {step}", **options) for repo in found])


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path)


def pushed(hub, repo):
    """The steps that a repository was at, newest first."""
    return [int(commit.files["step.txt"]) for commit in hub.commits(repo)[:-1]]


def snapshots(queue):
    return sorted(path for path in queue.output_dir.glob("_push*"))


def waiting(queue):
    return [(upload.repository.name, upload.message) for upload in queue.pending]


# ---- When it is tried again ----


@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 429}, {"status": 500}, {"status": None}], ids=str)
def test_what_fails_is_tried_again_at_the_next_save_and_at_the_end_and_others_go_on(fault, hub, queue, caplog):
    hub.fail(COMMIT.format("me/a"), **fault)
    for step in (1, 2):
        queue.add_step(step, "me/a", "me/b")
        queue.start().result(60)
        assert waiting(queue) == [("me/a", f"step {step}")]
    assert caplog.text.count("Uploading 'step") == len(hub.requests_like(COMMIT.format("me/a"))) == 2
    assert pushed(hub, "me/b") == [2, 1]
    hub.heal()
    queue.finish()
    assert pushed(hub, "me/a") == [2]
    assert not queue.pending
    assert not snapshots(queue)


def test_a_last_round_follows_the_one_that_is_running(hub, queue):
    hub.delay(COMMIT.format("me/a"), seconds=0.5, times=1)
    hub.fail(COMMIT.format("me/b"), times=1)
    queue.add_step(1, "me/b", "me/a")
    running = queue.start()
    while not hub.requests_like(COMMIT.format("me/a")):
        time.sleep(0.01)
    assert not running.done()
    queue.finish()
    assert pushed(hub, "me/b") == pushed(hub, "me/a") == [1]


def test_saves_that_are_faster_than_the_hub_queue_one_round(hub, queue):
    hub.delay(COMMIT.format("me/a"), seconds=0.5, times=1)
    queue.add_step(1, "me/a")
    queue.start()
    while not hub.requests_like(COMMIT.format("me/a")):
        time.sleep(0.01)
    rounds = set()
    for step in range(2, 6):
        queue.add_step(step, "me/a")
        rounds.add(queue.start())
    assert len(rounds) == 1
    queue.finish()
    assert pushed(hub, "me/a") == [5, 1]


def uploads_of(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "hub_model_id": "pair",
        "hub_strategy": "every_save",
        "hub_token": None,
        "hub_revision": None,
        "hub_private_repo": None,
        "hub_always_push": False,
        "ddp_timeout": 1800,
        "world_size": 1,
    }
    return PairUploads(SimpleNamespace(**{**defaults, **options}), {"base": ".", "small": "small", "tiny": "tiny"})


@pytest.mark.parametrize("options", [{"world_size": 2, "ddp_timeout": 1}, {}], ids=str)
def test_the_end_waits_no_longer_than_other_processes_do(options, hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(repositories, "_LONGEST_WAIT", 3600.0 if options else 0.5)
    for name in ("small", "tiny"):
        (tmp_path / "checkpoint-1" / name).mkdir(parents=True)
        (tmp_path / "checkpoint-1" / name / "config.json").write_text("{}")
    uploads = uploads_of(tmp_path, **options)
    uploads.make_repositories()
    hub.delay(COMMIT.format(".*"), seconds=600)
    uploads.push_checkpoint(str(tmp_path / "checkpoint-1"), 1)
    start = time.monotonic()
    uploads.finish()
    assert 0.4 < time.monotonic() - start < 5
    assert f"Upload what is in the output folder with `python -m ctcd_trainer.push {tmp_path}`" in caplog.text
    assert len(uploads.missing) == 3


# ---- What is uploaded, and where ----


def test_each_further_learner_has_a_repository_that_names_it(hub, tmp_path):
    uploads = uploads_of(tmp_path, tiny_hub_model_id="least", world_size=2)
    assert uploads.make_repositories(private=True) == "me/pair"
    assert uploads.repositories == {"base": "me/pair", "small": "me/pair-small", "tiny": "me/least"}
    for name in ("base", "small", "tiny"):
        folder = tmp_path / uploads.folders[name]
        folder.mkdir(exist_ok=True)
        (folder / "name.txt").write_text(name)
    uploads.push(str(tmp_path), "all")
    assert hub.files("me/pair") == {"name.txt": b"base", "small/name.txt": b"small", "tiny/name.txt": b"tiny"}
    assert hub.files("me/pair-small") == {"name.txt": b"small"}
    assert hub.files("me/least") == {"name.txt": b"tiny"}
    assert all(repo.private for repo in hub.repos.values())


def test_a_newer_state_replaces_an_older_one_whose_repository_was_not_reached(hub, tmp_path):
    hub.fail("create")
    uploads = uploads_of(tmp_path)
    assert uploads.make_repositories() == "pair"
    for step in (1, 2):
        for name in ("small", "tiny"):
            (tmp_path / f"checkpoint-{step}" / name).mkdir(parents=True)
            (tmp_path / f"checkpoint-{step}" / name / "step.txt").write_text(str(step))
        uploads.push_checkpoint(str(tmp_path / f"checkpoint-{step}"), step)
        uploads.queue.start().result(60)
        hub.heal()
    assert uploads.repositories == {"base": "me/pair", "small": "me/pair-small", "tiny": "me/pair-tiny"}
    assert pushed(hub, "me/pair-small") == [2]


def test_other_processes_upload_nothing(hub, tmp_path):
    uploads = uploads_of(tmp_path)
    uploads.is_main_process = False
    assert uploads.make_repositories() is None
    assert uploads.push(str(tmp_path), "all") is None
    uploads.push_checkpoint(str(tmp_path), 1)
    uploads.finish()
    assert not hub.requests


def test_a_newer_state_takes_the_place_of_one_that_waits_unless_each_is_wanted(hub, queue):
    for step in (1, 2, 3):
        queue.add_step(step, "me/newest")
        queue.add_step(10 + step, "me/each", always=True)
    queue.finish()
    assert pushed(hub, "me/newest") == [3]
    assert pushed(hub, "me/each") == [13, 12, 11]


def test_a_state_that_has_failed_does_not_undo_a_newer_one(hub, queue):
    hub.fail(COMMIT.format("me/a"), times=1)
    queue.add_step(1, "me/a", always=True)
    queue.add_step(2, "me/a", always=True)
    queue.finish()
    queue.finish()
    assert pushed(hub, "me/a") == [2]
    assert not queue.pending


def test_a_pull_request_is_pushed_to_and_no_branch_is_made_for_it(hub, queue):
    repo = hub.create("me/a")
    repo.branches["refs/pr/1"] = list(repo.branches["main"])
    queue.add_step(1, "me/a", revision="refs/pr/1")
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
        queue.add(folder, [Upload(Repository("me/a"), ".", "all", keep_card=True)])
        queue.finish()
        assert hub.files("me/a") == {"README.md": then, "student/README.md": b"new"}


# ---- What is kept on the disk ----


def test_checkpoints_that_are_there_take_no_space_and_of_those_that_are_gone_only_the_newest_are_kept(
    hub, queue, caplog
):
    hub.fail(".")
    for step in range(1, 9):
        queue.add_step(step, "me/a", always=True)
        queue.start().result(60)
        if step > 2:  # as rotation with `save_total_limit=2` does
            shutil.rmtree(queue.output_dir / f"checkpoint-{step - 2}")
    assert [text for _, text in waiting(queue)] == [f"step {step}" for step in (4, 5, 6, 7, 8)]
    kept = [path / "step.txt" for path in snapshots(queue)]
    assert sorted(path.read_text() for path in kept if path.stat().st_nlink == 1) == ["4", "5", "6"]
    dropped = [record.getMessage() for record in caplog.records if "No longer pushed" in record.getMessage()]
    assert [f"'step {step}'" in text for step, text in enumerate(dropped, 1)] == [True] * 3
    hub.heal()
    queue.finish()
    assert pushed(hub, "me/a") == [8, 7, 6, 5, 4]


def test_models_that_may_change_are_copied_without_checkpoints_and_what_is_ours(hub, queue):
    folder = queue.output_dir
    for name in ("model", "student/_hidden", "student/checkpoint-9/a", "_partial/a", "checkpoint-1/a", "runs/log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    hub.fail(".", times=1)
    queue.add(folder, [Upload(Repository("me/a"), ".", "models")], live=True)
    with (folder / "model").open("r+") as file:  # as a save that is killed leaves it
        file.truncate(1)
    queue.finish()
    queue.finish()
    names = ("model", "student/_hidden", "student/checkpoint-9/a", "runs/log")
    assert hub.files("me/a") == dict.fromkeys(names, b"old")


@pytest.mark.parametrize("disk", ["full", "without links"])
def test_without_links_files_are_copied_and_without_room_nothing_is_queued_and_nothing_left(
    disk, hub, queue, monkeypatch
):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    if disk == "full":
        monkeypatch.setattr(shutil, "copy2", full)
        with pytest.raises(OSError, match="No space left"):
            queue.add_step(1, "me/a")
        assert not queue.pending
        assert not snapshots(queue)
    else:
        queue.add_step(1, "me/a")
        queue.finish()
        assert pushed(hub, "me/a") == [1]


def test_snapshots_of_a_killed_process_are_deleted_and_those_of_this_process_are_not(hub, queue):
    hub.fail(".")
    queue.add_step(1, "me/a")
    killed = queue.output_dir / "_push-0-1"
    killed.mkdir()
    other = Queue(queue.output_dir)
    other.add_step(2, "me/a")
    assert not killed.exists()
    assert len(snapshots(queue)) == 2
    left = take_snapshot(queue.output_dir / "checkpoint-1", queue.output_dir, live=False)
    assert len(snapshots(queue)) == 3
    del left  # as at the end of the process
    assert len(snapshots(queue)) == 2
