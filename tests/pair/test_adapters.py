"""Adapters (PEFT): of either model or of both, in all modes, also on one frozen base."""

import json

import pytest
import torch
from loopback_hub import LoopbackHub, use_hub
from peft import (
    AdaLoraConfig,
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny import assert_same_weights, changed, collate, tiny_bert, tiny_rows, tiny_trainer, weights_of
from torch.nn import functional as F
from transformers import TrainerCallback

from ctcd_trainer import create_student

CONFIGS = {
    "lora": lambda: LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "value"],
        r=2,
        init_lora_weights=False,
        modules_to_save=["classifier"],
    ),
    "ia3": lambda: IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
    ),
}
ATTENTION = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
#: Other types, which are adapters, too; the last two are tokens that are learnt.
MORE_CONFIGS = {
    "dora": lambda: LoraConfig(r=2, use_dora=True, **ATTENTION),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=5, **ATTENTION),
    "vera": lambda: VeraConfig(r=2, **ATTENTION),
    "oft": lambda: OFTConfig(oft_block_size=4, **ATTENTION),
    "loha": lambda: LoHaConfig(r=2, **ATTENTION),
    "norms": lambda: LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    "prompt": lambda: PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


def adapted(model, kind: str = "lora", seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(model, (CONFIGS | MORE_CONFIGS)[kind]())


def pair_of(kind: str = "lora", which: str = "both") -> dict:
    teacher, student = tiny_bert(3, seed=1), tiny_bert(2, seed=2)
    return {
        "model": adapted(teacher, kind) if which in ("both", "teacher") else teacher,
        "student_model": adapted(student, kind, 1) if which in ("both", "student") else student,
    }


def shared_pair() -> dict:
    base = tiny_bert(3, seed=1)
    student = create_student(base, 2, layers="first", init="shared")
    return {"model": adapted(base), "student_model": adapted(student, seed=1)}


def base_weights(model: PeftModel) -> dict:
    return {
        name: value
        for name, value in weights_of(model).items()
        if "lora" not in name and "ia3" not in name and "modules_to_save" not in name
    }


@pytest.mark.parametrize("mode", ["ctcd", "kd", "reversed", "standalone", "community"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_base_weights_never_change_and_only_adapters_are_optimized(kind, mode, tmp_path):
    pair = pair_of(kind)
    frozen = {"kd": "model", "reversed": "student_model"}.get(mode)
    if frozen is not None:  # as `PeftModel.from_pretrained` loads an adapter that was trained before
        pair[frozen].requires_grad_(False)
    before = {name: base_weights(model) for name, model in pair.items()}
    trainer = tiny_trainer(tmp_path, **pair, distillation_mode=mode)
    adapters = {name: weights_of(model) for name, model in pair.items()}
    trainer.train()
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for name, model in pair.items():
        assert all(torch.equal(value, before[name][key]) for key, value in base_weights(model).items())
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, adapters[name][k])}
        assert (not changed) == (name == frozen)
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {id(parameter) for parameter in model.parameters()} & held


@pytest.mark.parametrize("which", ["both", "teacher", "student"])
def test_adapters_are_saved_as_adapters_and_merge_to_the_same_logits(which, tmp_path):
    trainer = tiny_trainer(tmp_path, **pair_of(which=which))
    trainer.train()
    trainer.save_model()
    batch = collate(tiny_rows(4))
    bases = {"teacher": tiny_bert(3, seed=1), "student": tiny_bert(2, seed=2)}
    for name, folder in (("teacher", tmp_path), ("student", tmp_path / "student")):
        model = trainer.pair.learners[name].eval()
        with torch.no_grad():
            expected = model(**batch).logits
            if which not in ("both", name):
                assert not (folder / "adapter_config.json").exists()
                continue
            assert not (folder / "model.safetensors").exists()
            assert all("lora" in key or "classifier" in key for key in load_file(folder / "adapter_model.safetensors"))
            loaded = PeftModel.from_pretrained(bases[name], folder).eval()
            torch.testing.assert_close(loaded(**batch).logits, expected)
            torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected)


