"""The predictions of a frozen teacher that are kept on disk: the same training, without running it again."""

import copy
import json
import os
import sqlite3

import pytest
import torch
from head_pairs import LANGUAGE_MODELS, OTHERS, assert_same_gradients
from naive_losses import naive_loss
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import IGNORED, rows_of, tiny_batch, tiny_model
from torch import nn

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.losses import teacher_cache as pretrained_cache
from ctcd_trainer.losses.teacher_cache import fingerprint_of
from ctcd_trainer.tasks.base import Task

FAMILIES = [(head, family) for head, families in {**LANGUAGE_MODELS, **OTHERS}.items() for family in families]
ONE_OF_EACH = [(head, families[0]) for head, families in {**LANGUAGE_MODELS, **OTHERS}.items()]
#: Heads whose rows have padding.
PADDED = [
    ("masked-lm", "bert"),
    ("causal-lm", "gpt2"),
    ("seq2seq-lm", "t5"),
    ("seq2seq-lm", "bart"),
    ("token-classification", "bert"),
    ("question-answering", "bert"),
    ("multiple-choice", "bert"),
]
WEIGHTS = {
    **{"teacher_hard": 1.0, "student_hard": 0.7, "student_from_teacher": 0.5, "teacher_from_student": 1.5},
    **{"student_from_pretrained": 0.9, "teacher_from_pretrained": 0.3},
}

#: Adam makes steps of gradients that are zero but for rounding.
NO_MAGNIFIER = {"optim": "sgd"}


def models_of(head, family):
    """Teacher, student and frozen teacher, all different."""
    models = {
        name: tiny_model(family, head, layers, seed)
        for name, layers, seed in (("teacher", 2, 1), ("student", 1, 2), ("pretrained", 2, 3))
    }
    models["pretrained"].eval()  # batch norms
    return models


def community(tmp_path, models, cache=None, **options):
    """A trainer of copies of the models."""
    names = ("train_dataset", "data_collator", "task")
    own = {name: options.pop(name) for name in names if name in options}
    models = copy.deepcopy(models)
    args = tiny_args(
        tmp_path, distillation_mode="community", pretrained_cache_dir=None if cache is None else str(cache), **options
    )
    return CoDistillationTrainer(
        models["teacher"], args, student_model=models["student"], pretrained_teacher=models["pretrained"], **own
    )


def counted(trainer):
    """The numbers of rows on which the frozen teacher is run for its predictions, a growing list."""
    counts, run = [], trainer.pair.run

    def counting(model, inputs, *args, **kwargs):
        if model is trainer.pretrained_teacher:
            counts.append(len(next(iter(inputs.values()))))
        return run(model, inputs, *args, **kwargs)

    trainer.pair.run = counting
    return counts


def trained(tmp_path, models, cache=None, **options):
    """A trainer after its training, and the numbers of rows on which the frozen teacher was run."""
    trainer = community(tmp_path, models, cache, **options)
    counts = counted(trainer)
    trainer.train()
    return trainer, counts


def assert_same_training(first, second, tolerance=0.0):
    assert_same_weights(first.teacher_model, second.teacher_model, tolerance)
    assert_same_weights(first.student_model, second.student_model, tolerance)


def read(folder, query):
    """The rows that a query finds in the file of a cache."""
    connection = sqlite3.connect(folder / "predictions.sqlite")
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def fingerprint_in(folder):
    ((text,),) = read(folder, "SELECT json FROM fingerprint")
    return json.loads(text)


def number_kept(folder):
    return read(folder, "SELECT count(*) FROM predictions")[0][0]


# ---- Community KD ----


