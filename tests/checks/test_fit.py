"""Rows that do not fit a model: the message names the model and both sizes, before the training if possible."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import OnTheFly, collate, tiny_bert, tiny_rows, tiny_trainer, weights_of
from tiny_models import tiny_model
from transformers import default_data_collator

LONG = {
    "positions": (
        {"max_position_embeddings": 4},
        r"`student_model` has 4 positions.*rows of the data have 8 tokens.*max_length=4",
    ),
    "types": ({"type_vocab_size": 1}, r"`student_model` has embeddings for 1 values of `token_type_ids`.*the value 1"),
}


def plain_rows(count=8, **columns):
    """Rows for a collator that does not pad."""
    return [{**{n: v for n, v in row.items() if n != "attention_mask"}, **columns} for row in tiny_rows(count)]


@pytest.mark.parametrize("form", [list, Dataset.from_list, OnTheFly])
@pytest.mark.parametrize("kind", LONG)
def test_a_student_that_is_too_small_for_the_rows_is_named(kind, form, tmp_path):
    settings, message = LONG[kind]
    rows = form(plain_rows(token_type_ids=[0] * 7 + [1]))
    options = {"train_dataset": rows, "data_collator": default_data_collator}
    student = tiny_bert(2, 2, **settings)
    if form is not OnTheFly:
        with pytest.raises(ValueError, match=f"`train_dataset`: {message}"):
            tiny_trainer(tmp_path, student_model=student, **options)
        return
    trainer = tiny_trainer(tmp_path, student_model=student, **options)
    before = weights_of(trainer.pair)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.pair.state_dict().items())


def test_a_frozen_teacher_that_is_too_small_is_named_at_its_first_batch(tmp_path):
    small = tiny_bert(2, 3, max_position_embeddings=4)
    trainer = tiny_trainer(tmp_path, distillation_mode="community", pretrained_teacher=small)
    with pytest.raises(ValueError, match="`pretrained_teacher` has 4 positions"):
        trainer.train()


def images(form):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 8, 8, generator=generator)
    return form([{"pixel_values": np.asarray(image), "labels": index % 5} for index, image in enumerate(pixels)])


@pytest.mark.parametrize("form", [list, OnTheFly])
@pytest.mark.parametrize("settings", [{"image_size": 16}, {"num_channels": 1}], ids=str)
def test_a_student_for_other_images_is_named(settings, form, tmp_path):
    teacher, student = (tiny_model("vit", "image-classification", 2, **s) for s in ({}, settings))
    wanted = {"image_size": r"\(3, 16, 16\)", "num_channels": r"\(1, 8, 8\)"}[next(iter(settings))]
    options = {"model": teacher, "train_dataset": images(form), "data_collator": default_data_collator}
    with pytest.raises(ValueError, match=rf"`student_model` takes images of {wanted}.*have images of \(3, 8, 8\)"):
        tiny_trainer(tmp_path, student_model=student, **options).train()


def test_a_model_that_takes_images_of_any_size_is_not_refused(tmp_path):
    students = tiny_model("resnet", "image-classification", 1, image_size=16)
    teacher = tiny_model("vit", "image-classification", 2)
    trainer = tiny_trainer(
        tmp_path, model=teacher, student_model=students, train_dataset=images(list), data_collator=None, max_steps=1
    )
    trainer.train()


HEADS = {
    "a masked LM on rows": ("masked-lm", 1, r"BertForMaskedLM .*one label for each token.*labels of the shape \(1,\)"),
    "token labels cut": (
        "token-classification",
        [1] * 7,
        r"one label for each token.*\(1, 7\).*`input_ids`.*\(1, 8\)",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_does_not_fit_the_labels_is_refused(case, tmp_path):
    head, labels, message = HEADS[case]
    models = {n: tiny_model("bert", head, k) for n, k in (("model", 2), ("student_model", 1))}
    rows = plain_rows(labels=labels)
    with pytest.raises(ValueError, match=f"`train_dataset`: `model` is a .*{message}"):
        tiny_trainer(tmp_path, **models, train_dataset=rows, data_collator=None)
    with pytest.raises(ValueError, match="`model` is a .*one label for each token"):
        tiny_trainer(tmp_path, **models, train_dataset=OnTheFly(rows), data_collator=None).train()


def test_labels_of_tokens_for_a_head_of_rows_are_refused(tmp_path):
    rows = plain_rows(labels=[1] * 8)
    with pytest.raises(ValueError, match=r"labels are integers of the shape \(8, 8\)"):
        tiny_trainer(tmp_path, train_dataset=rows, data_collator=None)


def test_a_collator_that_makes_the_labels_fit_is_left_to_do_so(tmp_path):
    models = {n: tiny_model("bert", "token-classification", k) for n, k in (("model", 2), ("student_model", 1))}
    rows = tiny_rows(8)  # one label a row

    def of_tokens(features):
        batch = collate(features)
        return batch | {"labels": batch["labels"][:, None].expand_as(batch["input_ids"])}

    tiny_trainer(tmp_path, **models, train_dataset=rows, data_collator=of_tokens, max_steps=1).train()


def test_unpadded_rows_without_a_tokenizer_are_refused(tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in tiny_rows(ragged=True)]
    trainer = tiny_trainer(tmp_path, train_dataset=rows, data_collator=None)
    with pytest.raises(ValueError, match=r"Rows of the training data have \d+ and \d+ `input_ids`.*processing_class`"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_of_a_data_set_on_the_fly_is_checked_before_a_device_gets_it(workers, tmp_path):
    rows = tiny_rows(8)
    rows[5]["labels"] = 7
    trainer = tiny_trainer(tmp_path, train_dataset=OnTheFly(rows), dataloader_num_workers=workers)
    collator = trainer.data_collator
    with pytest.raises(ValueError, match=r"A batch of the training data: Label 7 of row 1 .*`num_labels=3`"):
        trainer.train()
    assert trainer.data_collator is collator is collate


def test_labels_that_the_users_loss_reads_are_the_users_business(tmp_path):
    rows = [{**row, "labels": row["labels"] + 10} for row in tiny_rows(8)]

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels - 10)

    tiny_trainer(tmp_path, train_dataset=OnTheFly(rows), compute_loss_func=loss, max_steps=1).train()


def test_other_errors_of_a_model_stay_as_they_are(tmp_path):
    class Broken(type(tiny_bert())):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            raise IndexError("a fault of the model")

    trainer = tiny_trainer(tmp_path, student_model=Broken(tiny_bert(2).config))
    with pytest.raises(IndexError, match="^a fault of the model$"):
        trainer.train()
