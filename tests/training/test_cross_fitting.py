"""`cross_fit`: each row gets the prediction of a teacher that has not seen it, also after a kill."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_args, tiny_bert, tiny_rows
from transformers import Trainer, TrainerCallback

from ctcd_trainer import cross_fit
from ctcd_trainer.tasks.labels import TARGETS

ROWS = [row | {"text": index // 2} for index, row in enumerate(tiny_rows(20))]


class Kill(TrainerCallback):
    """Ends the training at a step as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Maker:
    """Makes the trainers of the folds, and keeps the rows that each was given, by the name of its folder."""

    def __init__(self, kill_at=None, problem="single_label"):
        self.kill_at, self.problem, self.rows = kill_at, problem, {}

    def __call__(self, rows, output_dir):
        name = output_dir.rpartition("/")[2]
        self.rows[name] = rows
        args = tiny_args(output_dir, save_strategy="steps", save_steps=2, max_steps=4)
        callbacks = [Kill(3)] if name == self.kill_at else None
        model = tiny_bert(1, seed=1, problem=self.problem)
        return Trainer(model, args, train_dataset=rows, callbacks=callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The column without an interruption, the maker, and the folder."""
    make, folder = Maker(), tmp_path_factory.mktemp("whole")
    return cross_fit(make, Dataset.from_list(ROWS), 3, output_dir=folder, seed=7), make, folder


def ids_of(rows):
    return {tuple(ids) for ids in rows["input_ids"]}


def test_each_row_is_predicted_by_the_teacher_that_has_not_seen_it(whole):
    found, make, folder = whole
    assert found.remove_columns(TARGETS)[:] == Dataset.from_list(ROWS)[:]
    assert len(make.rows) == 3
    unseen = 0
    for name, rows in make.rows.items():
        held_out = [index for index, row in enumerate(ROWS) if tuple(row["input_ids"]) not in ids_of(rows)]
        assert len(held_out) in (6, 7)
        unseen += len(held_out)
        trainer = Trainer(tiny_bert(1, seed=1), tiny_args(folder / "again", max_steps=4), train_dataset=rows)
        trainer.train()
        expected = trainer.predict(Dataset.from_list(ROWS).select(held_out)).predictions
        np.testing.assert_array_equal(np.float32([found[index][TARGETS] for index in held_out]), expected)
        assert name in {"fold-1", "fold-2", "fold-3"}
    assert unseen == len(ROWS)


def test_after_a_kill_finished_folds_are_read_and_the_cut_one_goes_on(whole, tmp_path):
    rows = Dataset.from_list(ROWS)
    with pytest.raises(KeyboardInterrupt):
        cross_fit(Maker(kill_at="fold-2"), rows, 3, output_dir=tmp_path, seed=7)
    assert (tmp_path / "fold-2" / "checkpoint-2").is_dir()
    make, steps = Maker(), []
    make_trainer = lambda rows, output_dir: _watched(make(rows, output_dir), steps)  # noqa: E731
    found = cross_fit(make_trainer, rows, 3, output_dir=tmp_path, seed=7)
    assert list(make.rows) == ["fold-2", "fold-3"]
    assert steps == [2, 0], "the second fold goes on at its checkpoint"
    assert found[TARGETS] == whole[0][TARGETS]
    assert cross_fit(None, rows, 3, output_dir=tmp_path, seed=7)[TARGETS] == found[TARGETS], "all folds are finished"
    others = rows.select(range(19)), rows.map(lambda row: {"labels": (row["labels"] + 1) % 3})
    for other, options in ((others[0], {}), (others[1], {}), (rows, {"groups": "text"})):
        with pytest.raises(ValueError, match="holds the folds of another data set"):
            cross_fit(make, other, 3, output_dir=tmp_path, **{"seed": 7} | options)


def _watched(trainer, steps):
    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer.add_callback(Watch)
    return trainer


def test_rows_of_one_group_are_in_one_fold(tmp_path):
    make = Maker(problem="regression")
    rows = Dataset.from_list([row | {"labels": float(row["labels"])} for row in ROWS])
    found = cross_fit(make, rows, 2, output_dir=tmp_path, groups="text")
    for part in make.rows.values():
        assert all(part["text"].count(text) == 2 for text in part["text"])
        assert len(part) == 10
    assert torch.tensor(found[TARGETS]).shape == (20, 1)


def test_what_cannot_be_divided_is_refused(tmp_path):
    rows, make = Dataset.from_list(ROWS), Maker()
    for arguments, message in (
        ({"folds": 1}, "`folds=1` is not valid for 20"),
        ({"folds": 21}, "`folds=21` is not valid for 20"),
        ({"folds": 11, "groups": "text"}, "`folds=11` is not valid for 10"),
        ({"groups": "sentence"}, "is no column"),
        ({"groups": [1, 2]}, "`groups` has 2 values"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_fit(make, rows, output_dir=tmp_path, **arguments)
    with pytest.raises(ValueError, match="is a list"):
        cross_fit(make, ROWS, output_dir=tmp_path)
    with pytest.raises(ValueError, match="already"):
        cross_fit(make, rows.add_column(TARGETS, [[0.0]] * 20), output_dir=tmp_path)
    with pytest.raises(ValueError, match="give it the folder"):
        cross_fit(lambda rows, _: make(rows, str(tmp_path / "other")), rows, output_dir=tmp_path)
    assert not list(tmp_path.glob("**/*.npy"))
