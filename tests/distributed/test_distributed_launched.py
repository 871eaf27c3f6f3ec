"""The scripts, really started with `accelerate launch` and the settings in `examples/accelerate`, on two processes."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from places import EXAMPLES, PROGRAMS
from script_glue import save_files as save_rows
from script_glue import save_model as save_classifier
from script_texts import save_files as save_texts
from script_texts import save_model as save_language_model
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

ON_CPUS = PROGRAMS / "on_cpus.py"
DEEPSPEED = pytest.param(
    "zero3", marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
)
TIMED = ("runtime", "per_second", "flos")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """The metrics of a script that a launcher has started, and its output folder; each is started once."""
    data = tmp_path_factory.mktemp("data")
    models = {
        "glue": save_classifier(data / "classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "mlm": save_language_model(data / "bert", "bert"),
    }
    files = {"glue": save_rows(data, ["bad", "good"]), "mlm": save_texts(data)}

    @cache
    def run(script: str, config: str | None) -> tuple[dict[str, float], Path]:
        out = tmp_path_factory.mktemp(f"{script}-{config}")
        processes = 1 if config is None else 2
        options = {
            "model_name_or_path": models[script],
            "student_num_hidden_layers": 2,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-4,  # gradients that are zero but for rounding must not become steps
            "max_grad_norm": 0.0,  # DeepSpeed clips by one norm
            "per_device_train_batch_size": 4 // processes,
            "per_device_eval_batch_size": 4 // processes,
            "max_seq_length": 16,
            "report_to": "none",
            "output_dir": out,
            **files[script],
        }
        arguments = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
        program = [str(EXAMPLES / f"run_{script}_ctcd.py"), "--do_train", "--do_eval", *arguments]
        if config is None:
            command = [sys.executable, *program, "--use_cpu"]
        else:
            launch = ["accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / f"{config}.yaml"]
            shards = config != "ddp"
            command = [sys.executable, "-m", *launch, "--num_processes", 2, *([ON_CPUS] if shards else [])]
            command += [*program, *([] if shards else ["--use_cpu"])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-6000:]
        found = json.loads((out / "all_results.json").read_text())
        return {name: value for name, value in found.items() if not name.endswith(TIMED)}, out

    return run


@pytest.mark.parametrize("config", ["ddp", "fsdp", DEEPSPEED])
def test_run_glue_started_with_each_file_gives_what_one_process_gives(config, results_of):
    (found, out), (expected, _) = results_of("glue", config), results_of("glue", None)
    assert found == pytest.approx(expected, rel=1e-4)
    for folder, layers in ((out, 3), (out / "student", 2)):
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_hidden_layers == layers


@pytest.mark.parametrize("config", ["fsdp", DEEPSPEED])
def test_run_mlm_started_with_each_file_gives_what_ddp_gives(config, results_of):
    """Which tokens are masked depends on the number of processes, so one process is no measure."""
    (found, out), (expected, ddp) = results_of("mlm", config), results_of("mlm", "ddp")
    assert found == pytest.approx(expected, rel=1e-4)
    for subfolder in ("", "student"):
        own, other = (AutoModelForMaskedLM.from_pretrained(folder, subfolder=subfolder) for folder in (out, ddp))
        for (name, value), wanted in zip(own.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4, msg=name)
