"""What is sent to the Hub, by the real client to a Hub on this machine."""

import json
import logging as python_logging
import os
import re
import runpy
import shutil
import sys
import threading
import time
import traceback

import pytest
import torch
from huggingface_hub import snapshot_download
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from tiny_tokenizer import bert_tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainerCallback, pipeline

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.hub import repositories, upload_queue
from ctcd_trainer.hub.upload_queue import Upload

load = AutoModelForSequenceClassification.from_pretrained
COMMIT = r"POST /api/models/.*/commit/"
HUB = {"push_to_hub": True, "hub_model_id": "me/pair"}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def snapshots(folder):
    return list(folder.glob("_push*"))


def assert_on_the_hub(trainer, pair="me/pair", student="me/pair-student", **options):
    assert_same_weights(load(pair, **options), trainer.teacher_model)
    assert_same_weights(load(pair, subfolder="student", **options), trainer.student_model)
    assert_same_weights(load(student, **options), trainer.student_model)


# ---- What arrives ----


def test_the_pair_and_the_student_alone_are_pushed_complete(hub, tmp_path):
    tokenizer = bert_tokenizer()
    models = {
        "model": tiny_bert(3, vocab_size=len(tokenizer)),
        "student_model": tiny_bert(2, vocab_size=len(tokenizer)),
    }
    trainer = tiny_trainer(tmp_path, **HUB, **models, hub_private_repo=True, processing_class=tokenizer)
    trainer.train()
    commit = trainer.push_to_hub("done", tags="mine")
    assert commit.oid == hub.commits("me/pair")[0].oid
    assert_on_the_hub(trainer)
    for repo in ("me/pair", "me/pair-student"):
        assert hub.repos[repo].private
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= hub.files(repo).keys()
        assert pipeline("text-classification", model=repo)("the cat sees the dog")
    assert not [path for path in hub.files("me/pair") if path.startswith(("_", "checkpoint-"))]
    assert not snapshots(tmp_path)


def test_names_without_an_owner_become_full_names_also_in_the_cards(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, push_to_hub=True, hub_model_id="pair", student_hub_model_id="small")
    trainer.push_to_hub()
    assert trainer.uploads.repositories == {"teacher": "me/pair", "student": "me/small"}
    assert "(https://huggingface.co/me/small)" in hub.files("me/pair")["README.md"].decode()
    assert "(https://huggingface.co/me/pair)" in hub.files("me/small")["README.md"].decode()


def test_models_cannot_share_a_repository(hub, tmp_path):
    with pytest.raises(ValueError, match="needs another repository"):
        tiny_trainer(tmp_path, push_to_hub=True, hub_model_id="pair", student_hub_model_id="me/pair")


def test_the_students_repository_can_be_named(hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "out", student_hub_model_id="me/small")
    trainer.push_to_hub()
    assert set(hub.repos) == {"me/out", "me/small"}
    assert_on_the_hub(trainer, "me/out", "me/small")


def test_weights_of_an_earlier_push_in_other_files_go(hub, tmp_path, monkeypatch):
    tiny_trainer(tmp_path / "one", **HUB).push_to_hub()
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel,
        "save_pretrained",
        lambda self, *args, **kw: save(self, *args, **{**kw, "max_shard_size": "9KB"}),
    )
    trainer = tiny_trainer(tmp_path / "two", **HUB, learning_rate=0.1)
    trainer.train()
    trainer.push_to_hub()
    assert "model.safetensors.index.json" in hub.files("me/pair")
    assert not {"model.safetensors", "student/model.safetensors"} & hub.files("me/pair").keys()
    assert_on_the_hub(trainer)


@pytest.mark.parametrize("called", [True, False])
def test_the_code_of_the_cards_loads_from_the_branch_that_they_are_on(called, hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB, **({} if called else {"hub_revision": "try"}))
    trainer.push_to_hub(**({"revision": "try"} if called else {}))
    for repo, model in (("me/pair", trainer.teacher_model), ("me/pair-student", trainer.student_model)):
        card = hub.files(repo, "try")["README.md"].decode()
        names = {}
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
        assert_same_weights(names["model"], model)