@pytest.mark.parametrize("pair", [pair_of, shared_pair])
def test_it_resumes_bit_for_bit_with_a_rate_for_each_model(pair, tmp_path):
    options = {"student_learning_rate": 3e-2}
    whole = tiny_trainer(tmp_path, **pair(), **options, save_strategy="steps", save_steps=2)
    whole.train()
    begun = {(group["learner"], group["initial_lr"]) for group in whole.optimizer.param_groups}
    assert begun == {("teacher", 1e-2), ("student", 3e-2)}
    resumed = tiny_trainer(tmp_path, **pair(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, whole.pair)
    other = tiny_trainer(tmp_path, **pair())
    other.train()
    assert not torch.equal(
        torch.cat([p.flatten() for p in other.student_model.parameters()]),
        torch.cat([p.flatten() for p in whole.student_model.parameters()]),
    )


@pytest.mark.parametrize("kind", MORE_CONFIGS)
def test_other_types_train_resume_load_and_leave_their_base_alone(kind, tmp_path):
    pair = pair_of(kind)
    before = {name: weights_of(model) for name, model in pair.items()}
    whole = tiny_trainer(tmp_path, **pair, save_strategy="steps", save_steps=2, max_steps=4)
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    resumed = tiny_trainer(tmp_path, **pair_of(kind), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, whole.pair)
    held = {id(parameter) for group in whole.optimizer.param_groups for parameter in group["params"]}
    batch = collate(tiny_rows(4))
    batch.pop("labels")  # PEFT's AdaLoRA cannot compute a loss once it is loaded to predict
    folders = {"model": "saved", "student_model": "saved/student"}
    for (argument, model), base in zip(pair.items(), (tiny_bert(3, seed=1), tiny_bert(2, seed=2)), strict=True):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert changed(model, before[argument]) <= trained
        assert {name for name, parameter in model.named_parameters() if id(parameter) in held} == trained
        assert any(name in trained for name in changed(model, before[argument]) if "classifier" not in name)
        assert (tmp_path / folders[argument] / "adapter_config.json").is_file()
        loaded = PeftModel.from_pretrained(base, tmp_path / folders[argument]).eval()
        with torch.no_grad():
            expected = model.eval()(**batch).logits
            torch.testing.assert_close(loaded(**batch).logits, expected)
            if kind not in ("prompt", "prefix"):
                torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_ranks_are_allocated_by_a_callback_as_peft_asks_for(tmp_path):
    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            for learner in model.learners.values():
                learner.base_model.update_and_allocate(state.global_step + 1)

    trainer = tiny_trainer(tmp_path, **pair_of("adalora"), max_steps=6, callbacks=[Allocate()])
    trainer.train()
    for model, projections in zip(trainer.pair.learners.values(), (6, 4), strict=True):
        ranks = [p.count_nonzero().item() for name, p in model.named_parameters() if "lora_E" in name]
        assert len(ranks) == projections
        assert sum(ranks) == 2 * projections  # `target_r` on average, of 4 at first


def test_the_loss_is_that_of_plain_pytorch(tmp_path):
    trainer = tiny_trainer(tmp_path, **pair_of(), temperature=2.0)
    batch = collate(tiny_rows(4))
    loss = trainer.compute_loss(trainer.pair.train(), dict(batch))
    loss.backward()
    pair = pair_of()
    logits = [model.train()(**batch).logits for model in pair.values()]
    expected = sum(F.cross_entropy(each, batch["labels"]) for each in logits)
    for own, other in (logits, logits[::-1]):
        logs = [F.log_softmax(each / 2, -1) for each in (own, other.detach())]
        expected = expected + 4 * F.kl_div(*logs, reduction="batchmean", log_target=True)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for model, own in zip(pair.values(), trainer.pair.learners.values(), strict=True):
        for name, parameter in model.named_parameters():
            found = own.get_parameter(name).grad
            assert (found is None) == (parameter.grad is None)
            if found is not None:
                torch.testing.assert_close(found, parameter.grad)


@pytest.mark.parametrize("projected", ["encoder", "prefix"])
def test_tokens_whose_network_peft_does_not_save_are_not_loaded_again(projected, tmp_path):
    config = {
        "encoder": lambda: PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix": lambda: PrefixTuningConfig(
            task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8, prefix_projection=True
        ),
    }[projected]
    trainer = tiny_trainer(
        tmp_path, student_model=get_peft_model(tiny_bert(2), config()), save_strategy="steps", save_steps=2
    )
    trainer.train()
    again = tiny_trainer(tmp_path, student_model=get_peft_model(tiny_bert(2), config()))
    with pytest.raises(ValueError, match=r"Resuming from .*checkpoint-2.* adapter of the student.*prompt encoder"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny_rows()}
    with pytest.raises(ValueError, match=r"`load_best_model_at_end=True` loads the adapter of the student"):
        tiny_trainer(
            tmp_path,
            student_model=get_peft_model(tiny_bert(2), config()),
            save_strategy="steps",
            save_steps=2,
            **best,
        )


