"""The bases of adapters: a saved learner loads with the logits that the trainer saw, or loading fails."""

import shutil
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub, use_hub
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PromptTuningConfig, get_peft_model
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import tiny_model
from tiny_tokenizer import bert_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from ctcd_trainer import create_student

NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
LOADERS = [AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification]


def lora(model, **settings):
    torch.manual_seed(0)
    options = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**options, **settings}))


def teacher_at(folder, **settings):
    """A model that was loaded by the name of a folder."""
    tiny_bert(3, seed=1, vocab_size=128, **NAMES, **settings).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def logits_of(model):
    batch = collate(tiny_rows(4))
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer of a LoRA pair after two checkpoints; the student is cut from the base, whose tensors it shares."""
    root = tmp_path_factory.mktemp("bases")
    base = teacher_at(root / "named")
    student = create_student(base, 2, init="shared")
    trainer = tiny_trainer(
        root / "out",
        model=lora(base),
        student_model=lora(student),
        processing_class=bert_tokenizer(),
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=tiny_rows(4),
        student_metric_for_best_model="loss",
    )
    trainer.train()
    trainer.save_model()
    return trainer


def test_a_cut_student_loads_with_its_logits_and_labels_also_where_it_was_moved(trained, tmp_path):
    out = Path(trained.args.output_dir)
    expected = logits_of(trained.student_model)
    for folder in (out / "student", out / "checkpoint-2" / "student"):
        for loader in LOADERS:
            loaded = loader.from_pretrained(folder)
            torch.testing.assert_close(logits_of(loaded), expected)
            assert loaded.config.id2label == NAMES["id2label"]
    moved = shutil.copytree(out / "student", tmp_path / "elsewhere")
    torch.testing.assert_close(logits_of(AutoModelForSequenceClassification.from_pretrained(moved)), expected)
    classify = pipeline("text-classification", model=str(moved))
    tokens = bert_tokenizer()("the red cat", return_tensors="pt")
    probabilities = trained.student_model.eval()(**tokens).logits.softmax(-1)[0].tolist()
    found = classify("the red cat", top_k=None)
    assert {each["label"]: each["score"] for each in found} == pytest.approx(
        {name: probabilities[index] for index, name in NAMES["id2label"].items()}, abs=1e-5
    )


def test_a_base_that_its_name_leads_to_is_not_copied(trained):
    out = Path(trained.args.output_dir)
    assert not (out / "config.json").exists()
    assert not list(out.glob("model*"))
    torch.testing.assert_close(
        logits_of(AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=3)),
        logits_of(trained.teacher_model),
    )


def test_the_checkpoints_hold_one_copy_of_a_base_and_the_output_folder_its_own(trained):
    out = Path(trained.args.output_dir)
    files = [out / name / "model.safetensors" for name in ("checkpoint-1/student", "checkpoint-2/student")]
    best = out / "best-student" / "model.safetensors"
    assert len({path.stat().st_ino for path in (*files, best)}) == 1
    assert (out / "student" / "model.safetensors").stat().st_nlink == 1  # it may be written to
    for loader in LOADERS:
        loader.from_pretrained(out / "best-student")
    assert not any("_partial" in path.read_text() for path in out.rglob("adapter_config.json"))


def test_a_pair_with_a_saved_base_resumes_bit_for_bit(trained, tmp_path):
    root = Path(trained.args.output_dir).parent
    base = AutoModelForSequenceClassification.from_pretrained(root / "named")
    student = lora(create_student(base, 2))
    again = tiny_trainer(tmp_path, model=lora(base), student_model=student, max_steps=2)
    again.train(resume_from_checkpoint=str(root / "out" / "checkpoint-1"))
    assert_same_weights(again.pair, trained.pair)


def test_the_card_loads_the_student(trained, monkeypatch):
    folder = Path(trained.args.output_dir) / "student"
    card = (folder / "README.md").read_text()
    assert "`peft` must be installed" in card
    monkeypatch.chdir(folder)
    loaded = {}
    exec(card.split("```python\n")[1].split("```")[0], loaded)
    torch.testing.assert_close(logits_of(loaded["model"]), logits_of(trained.student_model))


def test_on_the_hub_an_adapter_names_the_repository_that_holds_its_base(tmp_path, monkeypatch):
    base = teacher_at(tmp_path / "named")
    student = create_student(base, 2)
    base.bert.pooler.dense.bias.data += 0.5  # no name leads to it any more
    with LoopbackHub() as hub:
        use_hub(monkeypatch, hub)
        trainer = tiny_trainer(
            tmp_path / "out", model=lora(base), student_model=lora(student), push_to_hub=True, hub_model_id="me/pair"
        )
        monkeypatch.setattr(trainer, "_write_full_cards", lambda **_: None)  # which would time the models
        trainer.push_to_hub()
        for repository, model in (("me/pair", trainer.teacher_model), ("me/pair-student", trainer.student_model)):
            for loader in LOADERS:
                torch.testing.assert_close(logits_of(loader.from_pretrained(repository)), logits_of(model))
        for name, text in hub.files("me/pair").items():
            assert not name.endswith("adapter_config.json") or str(tmp_path).encode() not in text
    for folder, model in (("out", trainer.teacher_model), ("out/student", trainer.student_model)):
        for loader in LOADERS:
            torch.testing.assert_close(logits_of(loader.from_pretrained(tmp_path / folder)), logits_of(model))


@pytest.mark.parametrize("kind", ["prompt", "pissa", "deleted"])
def test_a_base_that_cannot_be_saved_fails_at_loading(kind, tmp_path):
    student = create_student(teacher_at(tmp_path / "named"), 2)
    if kind == "prompt":
        student = get_peft_model(student, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    else:
        student = lora(student, init_lora_weights="pissa" if kind == "pissa" else False)
    if kind == "deleted":
        shutil.rmtree(tmp_path / "named")
    trainer = tiny_trainer(tmp_path / "out", model=tiny_bert(3, vocab_size=128), student_model=student, max_steps=1)
    trainer.train()
    trainer.save_model()
    for loader in LOADERS:
        if kind == "deleted":
            loaded = loader.from_pretrained(tmp_path / "out" / "student")
            torch.testing.assert_close(logits_of(loaded), logits_of(student))
        else:
            with pytest.raises((OSError, ValueError)):
                loader.from_pretrained(tmp_path / "out" / "student")


def test_tied_weights_of_a_cut_language_model(tmp_path):
    tiny_model("gpt2", "causal-lm", 3).save_pretrained(tmp_path / "named")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "named")
    config = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    student = lora(create_student(base, 2), **config)
    trainer = tiny_trainer(tmp_path / "out", model=lora(base, **config), student_model=student)
    trainer.save_model()
    assert not (tmp_path / "out" / "config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.student_model))