def test_a_revision_is_made_and_pushed_to(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB, hub_revision="try")
    trainer.push_to_hub()
    assert_on_the_hub(trainer, revision="try")
    assert not hub.files("me/pair")


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_every_strategy_pushes_both_models_while_training(strategy, hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "out", **HUB, **SAVING, hub_strategy=strategy, save_total_limit=1)
    trainer.train()
    assert os.listdir(tmp_path / "out") == ["checkpoint-3"]
    if strategy == "end":
        assert not hub.files("me/pair")
        return
    assert_on_the_hub(trainer)
    places = {path.split("/")[0] for path in hub.files("me/pair") if "checkpoint" in path}
    expected = {"every_save": set(), "checkpoint": {"last-checkpoint"}}.get(
        strategy, {f"checkpoint-{step}" for step in (1, 2, 3)}
    )
    assert places == expected
    assert "optimizer.pt" not in hub.files("me/pair")


def test_the_last_checkpoint_on_the_hub_resumes_both_models_on_another_machine(hub, tmp_path):
    options = {"hub_strategy": "checkpoint", "hub_always_push": True, "save_strategy": "steps", "save_steps": 3}
    models = {"model": tiny_bert(3, seed=1, dropout=0.1), "student_model": tiny_bert(2, seed=2, dropout=0.1)}
    whole = tiny_trainer(tmp_path / "out", **models, **HUB, **options, max_steps=5)
    whole.train()
    step_3 = next(commit for commit in hub.commits("me/pair") if "step 3, checkpoint" in commit.title)
    there = snapshot_download("me/pair", revision=step_3.oid, local_dir=tmp_path / "other machine")
    resumed = tiny_trainer(
        tmp_path / "resumed", model=tiny_bert(3, dropout=0.1), student_model=tiny_bert(2, dropout=0.1), max_steps=5
    )
    resumed.train(resume_from_checkpoint=os.path.join(there, "last-checkpoint"))
    assert_same_weights(resumed.pair, whole.pair)


def test_without_a_student_it_pushes_what_trainer_pushes(hub, tmp_path):
    for cls, name in ((Trainer, "plain"), (CoDistillationTrainer, "own")):
        args = tiny_args(
            tmp_path / name, distillation_mode="standalone", push_to_hub=True, save_strategy="steps", save_steps=5
        )
        trainer = cls(tiny_bert(), args, collate, tiny_rows())
        trainer.train()
        trainer.push_to_hub()
    assert hub.files("me/plain").keys() == hub.files("me/own").keys()
    assert set(hub.repos) == {"me/plain", "me/own"}


def test_a_token_is_neither_written_nor_logged(hub, tmp_path, caplog):
    token = hub.add_token("hf_secret" + "x" * 20, "me")
    hub.fail(COMMIT, status=500, times=2, message=f"no {token}")
    with caplog.at_level(python_logging.DEBUG):
        trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="checkpoint", hub_token=token)
        trainer.train()
        trainer.push_to_hub()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if token.encode() in path.read_bytes()]
    assert not [path for path, content in hub.files("me/pair").items() if token.encode() in content]
    ours = [record for record in caplog.records if record.name.startswith(("ctcd_trainer", "transformers"))]
    assert any("failed" in record.getMessage() for record in ours)
    assert not [record for record in ours if token in record.getMessage()]
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
    assert trainer.args.hub_token == token


# ---- What fails ----


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"status": 403},
        {"status": 412},
    ],
    ids=str,
)
def test_a_push_that_fails_is_made_at_a_later_save(fault, hub, tmp_path):
    hub.fail(COMMIT, times=2, **fault)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="checkpoint")
    trainer.train()
    assert_on_the_hub(trainer)
    assert json.loads(hub.files("me/pair")["last-checkpoint/trainer_state.json"])["global_step"] == 3


def test_a_connection_cut_in_a_push_leaves_the_old_state_and_is_made_up_for(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB)
    trainer.push_to_hub()
    old = {repo: hub.files(repo) for repo in ("me/pair", "me/pair-student")}
    trainer.train()
    hub.fail(COMMIT, status=None)
    with pytest.raises(ConnectionError, match=r"Not on the Hub: .*'me/pair'.*ctcd_trainer.push"):
        trainer.push_to_hub()
    assert {repo: hub.files(repo) for repo in old} == old
    assert snapshots(tmp_path)
    hub.heal()
    trainer.uploads.finish()
    assert_on_the_hub(trainer)
    assert not snapshots(tmp_path)