@pytest.mark.parametrize(("head", "family"), FAMILIES)
def test_every_head_has_the_naive_loss_and_gradients_without_a_cache_and_while_it_fills_and_when_it_is_full(
    head, family, tmp_path
):
    models, batch = models_of(head, family), tiny_batch(head)
    expected = naive_loss(head, **models, batch=batch, weights=WEIGHTS, tau=2.0)
    expected.backward()
    weights = {f"{name}_weight": weight for name, weight in WEIGHTS.items()}
    cache = tmp_path / "cache"
    for folder, rows in ((None, [4]), (cache, [4]), (cache, [])):
        trainer = community(tmp_path, models, folder, temperature=2.0, **weights)
        counts = counted(trainer)
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        assert counts == rows
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
        assert_same_gradients(trainer.teacher_model, models["teacher"])
        assert_same_gradients(trainer.student_model, models["student"])
        if folder is not None:
            trainer.pair.teacher_cache.finish()


def test_an_encoder_decoder_that_shifts_labels_only_in_its_forward_can_be_the_frozen_teacher(tmp_path):
    models, batch = models_of("seq2seq-lm", "m2m_100"), tiny_batch("seq2seq-lm")
    trainer = community(tmp_path, models)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = naive_loss("seq2seq-lm", **models, batch=batch, weights=dict.fromkeys(WEIGHTS, 1.0))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("head", ["masked-lm", "token-classification"])
def test_the_frozen_teacher_runs_once_per_batch_without_gradients_and_under_autocast(head, tmp_path):
    trainer = community(tmp_path, models_of(head, "bert"), bf16=True)
    batch = tiny_batch(head)
    trainer.compute_loss(trainer.model, dict(batch))  # the first batch of language models tries their heads
    states = []
    trainer.pretrained_teacher.register_forward_pre_hook(
        lambda *_: states.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    trainer.compute_loss(trainer.model, dict(batch))
    assert states == [(False, True)]


# ---- The same training ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("head", "family"), ONE_OF_EACH)
def test_a_training_is_bit_for_bit_that_without_a_cache_and_a_second_one_runs_the_model_not_at_all(
    head, family, precision, tmp_path
):
    batch = tiny_batch(head, 12)
    if "attention_mask" in batch:  # all of one length
        batch["attention_mask"].fill_(1)
    models, cache = models_of(head, family), tmp_path / "cache"
    options = {"train_dataset": rows_of(batch), "max_steps": 4, "bf16": precision == "bf16"}
    plain, without = trained(tmp_path, models, **options)
    first, filling = trained(tmp_path, models, cache, **options)
    second, full = trained(tmp_path, models, cache, **options)
    assert (without, filling, full) == ([4] * 4, [4] * 3, [])
    assert_same_training(first, plain)
    assert_same_training(second, plain)


def test_three_epochs_with_accumulation_run_each_row_once(tmp_path):
    models = models_of("token-classification", "bert")
    options = {
        "train_dataset": rows_of(tiny_batch("token-classification", 10)),
        "max_steps": -1,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
    }
    plain, without = trained(tmp_path, models, **options)
    kept, counts = trained(tmp_path, models, tmp_path / "cache", **options)
    assert (sum(without), sum(counts)) == (30, 10)
    assert_same_training(kept, plain, tolerance=1e-6)


def unpadded(head, row):
    """A row without the padding that `tiny_batch` has put behind its inputs and labels."""
    length = int(row["attention_mask"].reshape(-1, row["attention_mask"].shape[-1]).sum(-1).max())
    cut = {name: value[..., :length] if value.ndim else value for name, value in row.items()}
    if head == "seq2seq-lm":
        cut["labels"] = row["labels"][: max(1, int((row["labels"] != IGNORED).sum()))]
    return cut


def pad(rows, extra=0):
    """A batch, padded behind the longest row, and by `extra` more."""
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].ndim:
            length = max(value.shape[-1] for value in values) + extra
            fill = IGNORED if name == "labels" else 0
            values = [nn.functional.pad(value, (0, length - value.shape[-1]), value=fill) for value in values]
        batch[name] = torch.stack(values)
    return batch