def test_adapters_are_pushed_as_adapters(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        use_hub(monkeypatch, hub)
        trainer = tiny_trainer(tmp_path, **pair_of(), push_to_hub=True, hub_model_id="me/pair")
        trainer.train()
        trainer.push_to_hub()
        adapter = {"adapter_config.json", "adapter_model.safetensors"}
        assert adapter | {f"student/{name}" for name in adapter} <= hub.files("me/pair").keys()
        assert adapter <= hub.files("me/pair-student").keys()
        for repo in ("me/pair", "me/pair-student"):
            assert not [
                name
                for name in hub.files(repo)
                if name.endswith(("model.safetensors", "pytorch_model.bin")) and "adapter" not in name
            ]
        batch = collate(tiny_rows(4))
        for repo, base, model in (
            ("me/pair", tiny_bert(3, seed=1), trainer.teacher_model),
            ("me/pair-student", tiny_bert(2, seed=2), trainer.student_model),
        ):
            with torch.no_grad():
                loaded = PeftModel.from_pretrained(base, repo).eval()
                torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_a_frozen_teacher_may_have_an_adapter(tmp_path):
    pretrained = adapted(tiny_bert(2, seed=3))
    expected = pretrained.eval()(**collate(tiny_rows(4))).logits.detach()
    trainer = tiny_trainer(tmp_path, distillation_mode="community", pretrained_teacher=pretrained, logging_steps=1)
    before = weights_of(pretrained)
    trainer.train()
    assert_same_weights(pretrained, before)
    torch.testing.assert_close(pretrained(**collate(tiny_rows(4))).logits, expected)
    assert trainer.state.log_history[0]["student_from_pretrained_loss"] > 0


def test_two_adapters_on_one_frozen_base_train_as_on_two(tmp_path):
    base, other = tiny_bert(3, seed=1), tiny_bert(3, seed=1)
    apart = {
        "model": adapted(base),
        "student_model": adapted(create_student(other, 2, layers="first"), seed=1),
    }
    trainers = [tiny_trainer(tmp_path, **pair) for pair in (shared_pair(), apart)]
    for trainer in trainers:
        trainer.train()
    assert_same_weights(trainers[0].pair, trainers[1].pair)
    storages = [{p.untyped_storage().data_ptr() for p in trainer.pair.parameters()} for trainer in trainers]
    sizes = [sum(p.numel() for p in {p.data_ptr(): p for p in t.pair.parameters()}.values()) for t in trainers]
    assert len(storages[0]) < len(storages[1])
    students = sum(p.numel() for p in trainers[1].student_model.parameters())
    adapters = sum(p.numel() for p in trainers[1].student_model.parameters() if p.requires_grad)
    assert sizes[1] - sizes[0] == pytest.approx(students - adapters, rel=0.05)


def test_each_of_two_adapters_on_one_base_is_saved_complete(tmp_path):
    trainer = tiny_trainer(tmp_path, **shared_pair())
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "student" / "adapter_config.json").read_text())
    assert config["r"] == 2
    batch = collate(tiny_rows(4))
    base = create_student(tiny_bert(3, seed=1), 2, layers="first")
    loaded = PeftModel.from_pretrained(base, tmp_path / "student").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trainer.student_model.eval()(**batch).logits)


def test_a_shared_base_that_is_trained_is_refused(tmp_path):
    teacher = tiny_bert(3)
    student = create_student(teacher, 2, init="shared")
    with pytest.raises(ValueError, match=r"`model` and `student_model` share a parameter"):
        tiny_trainer(tmp_path, model=teacher, student_model=student)


def test_a_shared_base_cannot_be_narrower():
    with pytest.raises(ValueError, match=r"`init='shared'` has the teacher's own tensors.*intermediate_size=8"):
        create_student(tiny_bert(3), intermediate_size=8, init="shared")


@pytest.mark.parametrize(("mode", "learner"), [("kd", "teacher"), ("reversed", "student")])
def test_adapters_to_train_on_a_model_that_the_mode_freezes_are_refused(mode, learner, tmp_path):
    with pytest.raises(
        ValueError, match=rf"The {learner} has adapters to train.*'{mode}'` freezes it.*is_trainable=False"
    ):
        tiny_trainer(tmp_path, **pair_of(), distillation_mode=mode)


def test_a_frozen_adalora_teaches_unless_it_was_loaded_to_predict_only(tmp_path):
    adapted(tiny_bert(3, seed=1), "adalora").save_pretrained(tmp_path / "adapter")
    students = {"distillation_mode": "kd", "student_model": tiny_bert(2, seed=2)}
    loaded = PeftModel.from_pretrained(tiny_bert(3, seed=1), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"The teacher has an AdaLoRA .*`is_trainable=True` and call `requires_grad_"):
        tiny_trainer(tmp_path / "out", model=loaded, **students)
    loaded = PeftModel.from_pretrained(tiny_bert(3, seed=1), tmp_path / "adapter", is_trainable=True)
    trainer = tiny_trainer(tmp_path / "out", model=loaded.requires_grad_(False), **students)
    before = weights_of(loaded)
    trainer.train()
    assert trainer.evaluate(tiny_rows())["eval_loss"] > 0
    assert_same_weights(loaded, before)


@pytest.mark.parametrize("argument", ["model", "student_model"])
def test_adapters_that_transformers_added_are_refused(argument, tmp_path):
    model = tiny_bert(2)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=rf"`{argument}` contains the adapters \['default'\].*get_peft_model"):
        tiny_trainer(tmp_path, **{argument: model})


def test_the_auto_class_of_peft_loads_what_has_a_base_to_load(tmp_path):
    base = tiny_bert(2, seed=2)
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "out", student_model=adapted(loaded))
    trainer.train()
    trainer.save_model()
    found = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student", num_labels=3).eval()
    batch = collate(tiny_rows(4))
    with torch.no_grad():
        torch.testing.assert_close(found(**batch).logits, trainer.student_model.eval()(**batch).logits)
