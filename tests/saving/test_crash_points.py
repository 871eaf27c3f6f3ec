"""A process that ends before any one of its file operations leaves folders that are whole."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import assert_same_weights, tiny_rows, tiny_trainer, weights_of
from transformers.trainer_utils import get_last_checkpoint

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.saving.atomic_folders import PARTIAL, clean_up, put_in_place, remove


class Ended(BaseException):
    """The end of a process: nothing of ours may catch it and tidy up."""


class Operations:
    """Counts the operations on files, and ends the process before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.end_before: int | None = None
        for owner, name in ((Path, "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir")):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, operation: Callable) -> Callable:
        def counted(*args, **kwargs):
            if len(self.names) == self.end_before:
                raise Ended
            self.names.append(name)
            return operation(*args, **kwargs)

        return counted

    def run(self, action: Callable[[], object], end_before: int | None = None) -> bool:
        """Whether an action came to its end."""
        self.names, self.end_before = [], end_before
        try:
            action()
            return True
        except Ended:
            return False
        finally:
            self.end_before = None


@pytest.fixture
def operations(monkeypatch) -> Operations:
    return Operations(monkeypatch)


def write(folder: Path, text: str) -> None:
    """A folder of three files, one of them in a folder of its own."""
    (folder / "student").mkdir(parents=True)
    for name in ("a", "b", "student/c"):
        (folder / name).write_text(text)


def read(folder: Path) -> str:
    """What all files of the folder say."""
    texts = [(folder / name).read_text() for name in ("a", "b", "student/c")]
    assert len(set(texts)) == 1
    return texts[0]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, operations):
    def replace(folder: Path) -> None:
        write(folder / PARTIAL / "final", "new")
        put_in_place(folder / "final")

    write(tmp_path / "counted" / "final", "old")
    operations.run(lambda: replace(tmp_path / "counted"))
    found = set()
    for point in range(len(operations.names)):
        folder = tmp_path / str(point)
        write(folder / "final", "old")
        assert not operations.run(lambda at=folder: replace(at), end_before=point)
        clean_up(folder)
        found.add(read(folder / "final"))
        assert os.listdir(folder) == ["final"]
    assert found == {"old", "new"}


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path, operations):
    write(tmp_path / "counted" / "final", "old")
    operations.run(lambda: remove(tmp_path / "counted" / "final"))
    left = []
    for point in range(len(operations.names)):
        folder = tmp_path / str(point)
        write(folder / "final", "old")
        assert not operations.run(lambda at=folder: remove(at / "final"), end_before=point)
        there = (folder / "final").exists()  # before any cleaning up
        left.append(there)
        assert not there or read(folder / "final") == "old"
        clean_up(folder)
        assert os.listdir(folder) == ["final"] * there
    assert left == [True] + [False] * (len(left) - 1)


def trainer_of(folder: Path) -> CoDistillationTrainer:
    """A training that replaces the best student, and removes checkpoints while it goes on and at its end."""
    trainer = tiny_trainer(
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=tiny_rows(),
        metric_for_best_model="score",
        greater_is_better=True,
        load_best_model_at_end=True,
        save_total_limit=1,
        student_metric_for_best_model="score",
        student_greater_is_better=True,
    )
    evaluate = trainer.evaluate
    scores, student_scores = [0.5, 0.9, 0.1, 0.2], [0.1, 0.2, 0.1, 0.3]

    def scored(*args, **kwargs):
        step = trainer.state.global_step - 1
        return evaluate(*args, **kwargs) | {"eval_score": scores[step], "eval_student_score": student_scores[step]}

    trainer.evaluate = scored
    return trainer


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_that_ends_at_a_file_operation_resumes_to_the_same_models(every, tmp_path, operations):
    whole = trainer_of(tmp_path / "whole")
    assert operations.run(whole.train)
    assert sorted(os.listdir(tmp_path / "whole")) == ["best-student", "checkpoint-2"]
    files = {name: files_of(tmp_path / "whole" / name) for name in ("best-student", "checkpoint-2")}
    points = [point for point, name in enumerate(operations.names) if name == "rename"]
    points += [point for point in range(0, len(operations.names), 5) if every == 1]
    for point in points[::every]:
        folder = tmp_path / str(point)
        trainer = trainer_of(folder)
        assert not operations.run(trainer.train, end_before=point)
        for path in folder.glob("[!_]*"):
            assert files_of(path) >= files["best-student" if path.name == "best-student" else "checkpoint-2"]
            for weights in path.rglob("*.safetensors"):
                load_file(weights)
        resumed = trainer_of(folder)
        resumed.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
        assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "whole"))
        assert_same_weights(weights_of(resumed.pair), weights_of(whole.pair))
        assert (folder / "best-student" / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "best-student" / "model.safetensors"
        ).read_bytes()
