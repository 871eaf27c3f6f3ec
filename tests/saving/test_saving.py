"""What is written: two complete models that load with plain transformers, and give the logits that the trainer saw."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import assert_same_weights, tiny_bert, tiny_trainer, weights_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)


@pytest.fixture
def tokenizer():
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(46))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


LOAD_WITHOUT_THE_PACKAGE = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

root, text = sys.argv[1:]
result = {}
for name, loaded in {
    "teacher": (AutoModelForSequenceClassification.from_pretrained(root), root),
    "student": (AutoModelForSequenceClassification.from_pretrained(root, subfolder="student"), root + "/student"),
    "student folder": (AutoModelForSequenceClassification.from_pretrained(root + "/student"), root + "/student"),
}.items():
    model, folder = loaded
    stored = load_file(folder + "/model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    classifier = pipeline("text-classification", model=folder, tokenizer=folder, top_k=None, function_to_apply="none")
    scores = {score["label"]: score["score"] for score in classifier(text)[0]}
    result[name] = [scores[model.config.id2label[i]] for i in range(model.config.num_labels)]
assert "ctcd_trainer" not in sys.modules
print(json.dumps(result))
"""


def test_both_models_load_in_a_process_without_this_package_and_give_the_trainers_logits(tokenizer, tmp_path):
    trainer = tiny_trainer(tmp_path, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    text = "w1 w7 w20 w3"
    encoded = tokenizer(text)
    output = trainer.predict([{**encoded}], student_predictions=True)

    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(tmp_path), text],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])

    np.testing.assert_allclose(result["teacher"], output.predictions[0], atol=1e-5)
    np.testing.assert_allclose(result["student"], output.student_predictions[0], atol=1e-5)
    assert result["student folder"] == result["student"]
    assert not np.allclose(result["teacher"], result["student"], atol=1e-3)


def test_every_checkpoint_holds_both_models_complete(tokenizer, tmp_path):
    trainer = tiny_trainer(tmp_path, processing_class=tokenizer, save_strategy="steps", save_steps=2)
    trainer.train()
    complete = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for folder in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert complete <= {file.name for file in folder.iterdir()}
        assert complete <= {file.name for file in (folder / "student").iterdir()}


def test_the_config_of_each_saved_model_is_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    for folder, layers in ((tmp_path, 3), (tmp_path / "student", 2)):
        config = json.loads((folder / "config.json").read_text())
        assert config["num_hidden_layers"] == layers
        assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_student_of_another_family_is_written_whole(tmp_path):
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)
    student = GPT2ForSequenceClassification(config)
    trainer = tiny_trainer(tmp_path, student_model=student)
    trainer.train()
    trainer.save_model()
    assert_same_weights(GPT2ForSequenceClassification.from_pretrained(tmp_path / "student"), student)


# ---- PEFT ----


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


@pytest.mark.parametrize("wrapped", [("teacher",), ("student",), ("teacher", "student")], ids=str)
def test_lora_models_train_their_adapters_only_and_resume(wrapped, tmp_path):
    def trainer():
        models = {"teacher": tiny_bert(3, 1), "student": tiny_bert(2, 2)}
        torch.manual_seed(0)
        models |= {name: lora(models[name]) for name in wrapped}
        return tiny_trainer(
            tmp_path,
            model=models["teacher"],
            student_model=models["student"],
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
        )

    whole = trainer()
    before = {name: weights_of(model) for name, model in whole.pair.learners.items()}
    whole.train()
    for name in wrapped:
        model = whole.pair.learners[name]
        for key, value in model.state_dict().items():
            adapts = "lora_" in key or "modules_to_save" in key
            assert torch.equal(value, before[name][key]) != adapts, key
        folder = tmp_path / "checkpoint-4" / ("student" if name == "student" else "")
        assert (folder / "adapter_model.safetensors").is_file()
        base = tiny_bert(3, 1) if name == "teacher" else tiny_bert(2, 2)
        loaded = PeftModel.from_pretrained(base, folder)
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in whole.pair.parameters() if p.requires_grad}

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.teacher_model, whole.teacher_model)
    assert_same_weights(resumed.student_model, whole.student_model)


def test_saved_weights_are_safetensors_of_the_plain_names(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    assert set(load_file(tmp_path / "student" / "model.safetensors")) == set(tiny_bert(2).state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_bert(3).state_dict())


def test_a_sharded_save_of_the_pair_loads_both(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded" / "student").glob("model-*.safetensors"))) > 1
    for folder, model in (("", trainer.teacher_model), ("student", trainer.student_model)):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sharded" / folder)
        assert_same_weights(loaded, model)
