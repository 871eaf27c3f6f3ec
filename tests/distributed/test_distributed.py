"""Two and four processes train, log and measure what one process does on the same global batches."""

from pathlib import Path

import pytest
import torch
from distributed_training import SCENARIOS
from processes import run_program
from same_training import TOLERANCE, assert_ranks_agree, assert_same

LANGUAGE_MODELS = ("masked_lm", "unused", "causal_lm", "community_lm", "one_way")
#: Tied heads, and heads that are not tied.
FULLY_SHARDED = ("masked_lm", "unused")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    # Trainer's default looks for parameters that nothing has used; where there are none, that is not needed.
    jobs = [f"{name} 2 {'plain' if name == 'unused' else 'ddp'} {name}" for name in SCENARIOS]
    one = "saved-by-one 1 plain causal_lm"
    resumed = ["resumed-by-two 2 ddp causal_lm saved-by-one", "resumed-by-one 1 plain causal_lm causal_lm"]
    sharded = [f"{name}-fsdp2 2 fsdp2 {name}" for name in FULLY_SHARDED]
    more = [*resumed, *sharded, "reentrant 2 reentrant classification"]
    run_program("distributed_training.py", folder, one, *jobs, *more)
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_train_log_and_measure_as_one(scenario, two_processes, one_process):
    actual, expected = torch.load(two_processes / f"{scenario}-0.pt"), one_process(scenario)
    assert_same(actual, expected)
    assert actual["train_loss"] == pytest.approx(expected["train_loss"], rel=TOLERANCE)
    assert actual["fused"] == expected["fused"] == (True if scenario in LANGUAGE_MODELS else None)
    assert_ranks_agree(two_processes, scenario, 2)


@pytest.mark.parametrize("scenario", FULLY_SHARDED)
def test_the_fused_pass_of_fully_sharded_heads_equals_that_of_one_process(scenario, two_processes, one_process):
    actual, expected = torch.load(two_processes / f"{scenario}-fsdp2-0.pt"), one_process(scenario)
    assert actual["fused"]
    assert expected["fused"]
    assert actual["held"]["teacher"] < 0.7  # each process holds its half
    assert_same(actual, expected)


def test_gradient_checkpointing_changes_no_number_of_two_processes(two_processes, one_process):
    assert_same(torch.load(two_processes / "reentrant-0.pt"), one_process("classification"))


@pytest.mark.parametrize("resumed", ["resumed-by-two", "resumed-by-one"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(resumed, two_processes):
    expected = torch.load(two_processes / "saved-by-one-0.pt")
    assert_same(torch.load(two_processes / f"{resumed}-0.pt"), expected)


@pytest.mark.slow
def test_four_processes_train_log_and_measure_as_one(one_process, tmp_path):
    scenarios = [name for name in SCENARIOS if name not in ("uneven", "filled_up")]  # other batches than of two
    run_program("distributed_training.py", tmp_path, *(f"{name} 4 plain {name}" for name in scenarios))
    for scenario in scenarios:
        assert_same(torch.load(tmp_path / f"{scenario}-0.pt"), one_process(scenario))
        assert_ranks_agree(tmp_path, scenario, 4)
