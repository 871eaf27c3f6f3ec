"""A checkpoint is there whole or not at all."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import run_python
from safetensors import SafetensorError
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer, weights_of
from tiny_models import rows_of, tiny_batch, tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.saving.atomic_folders import PARTIAL, clean_up, put_in_place
from ctcd_trainer.saving.weights import converted_weights, saved_shapes


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


def test_a_folder_takes_the_place_of_the_one_that_was_there(tmp_path):
    final = write(tmp_path / "final", "old")
    write(tmp_path / PARTIAL / "final", "new")
    put_in_place(final)
    assert (final / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["final"]


def test_what_was_to_be_replaced_is_put_back_if_the_new_one_did_not_come(tmp_path):
    write(tmp_path / PARTIAL / "replaced-final", "old")
    write(tmp_path / PARTIAL / "final", "half of the ne")
    clean_up(tmp_path)
    assert (tmp_path / "final" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["final"]


def test_what_was_replaced_is_removed_if_the_new_one_came(tmp_path):
    write(tmp_path / "final", "new")
    write(tmp_path / PARTIAL / "replaced-final", "old")
    clean_up(tmp_path)
    clean_up(tmp_path)
    assert (tmp_path / "final" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(part, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2)
    save = getattr(trainer, part)

    def fail_later(*args, **kwargs):
        if trainer.state.global_step > 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(trainer, part, fail_later)
    with pytest.raises(OSError, match=r"checkpoint-4' could not be written.*No space left.*checkpoint-2"):
        trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    resumed = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    whole = tiny_trainer(tmp_path / "whole")
    whole.train()
    assert_same_weights(resumed.pair, whole.pair)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("NCCL communicator was aborted"),
        RuntimeError("Some tensors share memory"),
        OSError("We couldn't connect to 'https://huggingface.co'"),  # transformers' own words
        SafetensorError("Error while serializing: invalid shape"),
    ],
    ids=str,
)
def test_an_error_that_is_none_of_writing_keeps_its_type_and_leaves_no_half(error, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    trainer.state.global_step = 4

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(type(error)) as raised:
        trainer._save_checkpoint(trainer.model, trial=None)
    assert raised.value is error
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_a_batch_size_whose_checkpoint_does_not_fit_into_memory_is_reduced(tmp_path, monkeypatch):
    trainer = tiny_trainer(
        tmp_path, auto_find_batch_size=True, save_strategy="steps", save_steps=2, per_device_train_batch_size=8
    )
    save = trainer._save_rng_state

    def fail_with_large_batches(*args, **kwargs):
        if trainer._train_batch_size == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return save(*args, **kwargs)

    monkeypatch.setattr(trainer, "_save_rng_state", fail_with_large_batches)
    trainer.train()
    assert trainer._train_batch_size < 8
    assert trainer.state.global_step == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_device_under_torch_save_is_an_error_of_writing(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2)
    monkeypatch.setattr(trainer, "_save_scaler", lambda folder: torch.save(torch.zeros(100_000), "/dev/full"))
    with pytest.raises(OSError, match=r"checkpoint-2' could not be written: RuntimeError.*Make room"):
        trainer.train()
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 5}
    tiny_trainer(tmp_path, **options).train()
    before = (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(self, target):
        if self.name == "checkpoint-5" and PARTIAL in self.parts:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=r"could not be written.*the last checkpoint is '.*checkpoint-5'"):
        tiny_trainer(tmp_path, learning_rate=1e-3, **options).train()
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_weights_that_are_never_saved_are_not_missed(tmp_path):
    learner = tiny_bert(2)
    learner.save_pretrained(tmp_path, state_dict={k: v for k, v in learner.state_dict().items() if "pooler" not in k})
    with pytest.raises(ValueError, match="pooler"):
        converted_weights(learner, tmp_path, "teacher")
    learner._keys_to_ignore_on_save = [name for name in learner.state_dict() if "pooler" in name]
    converted_weights(learner, tmp_path, "teacher")


FULL = """
import resource, signal, sys
from tiny import tiny_trainer
trainer = tiny_trainer({folder!r}, save_strategy="steps", save_steps=2)
save = trainer._save_checkpoint
def limited(*args):
    if trainer.state.global_step > 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    save(*args)
