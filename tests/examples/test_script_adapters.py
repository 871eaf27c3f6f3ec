"""Adapters from the command line of `run_glue_ctcd.py`: saved as adapters, on a base that does not change."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from script_glue import glue_rows, save_glue
from script_runs import results
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from ctcd_trainer import create_student

CUT = {"num_hidden_layers": 2, "layers": "first"}
SHARED = {"student_init": "shared", "lora_r": 2, "student_lora_r": 3, "lora_target_modules": "all-linear"}


def base_of(folder: str) -> AutoModelForSequenceClassification:
    set_seed(42)  # the head is new, and drawn with the seed of the training
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"lora_r": 2, "student_lora_r": 3, "lora_target_modules": "query,key"}, (2, 3)),
        ({"student_lora_r": 3}, (None, 3)),
        (SHARED, (2, 3)),
    ],
)
def test_adapters_load_on_the_cut_base_and_score_as_was_reported(script, tmp_path, teacher, options, ranks):
    data = save_glue(tmp_path / "glue", "mrpc")
    cut = {f"student_{name}": value for name, value in CUT.items()}
    out = script(
        *("--do_train", "--do_eval"), model_name_or_path=teacher, task_name="mrpc", dataset_name=data, **cut, **options
    )
    base = base_of(teacher)
    rows = glue_rows("mrpc", 13, 10)
    texts = [list(rows[name]) for name in ("sentence1", "sentence2")]
    for folder, rank, bare, prefix in (
        (out, ranks[0], base, "eval_"),
        (out / "student", ranks[1], create_student(base, **CUT), "eval_student_"),
    ):
        if rank is None:
            model = AutoModelForSequenceClassification.from_pretrained(folder)
        else:
            assert (folder / "model.safetensors").exists() == (bare is not base)  # no name leads to a cut base
            saved = load_file(folder / "adapter_model.safetensors")
            assert {value.shape[0] for name, value in saved.items() if "lora_A" in name} == {rank}
            assert any("classifier" in name for name in saved)
            model = PeftModel.from_pretrained(bare, folder)
            layers = options.get("lora_target_modules", "query,value")  # what PEFT has for BERT
            kinds = {name.split(".lora_A")[0].rpartition(".")[2] for name in saved if "lora_A" in name}
            assert kinds == ({"query", "key", "value", "dense"} if layers == "all-linear" else set(layers.split(",")))
        inputs = AutoTokenizer.from_pretrained(out)(*texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(rows["label"]))
        assert results(out)[f"{prefix}loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert results(out)[f"{prefix}accuracy"] == np.mean(logits.argmax(-1).numpy() == np.array(rows["label"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 0}, "`--lora_r 0` is not valid"),
        ({"student_lora_r": 4, "student_num_hidden_layers": None}, "`--student_lora_r 4` needs a student"),
        ({"student_init": "shared"}, "which adapters alone can train: give `--lora_r`"),
        ({"student_init": "shared", "lora_r": 4}, "which adapters alone can train: give `--student_lora_r`"),
        ({"lora_target_modules": "query"}, "`--lora_target_modules query` is for adapters"),
    ],
)
def test_bad_arguments(script, options, message):
    options = {"model_name_or_path": "no/model", "student_num_hidden_layers": 1, "task_name": "mrpc", **options}
    with pytest.raises(ValueError, match=message):
        script("--do_train", **{name: value for name, value in options.items() if value is not None})