def test_a_training_ends_although_the_hub_never_answers(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(repositories, "_LONGEST_WAIT", 0.5)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="every_save")
    hub.delay(r"POST /api/.*", seconds=600)
    start = time.monotonic()
    trainer.train()
    assert time.monotonic() - start < 20
    assert "Not on the Hub" in caplog.text
    assert f"python -m ctcd_trainer.push {tmp_path}" in caplog.text
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "ctcd-uploads")


@pytest.mark.parametrize("always", [False, True])
def test_steps_do_not_wait_for_uploads_and_each_is_made_if_that_is_wanted(always, hub, tmp_path, monkeypatch):
    steps_are_over = threading.Event()
    make = Upload.make

    def wait_and_make(*args):
        assert steps_are_over.wait(60)
        return make(*args)

    class Note(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            steps_are_over.set()

    monkeypatch.setattr(Upload, "make", wait_and_make)
    options = {"hub_strategy": "all_checkpoints", "hub_always_push": always, "callbacks": [Note()]}
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, **options)
    trainer.train()
    assert_on_the_hub(trainer)
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= hub.files("me/pair").keys()
    states = [int(commit.title.split("step ")[1]) for commit in hub.commits("me/pair-student")[:-1]]
    assert states == ([3, 2, 1] if always else [3])


def test_a_hub_that_cannot_be_reached_at_the_start_does_not_stop_a_training(hub, tmp_path, caplog):
    hub.fail(r"POST /api/repos/create", status=503, times=1)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="every_save")
    assert "cannot be made now" in caplog.text
    trainer.train()
    assert_on_the_hub(trainer)


@pytest.mark.parametrize("argument", ["hub_model_id", "student_hub_model_id"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_token_without_rights_is_refused_before_any_work(status, argument, hub, tmp_path):
    if argument == "student_hub_model_id":
        hub.delay(r"POST /api/repos/create", seconds=0, times=1)  # the first repository is made
    hub.fail(r"POST /api/repos/create", status=status, message=f"no {hub.token}")
    with pytest.raises(ValueError, match=rf"(?s)`{argument}='me/pair.*no \*\*\*.*hf auth login") as error:
        tiny_trainer(tmp_path, **HUB)
    assert hub.token not in "".join(traceback.format_exception(error.value))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["hub_model_id", "student_hub_model_id"])
def test_a_repository_of_others_is_refused_before_any_work(argument, hub, tmp_path):
    hub.create("you/there")
    with pytest.raises(ValueError, match=f"`{argument}='you/there'`"):
        tiny_trainer(tmp_path, **{**HUB, argument: "you/there"})


def test_for_a_pull_request_no_right_to_write_is_needed(hub, tmp_path):
    for name in ("you/there", "you/there-student"):
        hub.create(name)
    options = {"hub_model_id": "you/there", "hub_revision": "refs/pr/1"}
    assert tiny_trainer(tmp_path, **{**HUB, **options}).hub_model_id == "you/there"


def test_a_bad_name_of_a_repository_is_refused_before_any_work(hub, tmp_path):
    with pytest.raises(ValueError, match="`student_hub_model_id='me/a/b'` is not a valid name of a repository"):
        tiny_trainer(tmp_path, **HUB, student_hub_model_id="me/a/b")


def test_without_blocking_a_push_returns_the_future_of_what_it_returns_otherwise(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB)
    future = trainer.push_to_hub(blocking=False)
    assert future.result(60).oid == hub.commits("me/pair")[0].oid
    assert_on_the_hub(trainer)
    trainer.train()
    hub.fail(COMMIT)
    with pytest.raises(ConnectionError, match="Not on the Hub"):
        trainer.push_to_hub(blocking=False).result(60)


@pytest.mark.parametrize("repo", ["me/pair", "me/pair-student"])
def test_a_card_that_somebody_has_written_stays_until_the_models_are_pushed_by_call(repo, hub, tmp_path):
    hub.create(repo)
    hub.commit(repo, {"README.md": b"# By hand"})
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="checkpoint")
    trainer.train()
    cards = {
        "me/pair": (tmp_path / "checkpoint-3" / "README.md").read_bytes(),
        "me/pair-student": (tmp_path / "checkpoint-3" / "student" / "README.md").read_bytes(),
    }
    assert {name: hub.files(name)["README.md"] for name in cards} == {**cards, repo: b"# By hand"}
    assert_on_the_hub(trainer)
    trainer.push_to_hub()
    assert hub.files(repo)["README.md"].startswith(b"---")


