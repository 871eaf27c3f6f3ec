"""What is sent to the Hub, with a client that writes the uploads into folders instead."""

import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from transformers import AutoModelForSequenceClassification, Trainer

from ctcd_trainer import CoDistillationTrainer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Repositories as folders; the names of created repositories and their visibility are recorded."""
    repos = tmp_path / "hub"
    created = {}

    def create_repo(self, repo_id, *, token=None, private=None, exist_ok=False, **kwargs):
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        created[repo_id] = (private, token)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self,
        *,
        repo_id,
        folder_path,
        path_in_repo="",
        ignore_patterns=None,
        run_as_future=False,
        commit_message=None,
        token=None,
        revision=None,
    ):
        assert repo_id in created
        ignore = shutil.ignore_patterns(*(ignore_patterns or ()))
        shutil.copytree(folder_path, repos / repo_id / (path_in_repo or ""), dirs_exist_ok=True, ignore=ignore)
        job = Future()
        job.set_result(commit_message)
        return job if run_as_future else commit_message

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return SimpleNamespace(repos=repos, created=created)


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_pair_and_the_student_alone_are_pushed_with_their_cards(hub, tmp_path):
    trainer = tiny_trainer(
        tmp_path / "out", push_to_hub=True, hub_model_id="me/pair", hub_token="secret", hub_private_repo=True
    )
    trainer.train()
    assert trainer.push_to_hub("done", tags="mine") == "done"
    assert hub.created == {"me/pair": (True, "secret"), "me/pair-student": (True, "secret")}
    assert_same_weights(load(hub.repos / "me/pair"), trainer.teacher_model)
    assert_same_weights(load(hub.repos / "me/pair/student"), trainer.student_model)
    assert_same_weights(load(hub.repos / "me/pair-student"), trainer.student_model)
    assert "# pair-student\n" in (hub.repos / "me/pair-student/README.md").read_text()
    assert "secret" not in (hub.repos / "me/pair-student/README.md").read_text()


def test_the_students_repository_can_be_named(hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "out", student_hub_model_id="org/small")
    trainer.push_to_hub()
    assert set(hub.created) == {"me/out", "org/small"}
    assert_same_weights(load(hub.repos / "org/small"), trainer.student_model)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_every_strategy_pushes_both_models_while_training(strategy, hub, tmp_path):
    trainer = tiny_trainer(
        tmp_path / "out",
        push_to_hub=True,
        hub_model_id="me/pair",
        hub_strategy=strategy,
        save_strategy="steps",
        save_steps=5,
    )
    trainer.train()
    if strategy == "end":
        assert not hub.repos.exists()
        return
    assert_same_weights(load(hub.repos / "me/pair/student"), trainer.student_model)
    assert_same_weights(load(hub.repos / "me/pair-student"), trainer.student_model)
    checkpoints = {"every_save": [], "checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-5"]}[strategy]
    assert sorted(p.name for p in (hub.repos / "me/pair").glob("*checkpoint*")) == checkpoints
    for name in checkpoints:
        resumed = tiny_trainer(tmp_path / "resumed", max_steps=5)
        resumed.train(resume_from_checkpoint=str(hub.repos / "me/pair" / name))
        assert_same_weights(resumed.student_model, trainer.student_model)


def test_without_a_student_it_pushes_what_trainer_pushes(hub, tmp_path):
    for cls, name in ((Trainer, "plain"), (CoDistillationTrainer, "own")):
        args = tiny_args(
            tmp_path / name, distillation_mode="standalone", push_to_hub=True, save_strategy="steps", save_steps=5
        )
        trainer = cls(tiny_bert(), args, collate, tiny_rows())
        trainer.train()
        trainer.push_to_hub()
    files = [sorted(p.name for p in (hub.repos / "me" / name).rglob("*")) for name in ("plain", "own")]
    assert files[0] == files[1]
    assert set(hub.created) == {"me/plain", "me/own"}
