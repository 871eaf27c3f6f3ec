"""The package needs `datasets`, `evaluate` and `peft` only where they are used: it trains on machines without them."""

import json
import os
import subprocess
import sys

import pytest

ABSENT = ("datasets", "evaluate", "peft")

#: Trains, evaluates, saves, loads and resumes on plain lists of dicts, in a process that cannot import them.
SCRIPT = f"""
import importlib
import json
import pkgutil
import sys

for name in {ABSENT}:
    sys.modules[name] = None  # an import fails, and so does the search for its version

from transformers.utils import import_utils

assert not import_utils.is_datasets_available() and not import_utils.is_peft_available()

import torch
from tiny import collate, tiny_args, tiny_bert, tiny_rows
from tiny_models import rows_of, tiny_batch, tiny_model
from transformers import AutoModelForSequenceClassification

import ctcd_trainer
from ctcd_trainer import CoDistillationTrainer, create_student

for module in pkgutil.walk_packages(ctcd_trainer.__path__, "ctcd_trainer."):
    importlib.import_module(module.name)
folder, bf16 = sys.argv[1], sys.argv[2] == "bf16"


def train(folder, models, rows, eval_rows, resume=None, **options):
    args = tiny_args(
        folder, distillation_mode="community", max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1,
        bf16=bf16, pretrained_cache_dir=folder + "/cache", **options
    )
    trainer = CoDistillationTrainer(
        models[0], args, collate if "problem" in str(folder) else None, rows, eval_rows,
        compute_metrics=lambda prediction: {{"mean": float(prediction.predictions.mean())}},
        student_model=models[1], pretrained_teacher=models[2],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    result = trainer.evaluate()
    trainer.predict(eval_rows)
    trainer.create_model_card()
    weights = [sum(p.double().abs().sum().item() for p in m.parameters()) for m in models[:2]]
    return {{"loss": result["eval_loss"], "student_loss": result["eval_student_loss"], "weights": weights}}


def classifiers():
    teacher = tiny_bert(3, 1)
    return teacher, create_student(teacher, num_hidden_layers=2), tiny_bert(2, 3)


rows = tiny_rows(16)
results = {{"classification": train(folder + "/problem", classifiers(), rows, rows[:8])}}
resumed = train(folder + "/problem", classifiers(), rows, rows[:8], resume=folder + "/problem/checkpoint-2")
assert resumed == results["classification"], (resumed, results)
for place in ("", "/student"):
    AutoModelForSequenceClassification.from_pretrained(folder + "/problem" + place)

rows = rows_of(tiny_batch("masked-lm", 8))
models = [tiny_model("bert", "masked-lm", layers, seed) for layers, seed in ((2, 1), (1, 2), (2, 3))]
results["masked-lm"] = train(folder + "/masked", models, rows, rows)
assert all(sys.modules[name] is None for name in {ABSENT})
print(json.dumps(results))
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_evaluates_saves_and_resumes_where_datasets_evaluate_and_peft_are_not_installed(precision, tmp_path):
    """With the numbers of a process that has them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with_them = SCRIPT.replace("sys.modules[name] = None", "__import__(name)")
    with_them = "\n".join(line for line in with_them.splitlines() if not line.startswith("assert"))
    results = []
    for place, script in (("without", SCRIPT), ("with", with_them)):
        (tmp_path / place).mkdir()
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / place), precision],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        results.append(json.loads(run.stdout.splitlines()[-1]))
    assert results[0] == results[1]
    assert results[0].keys() == {"classification", "masked-lm"}
