"""What is sent to the Hub, by the real client to a Hub on this machine."""

import json
import logging as python_logging
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from huggingface_hub import snapshot_download
from loopback_hub import LoopbackHub
from loopback_hub_client import use_hub
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from tiny_tokenizer import bert_tokenizer
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, pipeline

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer import uploads as uploads_module

load = AutoModelForSequenceClassification.from_pretrained
COMMIT = r"POST /api/models/.*/commit/"
HUB = {"push_to_hub": True, "hub_model_id": "me/pair"}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def waits(hub, monkeypatch):
    monkeypatch.setattr(uploads_module, "_FIRST_WAIT", 0.0)
    return use_hub(monkeypatch, hub, token=hub.token)


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
    assert os.listdir(tmp_path).count("_push") == 0


def test_the_students_repository_can_be_named(hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "out", student_hub_model_id="me/small")
    trainer.push_to_hub()
    assert set(hub.repos) == {"me/out", "me/small"}
    assert_on_the_hub(trainer, "me/out", "me/small")


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
    options = {"save_strategy": "steps", "save_steps": 3, "dropout": 0.1}
    models = {"model": tiny_bert(3, seed=1, dropout=0.1), "student_model": tiny_bert(2, seed=2, dropout=0.1)}
    del options["dropout"]
    whole = tiny_trainer(tmp_path / "out", **models, **HUB, **options, hub_strategy="checkpoint", max_steps=5)
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
    assert any("has failed" in record.getMessage() for record in ours)
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
    hub.fail(COMMIT + r".*", times=2, **fault)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="checkpoint")
    trainer.train()
    assert_on_the_hub(trainer)
    assert json.loads(hub.files("me/pair")["last-checkpoint/trainer_state.json"])["global_step"] == 3


def test_a_connection_cut_in_a_large_file_leaves_the_old_state_and_is_made_up_for(hub, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, **HUB)
    trainer.push_to_hub()
    old = {repo: hub.files(repo) for repo in ("me/pair", "me/pair-student")}
    trainer.train()
    fault = hub.drop(r"PUT .*", after_bytes=1000, times=1000)
    with pytest.raises(ConnectionError, match=r"Not on the Hub: .*'me/pair'.*ctcd_trainer.push"):
        trainer.push_to_hub()
    assert {repo: hub.files(repo) for repo in old} == old
    assert fault.left < 1000
    hub.heal()
    again = uploads_module.UploadQueue(tmp_path)
    again.finish()
    assert_on_the_hub(trainer)
    assert not (tmp_path / "_push").exists()


def test_a_training_ends_although_the_hub_never_answers(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(uploads_module, "_SILENCE", 0.2)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="every_save")
    hub.delay(r"POST /api/.*", seconds=5, times=1000)
    start = time.monotonic()
    trainer.train()
    assert time.monotonic() - start < 20
    assert "Not on the Hub" in caplog.text
    assert f"python -m ctcd_trainer.push {tmp_path}" in caplog.text
    hub.heal()


def test_steps_do_not_wait_for_uploads(hub, tmp_path, monkeypatch):
    steps_are_over = threading.Event()
    upload = uploads_module.UploadQueue._upload

    def wait_and_upload(self, *args):
        assert steps_are_over.wait(60)
        return upload(self, *args)

    class Note(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            steps_are_over.set()

    monkeypatch.setattr(uploads_module.UploadQueue, "_upload", wait_and_upload)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="all_checkpoints", callbacks=[Note()])
    trainer.train()
    assert_on_the_hub(trainer)
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= hub.files("me/pair").keys()


def test_a_hub_that_cannot_be_reached_at_the_start_does_not_stop_a_training(hub, tmp_path, caplog):
    hub.fail(r"POST /api/repos/create", status=503, times=1)
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="every_save")
    assert "cannot be made now" in caplog.text
    trainer.train()
    assert_on_the_hub(trainer)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_without_rights_is_refused_before_any_work(status, hub, tmp_path):
    hub.fail(r"POST /api/repos/create", status=status, times=1)
    with pytest.raises(ValueError, match=r"(?s)hub_model_id='me/pair'.*hf auth login"):
        tiny_trainer(tmp_path, **HUB)


def test_what_is_missing_is_pushed_by_the_command(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="all_checkpoints", save_total_limit=1)
    hub.fail(COMMIT + ".*", status=500, times=1000)
    trainer.train()
    command = [sys.executable, "-m", "ctcd_trainer.push", str(tmp_path)]
    environment = hub.environment(token=hub.token, home=tmp_path / "home")
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert failed.returncode == 1
    assert "still missing" in failed.stderr
    hub.heal()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert "to 'me/pair/checkpoint-1'" in done.stdout
    assert_on_the_hub(trainer)
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= hub.files("me/pair").keys()
    assert not (tmp_path / "_push").exists()
    nothing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert "Nothing is left to upload" in nothing.stdout


def test_what_a_killed_training_had_still_to_push_is_pushed_by_the_next_one(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="all_checkpoints")
    hub.fail(COMMIT + ".*", status=500, times=1000)
    trainer.train()
    hub.heal()
    resumed = tiny_trainer(tmp_path, **HUB, **{**SAVING, "max_steps": 4}, hub_strategy="all_checkpoints")
    resumed.train(resume_from_checkpoint=True)
    assert_on_the_hub(resumed)
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3, 4)} <= hub.files("me/pair").keys()


def test_a_snapshot_is_removed_when_nothing_needs_it(hub, tmp_path):
    trainer = tiny_trainer(tmp_path, **HUB, **SAVING, hub_strategy="every_save")
    hub.fail(COMMIT + ".*", status=500, times=1000)
    trainer.train()
    folders = [path.name for path in (tmp_path / "_push").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert folders[0].startswith("checkpoint-3-")
