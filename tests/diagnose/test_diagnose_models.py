"""`diagnose` of models, and the command."""

import copy
import json
import runpy
import sys

import pytest
import torch
from tiny import assert_same_weights, tiny_bert, tiny_rows
from tiny_models import rows_of, tiny_batch, tiny_model
from tiny_tokenizer import bert_tokenizer
from transformers import BertForSequenceClassification

import ctcd_trainer
from ctcd_trainer import diagnose

HEADS = {
    "token-classification": "bert",
    "question-answering": "bert",
    "multiple-choice": "bert",
    "image-classification": "vit",
    "masked-lm": "bert",
    "causal-lm": "gpt2",
    "seq2seq-lm": "t5",
}


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_are_those_of_the_models(head):
    teacher, student = tiny_model(HEADS[head], head, 2, seed=1), tiny_model(HEADS[head], head, 1, seed=2)
    batch = tiny_batch(head, rows=12)
    if head == "question-answering":
        batch["attention_mask"].fill_(1)  # the loss of transformers counts padding, the task does not
    found = diagnose(teacher, student, rows_of(batch), batch_size=12)
    for name, model in (("teacher", teacher), ("student", student)):
        with torch.no_grad():
            assert found.models[name].loss == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
    assert found.task == head
    assert 0 <= found.agreement <= 1


def test_the_models_stay_as_they_were():
    """A teacher that an earlier training has frozen, a student in training mode; in batches of other sizes."""
    teacher, student = (
        tiny_bert(3, seed=1, dropout=0.3).requires_grad_(False).eval(),
        tiny_bert(2, seed=2, dropout=0.3),
    )
    student.bert.embeddings.requires_grad_(False)
    before = copy.deepcopy((teacher, student.train()))
    first = diagnose(teacher, student, tiny_rows(), batch_size=5, train_dataset=tiny_rows(12, seed=1))
    for model, copied in zip((teacher, student), before, strict=True):
        assert model.training == copied.training
        assert_same_weights(model, copied)
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in copied.parameters()]
    again = diagnose(teacher, student, tiny_rows())
    assert first.models["student"].loss == pytest.approx(again.models["student"].loss, rel=1e-5)
    assert first.models["teacher"].training_loss is not None
    with pytest.raises(ValueError, match=r"`weight=0` is not valid"):
        diagnose(teacher, student, tiny_rows(), weight=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of two models with a tokenizer, and a file of texts."""
    folder, tokenizer = tmp_path_factory.mktemp("saved"), bert_tokenizer()
    for name, layers in (("teacher", 2), ("student", 1)):
        model = tiny_bert(layers, seed=layers, vocab_size=len(tokenizer), num_labels=2)
        model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [f"{text},{label}" for text in ("the cat sees anna", "paul likes the dog .") for label in ("yes", "No")]
    (folder / "dev.csv").write_text("\n".join(["text,label", *lines * 4]), encoding="utf-8")
    return folder


def run(monkeypatch, capsys, *arguments):
    """Run the command; what it prints, or its error."""
    monkeypatch.setattr(sys, "argv", ["diagnose", *map(str, arguments)])
    try:
        runpy.run_module("ctcd_trainer.diagnose", run_name="__main__")
    except SystemExit as stop:
        return str(stop)
    return capsys.readouterr().out


def test_the_command_prints_and_writes_the_diagnosis(saved, tmp_path, monkeypatch, capsys):
    printed = run(monkeypatch, capsys, saved / "teacher", saved / "student", saved / "dev.csv", "--output", tmp_path)
    assert printed == (tmp_path / "diagnosis.md").read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "diagnosis.json").read_text(encoding="utf-8"))
    assert numbers["advice"] == printed.splitlines()[-2:]
    assert (tmp_path / "diagnosis.png").exists()
    tokenizer = bert_tokenizer()
    rows = [
        dict(tokenizer(text), label=label)
        for text in ("the cat sees anna", "paul likes the dog .")
        for label in (1, 0)
    ]
    models = [BertForSequenceClassification.from_pretrained(saved / name) for name in ("teacher", "student")]
    expected = diagnose(*models, rows * 4, processing_class=tokenizer)
    assert numbers["models"]["student"]["loss"] == pytest.approx(expected.models["student"].loss, rel=1e-5)
    assert ctcd_trainer.diagnose is diagnose, "the module has the name of the function"


def test_the_command_names_what_is_wrong_with_the_data(saved, tmp_path, monkeypatch, capsys):
    models = saved / "teacher", saved / "student"
    assert "is no folder, and no file" in run(monkeypatch, capsys, *models, tmp_path / "dev.xlsx")
    assert "Name one or two of them by --text" in run(
        monkeypatch, capsys, *models, saved / "dev.csv", "--text", "sentence"
    )
    (tmp_path / "dev.csv").write_text("text,label\nthe cat,maybe\n", encoding="utf-8")
    assert "Label 'maybe'" in run(monkeypatch, capsys, *models, tmp_path / "dev.csv")
    assert "`TEACHER=" in run(monkeypatch, capsys, tmp_path / "nothing", models[1], saved / "dev.csv")
