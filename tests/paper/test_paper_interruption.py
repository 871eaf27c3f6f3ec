"""A grid that is killed or shared by several processes: nothing is computed twice, and no number changes."""

import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from places import ROOT
from processes import start_python
from toy_protocol import call, numbers, write_toy

from examples.paper import prepare, run
from examples.paper.data import Schedule

SMALL = [{"task": "mlm", "seed": 0, "method": ["alone", "ctcd"], "then": ["rte"]}]


def grid_process(folder: Path) -> BaseProcess:
    options = {"--config": "toy.yaml", "--prepared": "prepared", "--output": "killed"}
    paths = [part for name, value in options.items() for part in (name, folder / value)]
    return start_python("-m", "examples.paper.run", "--threads", 1, *paths, cwd=ROOT)


def ended(process: BaseProcess, timeout: float | None = None) -> int | None:
    """The exit status, once the process has ended."""
    process.join(timeout)
    return process.exitcode


@pytest.mark.slow  # four processes; the two tests below have two each
def test_a_grid_that_is_killed_goes_on_where_it_was_with_the_same_numbers(tmp_path: Path) -> None:
    settings = {"mlm": {"steps": 60, "batch_size": 4, "learning_rate": 1e-3}}
    settings |= {"finetuning": {"epochs": 2, "rows": 24, "batch_size": 8, "learning_rate": 1e-3}}
    config = write_toy(tmp_path, SMALL, defaults=settings, checkpoints=10)
    options = ["--config", config, "--prepared", tmp_path / "prepared"]
    call(prepare, "--config", config, "--output", tmp_path / "prepared")
    call(run, *options, "--output", tmp_path / "whole", "--threads", 1)

    draw = random.Random(0)
    killed_at = []
    while True:
        process = grid_process(tmp_path)
        checkpoints = set((tmp_path / "killed").glob("cells/*/run/checkpoint-*"))
        while process.is_alive() and len(killed_at) < 3:
            time.sleep(0.01)
            if set((tmp_path / "killed").glob("cells/*/run/checkpoint-*")) - checkpoints:
                time.sleep(draw.uniform(0, 0.2))  # in the middle of a step or of a save
                process.kill()
                killed_at.append(ended(process))
        if ended(process) == 0:
            break
    assert killed_at == [-signal.SIGKILL] * 3
    assert numbers(tmp_path / "killed" / "results.jsonl") == numbers(tmp_path / "whole" / "results.jsonl")


def test_after_a_kill_only_the_steps_since_the_last_checkpoint_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"mlm": {"steps": 60, "batch_size": 4, "learning_rate": 1e-3}}
    grid = [{"task": "mlm", "seed": 0, "method": "alone"}]
    config = write_toy(tmp_path, grid, defaults=settings, checkpoints=6)
    options = ["--config", config, "--prepared", tmp_path / "prepared"]
    call(prepare, "--config", config, "--output", tmp_path / "prepared")
    process = grid_process(tmp_path)
    while process.is_alive() and not list(tmp_path.glob("killed/cells/*/run/checkpoint-20")):
        time.sleep(0.01)
    process.kill()
    process.join()
    states = tmp_path.glob("killed/cells/*/run/checkpoint-*/trainer_state.json")
    last = max(int(path.parent.name.split("-")[1]) for path in states)
    assert 10 <= last < 60
    seen, read = [], Schedule.__getitem__
    monkeypatch.setattr(Schedule, "__getitem__", lambda self, index: seen.append(index) or read(self, index))
    call(run, *options, "--output", tmp_path / "killed", "--threads", 1)
    counted = [0, 1, 2, 3]  # the batch whose floating-point operations are counted in the end
    assert seen == [*range(4 * last, 4 * 60), *counted]


def test_two_processes_share_a_grid(tmp_path: Path) -> None:
    config = write_toy(tmp_path, SMALL)
    call(prepare, "--config", config, "--output", tmp_path / "prepared")
    processes = [grid_process(tmp_path) for _ in range(2)]
    assert [ended(process, 120) for process in processes] == [0, 0]
    assert len(numbers(tmp_path / "killed" / "results.jsonl")) == 2 + 4