@pytest.mark.parametrize(("head", "family"), PADDED)
def test_rows_are_found_in_another_order_in_batches_of_another_size_and_with_other_padding(head, family, tmp_path):
    rows = [unpadded(head, row) for row in rows_of(tiny_batch(head, 12))]
    assert len({row["attention_mask"].shape[-1] for row in rows}) > 2
    models, cache = models_of(head, family), tmp_path / "cache"
    _, counts = trained(tmp_path, models, cache, train_dataset=rows, data_collator=pad, max_steps=3)
    assert counts == [4, 4, 4]
    options = {
        "train_dataset": rows[::-1],
        "data_collator": lambda batch: pad(batch, extra=2),
        "per_device_train_batch_size": 3,
        "train_sampling_strategy": "random",
        **NO_MAGNIFIER,
    }
    plain, _ = trained(tmp_path, models, **options)
    kept, counts = trained(tmp_path, models, cache, **options)
    assert counts == []
    assert_same_training(kept, plain, tolerance=1e-6)


@pytest.mark.parametrize(("head", "family"), PADDED)
def test_of_a_batch_only_the_rows_that_are_missing_are_run_together(head, family, tmp_path):
    batch = tiny_batch(head, 12)
    models, cache = models_of(head, family), tmp_path / "cache"
    trained(tmp_path, models, cache, train_dataset=rows_of(batch)[::3], max_steps=1)
    options = {"train_dataset": rows_of(batch), "max_steps": 3, **NO_MAGNIFIER}
    plain, _ = trained(tmp_path, models, **options)
    kept, counts = trained(tmp_path, models, cache, **options)
    assert counts == [2, 3, 3]  # rows 0, 3, 6, 9 are there
    assert_same_training(kept, plain, tolerance=1e-6)


# ---- What makes a row another one ----


def losses(tmp_path, models, cache, batches):
    trainer = community(tmp_path, models, cache)
    counts = counted(trainer)
    return [trainer.compute_loss(trainer.model, dict(batch)).item() for batch in batches], counts


def shifted(batch, places):
    """The same rows with their padding in front, where it moves the positions of the tokens."""
    return {name: value.roll(places, dims=1) for name, value in batch.items()}


def variants(head):
    """Batches of one row that a key could take for the first, though the predictions that matter are others."""
    batch = {name: value[:1].clone() for name, value in tiny_batch(head).items()}
    batch["attention_mask"][:, 6:] = 0
    batch["labels"][:] = IGNORED
    batch["labels"][:, 2:4] = 3
    batches = {"row": batch, "padding in front": shifted(batch, 2)}
    for name, key, place, value in (
        ("another token", "input_ids", 1, 33),
        ("a hole in the mask", "attention_mask", 1, 0),
        ("a label behind the mask", "labels", 8, 2),
        ("another position scored", "labels", 1, 3),
    ):
        batches[name] = {**batch, key: batch[key].clone()}
        batches[name][key][:, place] = value
    if "token_type_ids" in batch:
        batches["another segment"] = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    batches["labels behind the mask, another token there"] = copy.deepcopy(batches["a label behind the mask"])
    batches["labels behind the mask, another token there"]["input_ids"][:, 7:] = 44
    return batches


@pytest.mark.parametrize(
    ("head", "family"), [("masked-lm", "bert"), ("token-classification", "bert"), ("causal-lm", "gpt2")]
)
def test_rows_with_other_predictions_are_never_taken_for_one_another(head, family, tmp_path):
    batches, models = variants(head), models_of(head, family)
    plain, _ = losses(tmp_path, models, None, batches.values())
    kept, _ = losses(tmp_path, models, tmp_path / "cache", batches.values())
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(plain), rtol=1e-6, atol=0.0)
    assert len(set(plain)) == len(plain)


