"""Augmented batches: what changes, for whom, and what stays."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import rows_of, tiny_batch, tiny_model
from tiny_tokenizer import bert_tokenizer, gpt2_tokenizer
from torch.nn import functional as F
from transformers import default_data_collator

from ctcd_trainer import Mixup, TokenMasking, WordDropout, create_student
from ctcd_trainer.tasks import find_task
from ctcd_trainer.training.augmentation import augmented_batch, recounted

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}


def text_batch() -> dict[str, torch.Tensor]:
    texts = ["the small red cat sees anna", "paul follows the dog .", "who"] * 40
    return dict(bert_tokenizer()(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_tokens_are_masked_at_the_rate_but_none_that_is_special_or_padding(rate):
    tokenizer, batch = bert_tokenizer(), text_batch()
    torch.manual_seed(0)
    changed = TokenMasking(tokenizer, rate)(batch)
    special = torch.tensor(tokenizer.all_special_ids)
    fixed = torch.isin(batch["input_ids"], special)
    assert fixed.any()
    masked = changed["input_ids"] == tokenizer.mask_token_id
    assert not masked[fixed].any()
    assert torch.equal(changed["input_ids"][~masked], batch["input_ids"][~masked])
    assert masked[~fixed].float().mean().item() == pytest.approx(rate, abs=0.05)
    assert torch.equal(changed["attention_mask"], batch["attention_mask"])


def test_words_are_hidden_at_the_rate_but_none_that_is_special():
    tokenizer, batch = bert_tokenizer(), text_batch()
    torch.manual_seed(0)
    changed = WordDropout(tokenizer, 0.4)(batch)
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
    hidden = batch["attention_mask"].bool() & ~changed["attention_mask"].bool()
    assert not hidden[special].any()
    assert hidden[~special].float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert torch.equal(changed["input_ids"], batch["input_ids"])


def shift(inputs: dict) -> dict:
    """A change that can be worked out by hand."""
    return {**inputs, "input_ids": (inputs["input_ids"] + 1) % 48}


@pytest.mark.parametrize("views", ["both", "teacher", "student"])
def test_the_models_that_are_named_learn_from_the_changed_batch(views, tmp_path):
    trainer = tiny_trainer(tmp_path, **SGD, augmentation=shift, augmented=views, max_steps=3)
    twin = tiny_trainer(tmp_path)
    pair = {"teacher": twin.teacher_model, "student": twin.student_model}
    rows = tiny_rows()
    for step in range(3):
        batch = collate(rows[4 * step : 4 * step + 4])
        labels = batch.pop("labels")
        logits = [
            model.train()(**(shift(batch) if views in ("both", name) else batch)).logits
            for name, model in pair.items()
        ]
        logs = [F.log_softmax(each, -1) for each in logits]
        loss = sum(F.cross_entropy(each, labels) for each in logits)
        for own, other in (logs, logs[::-1]):
            loss = loss + F.kl_div(own, other.detach(), reduction="batchmean", log_target=True)
        for model in pair.values():
            model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in (parameter for model in pair.values() for parameter in model.parameters()):
                parameter.sub_(0.1 * parameter.grad)
    trainer.train()
    assert_same_weights(trainer.teacher_model, pair["teacher"], 1e-5)
    assert_same_weights(trainer.student_model, pair["student"], 1e-5)


def test_evaluation_is_not_augmented(tmp_path):
    rows = tiny_rows()
    plain, changed = tiny_trainer(tmp_path), tiny_trainer(tmp_path, augmentation=shift)
    first, second = plain.evaluate(rows), changed.evaluate(rows)
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_student_loss"] == second["eval_student_loss"]


@pytest.mark.parametrize("augmentation", [TokenMasking(bert_tokenizer(), 0.5), Mixup(1.0)], ids=["masking", "mixup"])
def test_it_resumes_bit_for_bit(augmentation, tmp_path):
    options = {"augmentation": augmentation, "max_steps": 4}
    whole = tiny_trainer(tmp_path, **options, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, whole.pair)


def test_mixed_rows_have_mixed_embeddings_and_one_of_two_labels(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, augmentation=Mixup(0.7))
    rows = tiny_rows(6, ragged=True)
    batch = collate(rows)
    share, order = torch.tensor([0.9, 0.2, 0.5, 1.0, 0.0, 0.6]), torch.tensor([3, 0, 5, 1, 2, 4])
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: share)
    monkeypatch.setattr(torch, "randperm", lambda count: order)
    draws = torch.tensor([0.95, 0.1, 0.7, 0.3, 0.3, 0.59])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: draws)
    changed = augmented_batch(batch, trainer.augmentation, "both")
    own = [0.95 < 0.9, 0.1 < 0.2, 0.7 < 0.5, True, False, 0.59 < 0.6]
    expected = [int(batch["labels"][i] if keep else batch["labels"][order[i]]) for i, keep in enumerate(own)]
    assert changed["labels"].tolist() == expected
    mask = torch.maximum(batch["attention_mask"], batch["attention_mask"][order])
    assert torch.equal(changed["attention_mask"], mask)
    models = list(trainer.pair.learners.values())
    with trainer.augmentation.within(models), torch.no_grad():
        mixed = [model.eval()(input_ids=changed["input_ids"], attention_mask=mask).logits for model in models]
    for model, logits in zip(models, mixed, strict=True):
        words = model.get_input_embeddings()(batch["input_ids"])
        embeddings = torch.stack([share[i] * words[i] + (1 - share[i]) * words[order[i]] for i in range(6)])
        with torch.no_grad():
            torch.testing.assert_close(logits, model(inputs_embeds=embeddings, attention_mask=mask).logits)
            plain = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        assert not torch.allclose(plain, logits)


def test_images_are_mixed_themselves(tmp_path):
    batch = tiny_batch("image-classification", 8)
    models = {
        "model": tiny_model("vit", "image-classification"),
        "student_model": tiny_model("vit", "image-classification", 1),
    }
    trainer = tiny_trainer(
        tmp_path, **models, augmentation=Mixup(1.0), train_dataset=rows_of(batch), data_collator=default_data_collator
    )
    trainer.train()
    changed = trainer.augmentation(batch)
    share, order = trainer.augmentation._share, trainer.augmentation._order
    for row in range(8):
        expected = share[row] * batch["pixel_values"][row] + (1 - share[row]) * batch["pixel_values"][order[row]]
        torch.testing.assert_close(changed["pixel_values"][row], expected)


def test_the_choices_of_a_row_are_mixed_with_those_of_another(tmp_path):
    batch = tiny_batch("multiple-choice", 4)
    models = [tiny_model("bert", "multiple-choice", layers) for layers in (2, 1)]
    trainer = tiny_trainer(
        tmp_path,
        model=models[0],
        student_model=models[1],
        augmentation=Mixup(1.0),
        train_dataset=rows_of(batch),
        data_collator=default_data_collator,
    )
    trainer.train()
    mixup, embeddings = trainer.augmentation, models[0].get_input_embeddings()
    mixup(batch)
    with mixup.within(models):
        mixed = embeddings(batch["input_ids"].flatten(0, 1))
    plain = embeddings(batch["input_ids"])
    for row, (share, other) in enumerate(zip(mixup._share, mixup._order, strict=True)):
        for choice in range(3):
            expected = share * plain[row, choice] + (1 - share) * plain[other, choice]
            torch.testing.assert_close(mixed[3 * row + choice], expected)


@pytest.mark.parametrize("kind", [TokenMasking, WordDropout])
def test_changes_of_tokens_are_refused_where_there_are_none(kind, tmp_path):
    models = {
        "model": tiny_model("vit", "image-classification"),
        "student_model": tiny_model("vit", "image-classification", 1),
    }
    with pytest.raises(ValueError, match=rf"`{kind.__name__}` changes tokens.*ViTFor.* takes `pixel_values`"):
        tiny_trainer(tmp_path, **models, augmentation=kind(bert_tokenizer()))


def cut_pair() -> dict:
    teacher = tiny_bert(3, seed=1)
    return {"model": teacher, "student_model": create_student(teacher, 2, layers="first")}


@pytest.mark.parametrize("views", ["teacher", "student"])
@pytest.mark.parametrize("share", ["layers:1", "prefix"])
def test_layers_that_are_run_once_cannot_see_two_views(share, views, tmp_path):
    with pytest.raises(ValueError, match=rf"`augmented='{views}'` and `share='{share}'`.*different inputs"):
        tiny_trainer(tmp_path, **cut_pair(), share=share, augmentation=shift, augmented=views)


def test_shared_embeddings_may_see_two_views(tmp_path):
    """Each model is run on its own view, with what both have in common."""
    trainer = tiny_trainer(tmp_path, **cut_pair(), share="embeddings", augmentation=shift, augmented="student")
    twin = tiny_trainer(tmp_path, **cut_pair(), share="embeddings")
    batch = collate(tiny_rows(4))
    trainer.pair.train()
    loss = trainer.compute_loss(trainer.pair, augmented_batch(batch, shift, "student"))
    labels = batch.pop("labels")
    views = (batch, shift(batch))
    logits = [model(**view).logits for model, view in zip(twin.pair.learners.values(), views, strict=True)]
    logs = [F.log_softmax(each, -1) for each in logits]
    expected = sum(F.cross_entropy(each, labels) for each in logits)
    for own, other in (logs, logs[::-1]):
        expected = expected + F.kl_div(own, other.detach(), reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for own, other in zip(trainer.pair.parameters(), twin.pair.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_a_cache_does_not_take_mixed_rows_for_plain_ones(tmp_path):
    with pytest.raises(ValueError, match=r"`Mixup` and `pretrained_cache_dir=.*mixed rows for plain ones"):
        tiny_trainer(
            tmp_path, augmentation=Mixup(), distillation_mode="community", pretrained_cache_dir=str(tmp_path / "cache")
        )


def test_mixed_rows_without_a_label_count_as_often_as_before(tmp_path):
    """The hard losses of mixed batches are on average those of rows that are mixed with their own weights."""
    rows = [{**row, "labels": row["labels"] if index % 3 else -100} for index, row in enumerate(tiny_rows(6))]
    trainer = tiny_trainer(tmp_path, augmentation=Mixup(1.0), distillation_mode="ctcd")
    batch = collate(rows)
    number = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert number.tolist() == [4, 4, 6]
    torch.manual_seed(0)
    counts = [int((trainer.augmentation(batch)["labels"] != -100).sum()) for _ in range(400)]
    assert set(counts) > {4}
    assert sum(counts) / len(counts) == pytest.approx(4, abs=0.15)


def test_a_shared_embedding_is_mixed_once(tmp_path):
    teacher = tiny_bert(3, seed=1)
    pair = {"model": teacher, "student_model": create_student(teacher, 2, layers="first")}
    tiny_trainer(tmp_path, **pair, share="layers:1", augmentation=Mixup(1.0)).train()
    own = teacher.get_input_embeddings()
    ids = torch.tensor([[3, 4], [5, 6]])
    mixup = Mixup(1.0)
    mixup({"input_ids": ids})
    with mixup.within([pair["model"], pair["student_model"]]):
        mixed = own(ids)
    share = mixup._share[:, None, None]
    torch.testing.assert_close(mixed, share * own(ids) + (1 - share) * own(ids)[mixup._order])


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["word_embeddings"]}, {"target_modules": ["word_embeddings"]}]
)
def test_embeddings_that_have_adapters_are_mixed(options, tmp_path):
    settings = {"target_modules": ["query"], "r": 2, "init_lora_weights": False, **options}
    student = get_peft_model(tiny_bert(2, seed=2), LoraConfig(task_type="SEQ_CLS", **settings))
    trainer = tiny_trainer(tmp_path, student_model=student, augmentation=Mixup(1.0), max_steps=1)
    trainer.train()
    batch = collate(tiny_rows(6))
    changed = augmented_batch(batch, trainer.augmentation, "both")
    share, order = trainer.augmentation._share.reshape(-1, 1, 1), trainer.augmentation._order
    with torch.no_grad():
        words = student.get_base_model().get_input_embeddings()(batch["input_ids"])
        mask = changed["attention_mask"]
        expected = student.eval()(inputs_embeds=share * words + (1 - share) * words[order], attention_mask=mask).logits
        with trainer.augmentation.within([student]):
            mixed = student(input_ids=batch["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(mixed, expected)


def test_masked_language_models_may_see_different_views(tmp_path):
    rows = rows_of(tiny_batch("masked-lm", 8))
    pair = {"model": tiny_model("bert", "masked-lm"), "student_model": tiny_model("bert", "masked-lm", 1)}
    options = {"train_dataset": rows, "data_collator": default_data_collator, "max_steps": 2}
    trainer = tiny_trainer(tmp_path, **pair, **options, augmentation=shift, augmented="student")
    trainer.train()
    assert trainer.pair.fused_heads.used


@pytest.mark.parametrize("views", ["teacher", "student"])
def test_two_views_of_other_lengths_are_not_compared_token_by_token(views, tmp_path):
    def longer(inputs):
        return {**inputs, **{name: torch.cat([inputs[name][:, :1], inputs[name]], 1) for name in inputs}}

    rows = rows_of(tiny_batch("masked-lm", 8))
    pair = {"model": tiny_model("bert", "masked-lm"), "student_model": tiny_model("bert", "masked-lm", 1)}
    options = {"train_dataset": rows, "data_collator": default_data_collator, "max_steps": 2, "augmentation": longer}
    message = rf"`augmented='{views}'`: `augmentation` changes .* `\w+` from \(4, 10\) to \(4, 11\).*Keep the length"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **pair, **options, augmented=views).train()
    tiny_trainer(tmp_path, **pair, **options).train()  # the labels are as long


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": shift, "augmented": "all"}, r"`augmented='all'` is unknown.*both, teacher, student"),
        ({"augmented": "student"}, r"`augmented='student'` has no effect without `augmentation`"),
        ({"augmentation": Mixup(), "augmented": "teacher"}, r"`Mixup` with `augmented='teacher'`.*both"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **options)


def test_mixup_of_tokens_is_refused(tmp_path):
    pair = {"model": tiny_model("bert", "masked-lm"), "student_model": tiny_model("bert", "masked-lm", 1)}
    with pytest.raises(ValueError, match=r"`Mixup` with `augmented='both'` for masked-lm: it mixes whole rows"):
        tiny_trainer(tmp_path, **pair, augmentation=Mixup())


def test_numbers_that_are_no_probability_are_refused():
    for kind in (TokenMasking, WordDropout):
        with pytest.raises(ValueError, match=r"`rate=1.5` is not valid: it is a probability"):
            kind(bert_tokenizer(), 1.5)
    with pytest.raises(ValueError, match=r"`alpha=0` is not valid"):
        Mixup(0)
    with pytest.raises(ValueError, match="has no mask token"):
        TokenMasking(gpt2_tokenizer())


@pytest.mark.parametrize("unscored", [(0, 1), (3,)])
def test_losses_are_means_over_the_labels_that_an_augmentation_leaves(unscored, tmp_path):
    """Trainer counts the labels before they are changed."""

    def unscore(inputs):
        labels = inputs["labels"].clone()
        labels[list(unscored)] = -100
        return {**inputs, "labels": labels}

    trainer = tiny_trainer(tmp_path, **SGD, augmentation=unscore, max_steps=1, logging_steps=1)
    batch = unscore(collate(tiny_rows()[:4]))
    with torch.no_grad():
        expected = {name: model(**batch).loss.item() for name, model in trainer.pair.learners.items()}
    trainer.train()
    logs = trainer.state.log_history[0]
    for name, loss in expected.items():
        assert logs[f"{name}_hard_loss"] == pytest.approx(loss, rel=1e-4)


def test_a_batch_keeps_its_weight_whatever_labels_an_augmentation_leaves():
    task = find_task(tiny_bert())
    before = collate(tiny_rows(4))
    after = {**before, "labels": torch.tensor([0, -100, -100, 1])}
    number = torch.tensor([8, 12])  # of two micro-batches and some rows without a label
    assert recounted(number, shift, task, before, after).tolist() == [4.0, 12.0]
    assert recounted(8, shift, task, before, after) == 4.0
    assert recounted(number, shift, task, before, shift(before)) is number
    assert recounted(number, Mixup(), task, before, after) is number
    assert recounted(None, shift, task, before, after) is None


def test_the_answers_of_questions_are_labels(tmp_path):
    """Both models get the positions of the data, though only one of them gets the changed text."""

    def moved(inputs):
        return {**shift(inputs), "start_positions": inputs["start_positions"] + 1}

    batch = tiny_batch("question-answering", 4)
    pair = {
        "model": tiny_model("bert", "question-answering"),
        "student_model": tiny_model("bert", "question-answering", 1),
    }
    trainer = tiny_trainer(tmp_path, **pair, train_dataset=rows_of(batch), data_collator=default_data_collator)
    changed = augmented_batch(batch, moved, "teacher", trainer.task)
    assert torch.equal(changed["start_positions"], batch["start_positions"])
    assert "student/start_positions" not in changed
    assert torch.equal(changed["input_ids"], shift(batch)["input_ids"])
    assert torch.equal(changed["student/input_ids"], batch["input_ids"])


def test_the_labels_that_are_mixed_are_those_of_the_task():
    task = find_task(tiny_bert(1))
    task.label_names = ("target",)
    batch = {"input_ids": torch.ones(64, 3, dtype=torch.long), "target": torch.arange(64), "labels": torch.arange(64)}
    changed = augmented_batch(batch, Mixup(5.0), "both", task)
    assert torch.equal(changed["labels"], batch["labels"])
    assert not torch.equal(changed["target"], batch["target"])
