"""Quantised bases under adapters, and quantised frozen models; with whichever library for it is installed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

from ctcd_trainer import create_student, estimate
from ctcd_trainer.model_structure import memory_of

OWN = ["classifier"]  # what adapters train as a whole stays as it is
SIZES = {"hidden_size": 64, "intermediate_size": 64}


def torchao_config() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(quant_type=Int8WeightOnlyConfig(), modules_to_not_convert=OWN)


BACKENDS: dict[str, tuple[str, Callable]] = {
    "torchao": ("torchao", torchao_config),
    "8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=OWN)),
    "quanto": ("optimum.quanto", lambda: QuantoConfig(weights="int8", modules_to_not_convert=OWN)),
}


@pytest.fixture(params=BACKENDS)
def load(request, tmp_path) -> Callable[[int, int], PreTrainedModel]:
    """Loads a model of so many layers, quantised."""
    package, config = BACKENDS[request.param]
    pytest.importorskip(package)

    def load(layers: int, seed: int) -> PreTrainedModel:
        folder = tmp_path / f"base-{layers}-{seed}"
        tiny_bert(layers, seed=seed, **SIZES).save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=config(), dtype=torch.float32
        )

    return load


def adapted(model: PreTrainedModel, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    own = {"target_modules": ["query", "value"], "init_lora_weights": False, "modules_to_save": OWN}
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, **own))


def whole(layers: int, seed: int) -> PreTrainedModel:
    return tiny_bert(layers, seed=seed, **SIZES)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.dequantize() if is_traceable_wrapper_subclass(value) else value).detach().clone()
        for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("which", ["teacher", "student", "both"])
def test_adapters_on_a_quantised_base_are_trained_saved_and_resumed(which, load, request, tmp_path):
    def pair() -> dict:
        return {
            "model": whole(3, 1) if which == "student" else adapted(load(3, 1)),
            "student_model": whole(2, 2) if which == "teacher" else adapted(load(2, 2), 1),
        }

    trainer = tiny_trainer(tmp_path, **pair(), save_strategy="steps", save_steps=1, max_steps=2)
    batch = collate(tiny_rows(4))
    learners = list(trainer.pair.learners.values())
    with torch.no_grad():
        logits = [model.train()(**batch).logits for model in learners]
        expected = sum(F.cross_entropy(each, batch["labels"]) for each in logits)
        logs = [F.log_softmax(each, -1) for each in logits]
        expected += sum(F.kl_div(*each, reduction="batchmean", log_target=True) for each in (logs, logs[::-1]))
        torch.testing.assert_close(trainer.compute_loss(trainer.pair, dict(batch)), expected)
    before = {name: values_of(model) for name, model in trainer.pair.learners.items()}
    trainer.train()
    resumed = tiny_trainer(tmp_path, **pair(), max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for name, model in trainer.pair.learners.items():
        again = values_of(resumed.pair.learners[name])
        for key, value in values_of(model).items():
            trained = model.get_parameter(key).requires_grad
            assert trained == (id(model.get_parameter(key)) in held)
            assert trained or torch.equal(value, before[name][key]), key
            assert torch.equal(value, again[key]), key
        if which in (name, "both"):
            folder = trainer.pair.folder_of(name, str(tmp_path / "checkpoint-2"))
            assert not Path(folder, "model.safetensors").exists()
            loaded = PeftModel.from_pretrained(load(*{"teacher": (3, 1), "student": (2, 2)}[name]), folder).eval()
            with torch.no_grad():
                logits = model.eval()(**batch).logits
                torch.testing.assert_close(loaded(**batch).logits, logits)
                if "torchao" in request.node.name:  # the others round the merged weights coarsely, or wrongly (quanto)
                    merged = loaded.merge_and_unload()(**batch).logits
                    assert (merged - logits).norm() < 0.05 * logits.norm()


@pytest.mark.parametrize("mode", ["kd", "community", "reversed"])
def test_a_quantised_model_that_is_frozen_teaches(mode, load, request, tmp_path):
    roles = {"kd": "model", "community": "pretrained_teacher", "reversed": "student_model"}
    frozen = load(2, 3)
    models = lambda frozen: {"model": whole(3, 1), "student_model": whole(2, 2), roles[mode]: frozen}  # noqa: E731
    before = values_of(frozen)
    settings = {
        "distillation_mode": mode,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    if "quanto" in request.node.name and mode != "community":
        with pytest.raises(ValueError, match=r"is saved with the pair.*cannot save them.*pretrained_teacher"):
            tiny_trainer(tmp_path, **models(frozen), **settings)
        return
    trainer = tiny_trainer(tmp_path, **models(frozen), **settings)
    trainer.train()
    resumed = tiny_trainer(tmp_path, **models(load(2, 3)), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name in trainer.pair.trained:
        assert_same_weights(resumed.pair.learners[name], trainer.pair.learners[name])
    assert trainer.state.log_history[0]["loss"] > 0
    assert frozen.is_quantized
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(torch.equal(value, before[name]) for name, value in values_of(frozen).items())


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_quantised_model_without_adapters_is_not_trained(which, load, tmp_path):
    models = {"model": whole(3, 1), "student_model": whole(2, 2)}
    models[{"teacher": "model", "student": "student_model"}[which]] = load(2, 3)
    with pytest.raises(ValueError, match=rf"trains the {which}, whose weights are quantised .*get_peft_model"):
        tiny_trainer(tmp_path, **models)


def test_both_have_adapters_on_one_quantised_base(load, tmp_path):
    base = load(3, 1)
    student = create_student(base, 2, layers=[0, 2], init="shared")
    assert {memory_of(p) for p in student.parameters()} < {memory_of(p) for p in base.parameters()}
    batch = collate(tiny_rows(4))
    fewer = load(3, 1).eval()
    del fewer.bert.encoder.layer[1]
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(**batch).logits, fewer(**batch).logits)
    trainer = tiny_trainer(tmp_path, model=adapted(base), student_model=adapted(student, 1), max_steps=2)
    before = {name: values_of(model) for name, model in trainer.pair.learners.items()}
    trainer.train()
    trainer.save_model()
    for name, model in trainer.pair.learners.items():
        for key, value in values_of(model).items():
            assert model.get_parameter(key).requires_grad or torch.equal(value, before[name][key]), key
    again = create_student(load(3, 1), 2, layers=[0, 2], init="shared")
    loaded = PeftModel.from_pretrained(again, tmp_path / "student").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trainer.student_model.eval()(**batch).logits)


def test_a_student_is_not_copied_from_quantised_weights(load):
    teacher = load(3, 1)
    with pytest.raises(ValueError, match=r"`teacher` is quantised .*`init='copy'` needs its weights.*init='shared'"):
        create_student(teacher, 2)
    student = create_student(teacher, 2, init="random")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert estimate(teacher, seconds=0.01).flops_per_token is None