def test_an_encoder_mask_as_long_as_the_targets_does_not_cut_the_decoder_inputs(tmp_path):
    batch = {name: value[:, :6] for name, value in tiny_batch("seq2seq-lm", 1).items()}
    batch["attention_mask"][:, 3:] = 0
    other = {**batch, "decoder_input_ids": torch.tensor([[2, 5, 6, 7, 8, 9]])}
    third = {**batch, "decoder_input_ids": torch.tensor([[2, 5, 6, 7, 8, 33]])}
    models = models_of("seq2seq-lm", "bart")
    plain, _ = losses(tmp_path, models, None, [batch, other, third])
    kept, counts = losses(tmp_path, models, tmp_path / "cache", [batch, other, third])
    assert counts == [1, 1, 1]
    assert kept == plain
    assert len(set(plain)) == 3


def test_other_labels_find_the_same_predictions(tmp_path):
    batch = tiny_batch("token-classification")
    other = {**batch, "labels": batch["labels"].where(batch["labels"] == IGNORED, 1)}
    _, counts = losses(tmp_path, models_of("token-classification", "bert"), tmp_path / "cache", [batch, other])
    assert counts == [4]


class OfEachToken(Task):
    """A task of which it is not known whether padding changes the shape of its outputs."""


def test_a_task_of_the_user_finds_rows_with_the_same_padding(tmp_path):
    rows = rows_of(tiny_batch("token-classification", 8))
    models, cache = models_of("token-classification", "bert"), tmp_path / "cache"
    options = {"train_dataset": rows, "max_steps": 2, "task": OfEachToken(models["teacher"].config)}
    plain, _ = trained(tmp_path, models, **options)
    trained(tmp_path, models, cache, **options)
    kept, counts = trained(tmp_path, models, cache, **options)
    assert counts == []
    assert_same_training(kept, plain)
    _, counts = trained(tmp_path, models, cache, data_collator=lambda batch: pad(batch, extra=2), **options)
    assert counts == [4, 4]


# ---- The folder ----


def classifiers():
    return {"teacher": tiny_bert(3, 1), "student": tiny_bert(2, 2), "pretrained": tiny_bert(2, 3)}


def test_a_cache_of_other_weights_another_config_or_another_precision_is_refused_with_what_differs(tmp_path):
    models, cache = classifiers(), tmp_path / "cache"
    community(tmp_path, models, cache)
    there = fingerprint_in(cache)
    other = {
        "weights": ({**models, "pretrained": tiny_bert(2, 4)}, {}),
        "config": ({**models, "pretrained": tiny_bert(2, 3, hidden_act="relu")}, {}),
        "mixed_precision": (models, {"bf16": True}),
    }
    for part, (own, options) in other.items():
        with pytest.raises(ValueError, match=f"`{part}` is .* there, .* here. Name another folder, or") as error:
            community(tmp_path / "output", own, cache, **options)
        assert str(cache) in str(error.value)
        assert repr(there[part]) in str(error.value)
        assert not any(f"`{name}` is" in str(error.value) for name in there.keys() - {part})
    assert fingerprint_in(cache) == there
    community(tmp_path, models, cache)


def test_a_model_that_was_saved_and_loaded_has_the_same_fingerprint(tmp_path):
    trainer = tiny_trainer(tmp_path)
    model = tiny_bert(2, 3)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert fingerprint_of(loaded, trainer.task, "no") == fingerprint_of(model, trainer.task, "no")
    half = copy.deepcopy(model).bfloat16()
    assert fingerprint_of(half, trainer.task, "no")["weights"] != fingerprint_of(model, trainer.task, "no")["weights"]


def test_the_settings_of_an_adapter_belong_to_the_fingerprint_and_the_place_it_was_loaded_from_does_not(tmp_path):
    def fingerprint(model):
        return fingerprint_of(model, tiny_trainer(tmp_path).task, "no")

    def adapted(alpha):
        config = LoraConfig(
            "SEQ_CLS", r=2, lora_alpha=alpha, target_modules=["query", "value"], init_lora_weights=False
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return get_peft_model(tiny_bert(2, 3), config)

    adapted(4).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_bert(2, 3), tmp_path / "adapter")
    assert fingerprint(loaded) == fingerprint(adapted(4))
    one, other = fingerprint(adapted(4)), fingerprint(adapted(8))
    assert [name for name in one if one[name] != other[name]] == ["config"]


