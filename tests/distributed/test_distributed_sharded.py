"""Processes that each hold a part of every parameter (FSDP) train, log and measure what one process does."""

from pathlib import Path

import pytest
import torch
from distributed_training import BEST, train
from processes import run_program
from same_training import assert_same, assert_same_weights
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

SHARDED = ("classification", "masked_lm", "causal_lm", "community", "community_lm", "one_way", "adapters")
FSDP1 = ("classification", "masked_lm")
FOUR = ("classification", "masked_lm", "causal_lm")
#: Settings of FSDP2 that change no number, with the scenario of each.
SETTINGS = {
    "offload": "masked_lm",
    "first-loads": "classification",
    "recomputed": "classification",
    "named": "masked_lm",
    "compiled": "classification",
}
#: Strategies under bf16.
BF16 = ("bf16", "bf16-fsdp2")
#: Trainings that go on, with the scenario of each.
RESUMED = {
    "shards-resumed": "masked_lm",
    "whole-resumed": "causal_lm",
    "offload-resumed": "masked_lm",
    "resumed-by-one": "causal_lm",
    "resumed-from-one": "causal_lm",
    "fsdp1-resumed": "masked_lm",
    "fsdp1-shards-resumed": "masked_lm",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    jobs = [f"{name}-fsdp2 2 fsdp2 {name}" for name in SHARDED]
    jobs += ["shards 2 shards masked_lm", "shards-resumed 2 shards masked_lm shards"]
    jobs += ["best 2 best masked_lm"]
    jobs += ["whole-resumed 2 fsdp2 causal_lm causal_lm-fsdp2"]
    jobs += [f"{setting} 2 {setting} {name}" for setting, name in SETTINGS.items()]
    jobs += [f"{strategy} 2 {strategy} masked_lm" for strategy in BF16]
    jobs += ["offload-resumed 2 offload masked_lm offload"]
    jobs += ["by-one 1 fsdp2 causal_lm", "resumed-by-one 1 fsdp2 causal_lm causal_lm-fsdp2"]
    jobs += ["resumed-from-one 2 fsdp2 causal_lm by-one"]
    jobs += [f"{name}-fsdp1 2 fsdp1 {name}" for name in FSDP1]
    jobs += ["fsdp1-resumed 2 fsdp1 masked_lm masked_lm-fsdp1"]
    jobs += ["fsdp1-shards 2 shards1 masked_lm", "fsdp1-shards-resumed 2 shards1 masked_lm fsdp1-shards"]
    jobs += [f"{name}-four 4 fsdp2 {name}" for name in FOUR]
    run_program("distributed_training.py", folder, *jobs)
    return folder


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}-0.pt")


@pytest.mark.parametrize("scenario", SHARDED)
def test_fully_sharded_processes_train_log_and_measure_as_one(scenario, sharded, one_process):
    assert_same(load(sharded, f"{scenario}-fsdp2"), one_process(scenario))


@pytest.mark.parametrize(
    ("name", "processes", "layers"),
    [
        ("community-fsdp2", 2, {"teacher": 3, "student": 2, "pretrained": 2}),
        ("masked_lm-fsdp2", 2, {"teacher": 2, "student": 2}),
        ("one_way-fsdp2", 2, {"teacher": 2, "student": 2}),
        ("named", 2, {"teacher": 2, "student": 2}),
        ("classification-four", 4, {"teacher": 3, "student": 2}),
    ],
)
def test_each_process_holds_its_share_of_all_models_whose_layers_are_gathered_one_by_one(
    name, processes, layers, sharded
):
    result = load(sharded, name)
    assert result["held"].keys() == layers.keys()
    for learner, count in layers.items():
        assert 1 / processes <= result["held"][learner] < 1.3 / processes  # rows are not cut
        units = result["units"][learner]
        assert units["FSDPBertLayer"] + units["FSDPTransformerBlock"] == count


@pytest.mark.parametrize("name", ["causal_lm-fsdp2", "community_lm-fsdp2", "offload", "masked_lm-fsdp1"])
def test_language_models_use_the_fused_pass_where_heads_are_sharded(name, sharded):
    assert load(sharded, name)["fused"] is True


@pytest.mark.parametrize("scenario", FOUR)
def test_four_fully_sharded_processes_train_log_and_measure_as_one(scenario, sharded, one_process):
    assert_same(load(sharded, f"{scenario}-four"), one_process(scenario))


@pytest.mark.parametrize(("name", "scenario"), SETTINGS.items())
def test_settings_of_fsdp_change_no_number(name, scenario, sharded, one_process):
    assert_same(load(sharded, name), one_process(scenario))


@pytest.mark.parametrize("strategy", BF16)
def test_losses_under_bf16_stay_near_those_of_one_process_in_fp32(strategy, sharded, one_process):
    actual, expected = load(sharded, strategy), one_process("masked_lm")
    assert actual["weights"].keys() == expected["weights"].keys()
    for found, wanted in zip(actual["logs"], expected["logs"], strict=True):
        assert found["loss"] != wanted["loss"]  # it was bf16
        for name in ("loss", "teacher_hard_loss", "student_hard_loss"):
            assert found[name] == pytest.approx(wanted[name], rel=0.02), name


@pytest.mark.parametrize("scenario", FSDP1)
def test_the_first_fsdp_trains_logs_and_measures_as_one_process(scenario, sharded, one_process):
    assert_same(load(sharded, f"{scenario}-fsdp1"), one_process(scenario))


@pytest.mark.parametrize(("name", "scenario"), RESUMED.items())
def test_sharded_trainings_go_on_from_their_checkpoints(name, scenario, sharded, one_process):
    assert_same(load(sharded, name), one_process(scenario))


@pytest.mark.parametrize(
    ("name", "auto_model"),
    [
        ("masked_lm-fsdp2", AutoModelForMaskedLM),
        ("causal_lm-fsdp2", AutoModelForCausalLM),
        ("shards", AutoModelForMaskedLM),
        ("offload", AutoModelForMaskedLM),
        ("masked_lm-fsdp1", AutoModelForMaskedLM),
        ("fsdp1-shards", AutoModelForMaskedLM),
    ],
)
def test_sharded_trainings_save_two_whole_models(name, auto_model, sharded):
    weights = load(sharded, name)["weights"]
    for learner, subfolder in (("teacher", ""), ("student", "student")):
        saved = auto_model.from_pretrained(sharded / name, subfolder=subfolder).state_dict()
        assert {key.removeprefix(f"learners.{learner}.") for key in weights if learner in key} == saved.keys()
        for key, value in saved.items():
            assert torch.equal(value, weights[f"learners.{learner}.{key}"]), key


def test_the_best_models_are_loaded_and_the_best_student_kept_as_in_one_process(sharded, tmp_path):
    expected = train("masked_lm", tmp_path, **BEST)
    assert_same_weights(load(sharded, "best")["weights"], expected["weights"])
    found, wanted = (
        AutoModelForMaskedLM.from_pretrained(folder / "best-student") for folder in (sharded / "best", tmp_path)
    )
    assert_same_weights(found.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("name", ["masked_lm-fsdp2", "masked_lm-fsdp1"])
def test_checkpoints_of_whole_weights_hold_two_whole_models(name, sharded):
    for subfolder in ("", "student"):
        AutoModelForMaskedLM.from_pretrained(sharded / name / "checkpoint-4", subfolder=subfolder)