trainer._save_checkpoint = limited
trainer.train()
"""


def test_a_write_that_the_system_refuses_leaves_the_checkpoint_before(tmp_path):
    code = FULL.format(folder=str(tmp_path / "out"))
    result = run_python("-c", code, timeout=120)
    assert result.returncode == 1
    assert "checkpoint-4' could not be written" in result.stderr
    assert os.listdir(tmp_path / "out") == ["checkpoint-2"]
    resumed = tiny_trainer(tmp_path / "out")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_what_a_kill_has_left_is_removed_at_the_next_start(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    torn = tmp_path / PARTIAL / "checkpoint-4"
    shutil.copytree(tmp_path / "checkpoint-2", torn)
    (torn / "trainer_state.json").unlink()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    tiny_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("relative", [False, True])
def test_the_best_checkpoint_is_named_by_its_final_place_and_kept(relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("out") if relative else tmp_path / "out"
    values = iter([3.0, 1.0, 2.0, 4.0])
    trainer = tiny_trainer(
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=tiny_trainer(tmp_path / "other").train_dataset,
        compute_metrics=lambda prediction: {"score": 0.0},
        metric_for_best_model="student_score",
        greater_is_better=False,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    evaluate = trainer.evaluate

    def scored(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_student_score"] = next(values)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", scored)
    trainer.train()
    assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == os.path.join(folder, "checkpoint-2")
    for step in (2, 4):
        state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == os.path.join(folder, "checkpoint-2")
    best = torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=False)
    assert best["state"]
    assert_same_weights(trainer.teacher_model, type(trainer.teacher_model).from_pretrained(folder / "checkpoint-2"))


# ---- Whose checkpoint is it? ----


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"student_model": tiny_bert(3, seed=2)},
            r"another student: `bert.encoder.layer.2.*absent in .* and \(16,",
        ),
        (
            {"student_model": tiny_bert(1, seed=2)},
            r"another student: `bert.encoder.layer.1.* and absent here",
        ),
        ({"model": tiny_bert(4, seed=1)}, r"another model|another teacher: `bert.encoder.layer.3"),
        (
            {"student_model": tiny_bert(2, intermediate_size=48)},
            r"another student: .*\(32,\) in .* and \(48,\) here",
        ),
    ],
)
def test_a_checkpoint_of_another_pair_is_refused_before_anything_is_loaded(other, message, tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    trainer = tiny_trainer(tmp_path, **other)
    before = {name: weights_of(model) for name, model in trainer.pair.learners.items()}
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    for name, model in trainer.pair.learners.items():
        assert_same_weights(model, before[name])


@pytest.mark.parametrize(
    ("mode", "message"), [("reversed", r"groups are of \['student', 'student'\]"), ("ctcd", "number of")]
)
def test_the_optimizer_of_another_mode_is_refused(mode, message, tmp_path):
    pair = {"model": tiny_bert(2, seed=1), "student_model": tiny_bert(2, seed=2)}  # of the same sizes
    tiny_trainer(tmp_path, **pair, distillation_mode="kd", save_strategy="steps", save_steps=2).train()
    trainer = tiny_trainer(
        tmp_path, model=tiny_bert(2, seed=1), student_model=tiny_bert(2, seed=2), distillation_mode=mode
    )
    with pytest.raises(
        ValueError, match=rf"optimizer of the checkpoint .* belongs to another training: .*{message}.*Resume"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("head", ["masked-lm", "causal-lm", "seq2seq-lm"])
def test_tied_weights_that_were_saved_once_are_those_of_the_same_pair(head, tmp_path):
    family = {"masked-lm": "bert", "causal-lm": "gpt2", "seq2seq-lm": "t5"}[head]
    rows = rows_of(tiny_batch(head))
    pair = {"model": tiny_model(family, head, 2), "student_model": tiny_model(family, head, 1, seed=1)}
    options = {"train_dataset": rows, "data_collator": default_data_collator, "max_steps": 2}
    tiny_trainer(tmp_path, **pair, **options, save_strategy="steps", save_steps=1).train()
    resumed = tiny_trainer(tmp_path, **pair, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_a_sharded_checkpoint_resumes_and_is_checked(tmp_path, monkeypatch):
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel,
        "save_pretrained",
        lambda self, *args, **kw: save(self, *args, **{**kw, "max_shard_size": "3KB"}),
    )
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors.index.json").exists()
    assert (tmp_path / "checkpoint-2" / "student" / "model.safetensors.index.json").exists()
    resumed = tiny_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = tiny_trainer(tmp_path / "whole")
    whole.train()
    assert_same_weights(resumed.pair, whole.pair)
    with pytest.raises(ValueError, match="another student"):
        tiny_trainer(tmp_path, student_model=tiny_bert(1)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("best", [False, True])
def test_families_that_are_saved_under_other_names_resume(best, tmp_path):
    rows = rows_of(tiny_batch("causal-lm"))
    options = {"train_dataset": rows, "data_collator": default_data_collator, "max_steps": 2}
    if best:
        options |= {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}

    options |= {"save_strategy": "steps", "save_steps": 1}

    def pair() -> dict:
        models = tiny_model("mixtral", "causal-lm", 2), tiny_model("mixtral", "causal-lm", 1, seed=1)
        return dict(zip(("model", "student_model"), models, strict=True))

    whole = tiny_trainer(tmp_path, **pair(), **options)
    whole.train()
    names = saved_shapes(tmp_path / "checkpoint-1").keys()
    assert not names <= whole.teacher_model.state_dict().keys()
    resumed = tiny_trainer(tmp_path, **pair(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(resumed.pair, whole.pair)
    other = pair() | {"student_model": tiny_model("mixtral", "causal-lm", 2, seed=1)}
    with pytest.raises(ValueError, match=r"another student: `model.layers.1.* absent in the checkpoint"):
        tiny_trainer(tmp_path, **other, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("names", [("default", "default"), ("first", "second")])
def test_adapters_of_any_name_resume(names, tmp_path):
    peft = pytest.importorskip("peft")

    def pair() -> dict:
        config = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
        torch.manual_seed(5)
        models = (tiny_bert(3, seed=1), tiny_bert(2, seed=2))
        adapted = [
            peft.get_peft_model(model, config, adapter_name=name) for model, name in zip(models, names, strict=True)
        ]
        return dict(zip(("model", "student_model"), adapted, strict=True))

    whole = tiny_trainer(tmp_path, **pair(), save_strategy="steps", save_steps=2)
    whole.train()
    resumed = tiny_trainer(tmp_path, **pair())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, whole.pair)


class Stream(torch.utils.data.IterableDataset):
    """Rows whose number is not known before they are read."""

    def __iter__(self):
        yield from tiny_rows(80)


def test_a_stream_resumes_in_the_middle_of_the_soft_warm_up_with_dropout_and_accumulation(tmp_path):
    def trainer(folder: Path, **options) -> CoDistillationTrainer:
        return tiny_trainer(
            folder,
            model=tiny_bert(3, seed=1, dropout=0.1),
            student_model=tiny_bert(2, seed=2, dropout=0.1),
            train_dataset=Stream(),
            max_steps=8,
            gradient_accumulation_steps=2,
            soft_warmup_ratio=1.0,
            **options,
        )

    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == 8
    assert_same_weights(resumed.pair, whole.pair)


def test_resuming_at_the_end_changes_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=5)  # in the middle of an epoch
    trainer.train()
    resumed = tiny_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert_same_weights(resumed.pair, trainer.pair)


def test_the_mark_of_a_checkpoint_on_sigterm_that_did_not_come_is_removed(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    marked = tmp_path / "checkpoint-4"
    marked.mkdir()
    (marked / "checkpoint-is-incomplete.txt").write_text("Checkpoint started at step 4 and in progress...")
    resumed = tiny_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_the_mark_of_a_half_checkpoint_of_plain_trainer_stays(tmp_path):
    """A plain Trainer writes into the folder that it marks: without the mark, a half one would count as whole."""
    args = tiny_args(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    Trainer(tiny_bert(3, seed=1), args, data_collator=collate, train_dataset=tiny_rows()).train()
    half = tmp_path / "checkpoint-2"
    (half / "trainer_state.json").unlink()
    (half / "checkpoint-is-incomplete.txt").write_text("Checkpoint started at step 2 and in progress...")
    files = sorted(os.listdir(half))
    tiny_trainer(tmp_path).train()
    assert sorted(os.listdir(half)) == files


def test_a_whole_checkpoint_that_is_marked_stays_until_its_successor_is_there(tmp_path, monkeypatch):
    """The signal may come while a checkpoint is saved; then the same step is saved once more."""
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    mark = tmp_path / "checkpoint-2" / "checkpoint-is-incomplete.txt"
    mark.write_text("Checkpoint started at step 2 and in progress...")
    files = sorted(path.name for path in mark.parent.iterdir() if path != mark)
    resumed = tiny_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in mark.parent.iterdir()) == files

    mark.write_text("Checkpoint started at step 2 and in progress...")
    resumed.state.global_step = 2

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resumed, "_save", fail)
    with pytest.raises(OSError, match=r"Earlier files are unchanged; the last checkpoint is '.*checkpoint-3'"):
        resumed._save_checkpoint(resumed.model, trial=None)
    assert sorted(path.name for path in mark.parent.iterdir()) == files


def test_a_checkpoint_on_sigterm_is_whole(tmp_path):
    class Signal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            manager = next(each for each in trainer.callback_handler.callbacks if hasattr(each, "jit_manager"))
            manager.jit_manager.is_checkpoint_requested = state.global_step == 3

    trainer = tiny_trainer(tmp_path, enable_jit_checkpoint=True, callbacks=[Signal()])
    trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-3"]
    resumed = tiny_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    whole = tiny_trainer(tmp_path / "whole")
    whole.train()
    assert_same_weights(resumed.pair, whole.pair)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("only_student", [False, True])
def test_a_full_disk_leaves_what_was_there_and_room_lets_it_go_on(only_student, small_disk, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    if only_student:
        # The loss of the student decreases, so that `best-student` is replaced at every evaluation.
        best = {"eval_dataset": tiny_rows(), "eval_strategy": "steps", "student_metric_for_best_model": "loss"}
        options = {"save_strategy": "steps", "save_steps": 5, "eval_steps": 1, **best}
    trainer = tiny_trainer(small_disk, **options)
    ballast = small_disk / "ballast"

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                free = shutil.disk_usage(small_disk).free
                ballast.write_bytes(bytes(max(0, free - 40_000)))

    trainer.add_callback(Fill())
    name = "best-student" if only_student else "checkpoint-4"
    with pytest.raises(OSError, match=rf"{name}' could not be written: .*Make room"):
        trainer.train()
    left = "best-student" if only_student else "checkpoint-2"
    assert sorted(os.listdir(small_disk)) == ["ballast", left]
    AutoModelForSequenceClassification.from_pretrained(small_disk / left)
    ballast.unlink()
    if not only_student:
        resumed = tiny_trainer(small_disk, **options, save_total_limit=1)
        resumed.train(resume_from_checkpoint=True)
        whole = tiny_trainer(tmp_path / "whole")
        whole.train()
        assert_same_weights(resumed.pair, whole.pair)


def test_a_co_training_starts_from_a_checkpoint_of_plain_trainer(tmp_path):
    args = tiny_args(tmp_path / "plain", save_strategy="steps", save_steps=5)
    Trainer(tiny_bert(3, seed=1), args, data_collator=collate, train_dataset=tiny_rows()).train()
    checkpoint = tmp_path / "plain" / "checkpoint-5"
    trainer = tiny_trainer(tmp_path / "pair", model=str(checkpoint), student_model=tiny_bert(2, seed=2))
    assert_same_weights(trainer.teacher_model, type(trainer.teacher_model).from_pretrained(checkpoint))
    trainer.train()
    with pytest.raises(ValueError, match=r"has no student.*pass it as `model`"):
        tiny_trainer(tmp_path / "other").train(resume_from_checkpoint=str(checkpoint))