def test_a_damaged_file_is_refused_and_what_a_kill_leaves_beside_it_is_ignored(tmp_path):
    models, cache = classifiers(), tmp_path / "cache"
    options = {"train_dataset": tiny_rows(8), "data_collator": collate, "max_steps": 2}
    trained(tmp_path, models, cache, **options)
    assert os.listdir(cache) == ["predictions.sqlite"]
    whole = (cache / "predictions.sqlite").read_bytes()
    (cache / "predictions.sqlite-wal").write_bytes(b"half of what was written")
    _, counts = trained(tmp_path, models, cache, **options)
    assert counts == []
    (cache / "predictions.sqlite").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged file predictions.sqlite .* Name another folder, or delete this one"):
        trained(tmp_path, models, cache, **options)


def test_a_training_that_ends_in_an_error_keeps_what_it_has(tmp_path):
    rows = tiny_rows(12)
    cache = tmp_path / "cache"

    def broken(batch):
        if batch[0]["input_ids"] == rows[8]["input_ids"]:
            raise RuntimeError("a broken row")
        return collate(batch)

    with pytest.raises(RuntimeError, match="a broken row"):
        trained(tmp_path, classifiers(), cache, train_dataset=rows, data_collator=broken)
    _, counts = trained(tmp_path, classifiers(), cache, train_dataset=rows, data_collator=collate, max_steps=3)
    assert counts == [4, 4]  # a data loader is one batch ahead


# ---- Where it is of no use ----


def random_masks(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    masked = torch.rand(batch["input_ids"].shape) < 0.4
    masked[:, 0] = True
    return {**batch, "labels": batch["input_ids"].where(masked, IGNORED)}


@pytest.mark.parametrize(("steps", "warned", "kept"), [(2, False, 8), (3, True, 12), (9, True, 16)])
def test_inputs_that_are_made_anew_in_each_epoch_are_warned_of_and_at_length_not_kept(
    steps, warned, kept, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(pretrained_cache, "_PATIENCE", 3)
    batch = tiny_batch("masked-lm", 8)
    _, counts = trained(
        tmp_path,
        models_of("masked-lm", "bert"),
        tmp_path / "cache",
        train_dataset=rows_of(batch),
        data_collator=random_masks,
        max_steps=steps,
    )
    assert counts == [4] * steps
    assert ("made anew in each epoch" in caplog.text) == warned
    assert number_kept(tmp_path / "cache") == kept


def test_it_steps_aside_with_a_warning_where_language_models_need_whole_logits(tmp_path, caplog):
    models, data = models_of("causal-lm", "gpt2"), rows_of(tiny_batch("causal-lm", 8))
    options = {"train_dataset": data, "max_steps": 3, "fused_lm_head": False}
    plain, _ = trained(tmp_path, models, **options)
    assert "Whole logits are not kept" not in caplog.text
    aside, counts = trained(tmp_path, models, tmp_path / "cache", **options)
    assert "`pretrained_cache_dir` keeps no whole logits" in caplog.text
    assert counts == [4, 4, 4]
    assert_same_training(aside, plain)
    assert number_kept(tmp_path / "cache") == 0


def test_a_cache_is_refused_where_nothing_learns_from_a_frozen_teacher_or_a_function_takes_all_its_outputs(tmp_path):
    with pytest.raises(ValueError, match="`pretrained_cache_dir='kept'` has no effect: .*`distillation_mode='ctcd'`"):
        tiny_trainer(tmp_path, pretrained_cache_dir="kept")
    cache = tmp_path / "cache"
    with pytest.raises(
        ValueError, match="`soft_loss_func` takes all outputs .* `pretrained_cache_dir='.*cache'` keeps"
    ):
        tiny_trainer(
            tmp_path,
            distillation_mode="community",
            pretrained_cache_dir=str(cache),
            soft_loss_func=lambda source, learner, _: (learner["logits"] - source["logits"]).square().mean(),
        )
    assert not cache.exists()