def test_a_card_that_cannot_be_written_does_not_stop_a_push_but_wrong_arguments_do(hub, tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, **HUB)
    with pytest.raises(ValueError, match="finetuned_from"):
        trainer.push_to_hub(finetuned_from={"nobody": "a"})
    with pytest.raises(TypeError, match="nothing"):
        trainer.push_to_hub(nothing=1)

    def fail(*args, **kwargs):
        raise ValueError("no card")

    monkeypatch.setattr(trainer, "create_model_card", fail)
    trainer.save_model()
    assert "no card" in caplog.text
    assert_on_the_hub(trainer)


def test_a_full_disk_stops_neither_training_nor_saving(hub, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upload_queue, "take_snapshot", fail)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="checkpoint")
    trainer.train()
    assert caplog.text.count("is not pushed: [Errno 28]") == 3
    trainer.save_model()
    assert "not completely pushed: [Errno 28]" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        trainer.push_to_hub()
    assert not hub.files("me/pair")


def test_a_snapshot_is_removed_when_nothing_needs_it(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="every_save")
    hub.fail(COMMIT)
    trainer.train()
    (left,) = snapshots(tmp_path)
    assert json.loads((left / "trainer_state.json").read_text())["global_step"] == 3
    hub.heal()
    trainer.uploads.finish()
    assert not snapshots(tmp_path)


# ---- `python -m ctcd_trainer.push` ----


def run_push(monkeypatch, capsys, *arguments):
    """The status and the output of `python -m ctcd_trainer.push ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["push", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("ctcd_trainer.push", run_name="__main__")
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_the_command_uploads_the_last_checkpoint_if_the_models_are_not_saved(
    strategy, hub, tmp_path, monkeypatch, capsys
):
    trainer = tiny_trainer(tmp_path / "out", **HUB, **SAVING, hub_strategy=strategy, save_total_limit=2)
    hub.fail(COMMIT)
    trainer.train()
    status, output = run_push(monkeypatch, capsys, tmp_path / "out")
    assert status == 1
    assert "'me/pair-student' failed: " in output.err
    hub.heal()
    shutil.move(tmp_path / "out", tmp_path / "moved")
    status, output = run_push(monkeypatch, capsys, tmp_path / "moved")
    assert status == 0
    assert "Uploaded 'Models of checkpoint-3' to 'me/pair-student'" in output.out
    assert_on_the_hub(trainer)
    assert "optimizer.pt" not in hub.files("me/pair")
    there = {path.split("/")[0] for path in hub.files("me/pair") if path.endswith("/optimizer.pt")}
    names = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-3"}}
    assert there == names.get(strategy, set())
    if strategy == "checkpoint":
        state = json.loads(hub.files("me/pair")["last-checkpoint/trainer_state.json"])
        assert state["global_step"] == 3


def test_the_command_uploads_the_saved_models(hub, tmp_path, monkeypatch, capsys):
    options = {"hub_token": hub.token, "student_hub_model_id": "me/small"}
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="end", **options)
    trainer.train()
    hub.fail(COMMIT)
    trainer.save_model()
    hub.heal()
    status, _ = run_push(monkeypatch, capsys, tmp_path, "--revision", "try", "--private")
    assert status == 0
    assert_on_the_hub(trainer, student="me/small", revision="try")
    assert not [path for path in hub.files("me/pair", "try") if path.startswith(("_", "checkpoint-"))]
    hub.repos.clear()
    run_push(monkeypatch, capsys, tmp_path, "--private")
    assert_on_the_hub(trainer, student="me/small")
    assert all(repo.private for repo in hub.repos.values())


def test_the_command_says_what_is_wrong(hub, tmp_path, monkeypatch, capsys):
    assert "There is no model in" in run_push(monkeypatch, capsys, tmp_path / "none")[0]
    tiny_bert().save_pretrained(tmp_path)
    assert f"hf upload REPOSITORY {tmp_path}" in run_push(monkeypatch, capsys, tmp_path)[0]
    tiny_trainer(tmp_path, hub_model_id="you/pair").save_model()
    assert "does not let you write to `hub_model_id='you/pair'`" in run_push(monkeypatch, capsys, tmp_path)[0]
    status, output = run_push(monkeypatch, capsys, "--help")
    assert status == 0
    assert "hf auth login" in output.out
