"""`kill -9` at any moment: both models end in the bytes of the training that was never killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from killed_training import STEPS
from loopback_hub import LoopbackHub
from places import PROGRAMS

MODELS = ("model.safetensors", "student/model.safetensors")


class Trainings:
    """Runs trainings one after the other, each in a process that can be killed."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(PROGRAMS / "killed_training.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        )

    def run(self, folder: Path, seconds: float | None = None) -> int:
        """Train; exit status, -9 if it was killed after so many seconds."""
        self._server.stdin.write(f"{folder}\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)) if seconds is not None else None
        if timer is not None:
            timer.start()
        status = int(self._server.stdout.readline())
        if timer is not None:
            timer.cancel()
        return status

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


@contextmanager
def trainings(environment: dict[str, str] | None = None) -> Iterator[Trainings]:
    running = Trainings(environment or {})
    try:
        yield running
    finally:
        running.close()


def models_in(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in MODELS)


def kill_often(running: Trainings, folder: Path, kills: int, longest: float, seed: int) -> list[Path]:
    """Train in fresh folders until so many trainings were killed; the folders, each trained to the end."""
    draw = random.Random(seed)
    done, count = [], 0
    while count < kills or not done:
        current = folder / str(len(done))
        while True:
            status = running.run(current, draw.uniform(0, longest) if count < kills else None)
            if status == 0:
                done.append(current)
                break
            assert status == -signal.SIGKILL
            count += 1
    return done


@pytest.mark.slow
def test_thirty_kills_change_no_byte(tmp_path):
    with trainings() as running:
        start = time.monotonic()
        assert running.run(tmp_path / "whole") == 0
        longest = time.monotonic() - start
        done = kill_often(running, tmp_path / "killed", kills=30, longest=longest, seed=0)
    for folder in done:
        assert models_in(folder) == models_in(tmp_path / "whole")
        assert "_partial" not in os.listdir(folder)
        checkpoints = sorted(folder.glob("checkpoint-*"))
        assert {f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"} <= {path.name for path in checkpoints}
        assert len(checkpoints) <= 3  # a kill before the oldest was removed


@pytest.mark.slow
def test_kills_during_pushes_leave_a_whole_state_on_the_hub(tmp_path):
    with trainings({"SAVE_TOTAL_LIMIT": "99"}) as running:
        assert running.run(tmp_path / "whole") == 0
    states = [models_in(tmp_path / "whole" / f"checkpoint-{step}") for step in range(1, STEPS + 1)]
    with LoopbackHub() as hub:
        with trainings(hub.environment(token=hub.token, home=tmp_path / "home")) as running:
            start = time.monotonic()
            assert running.run(tmp_path / "first") == 0
            done = kill_often(running, tmp_path / "killed", kills=10, longest=0.7 * (time.monotonic() - start), seed=1)
        pushed = [commit.files for commit in hub.commits("me/pair") if MODELS[1] in commit.files]
        assert len(pushed) > 10
        for files in pushed:
            assert tuple(files[name] for name in MODELS) in states
            there = [f"last-checkpoint/{name}" for name in MODELS]
            assert there[0] not in files or tuple(files[name] for name in there) in states
        for folder in done:
            assert models_in(folder) == states[-1]
        assert tuple(hub.files("me/pair")[name] for name in MODELS) == states[-1]
        assert hub.files("me/pair-student")["model.safetensors"] == states[-1][1]
