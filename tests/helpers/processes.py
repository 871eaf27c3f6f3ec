"""Several processes on this machine, forked from one that has everything imported and has computed nothing.

`python some_program.py` imports for seconds; a fork of it starts at once. The program calls `run_forked`.
"""

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from places import PROGRAMS


def run_forked(count: int, function: Callable[[], None], grouped: bool | None = None) -> None:
    """Run a function in several processes of one gloo group, as the environment of `torchrun` describes it.

    Args:
        count: Number of processes.
        function: Runs in every process.
        grouped: Whether the processes form a group; by default if there are several.

    Raises:
        RuntimeError: The function failed in a process. The traceback is on stderr, and the others were ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store") if grouped or (grouped is None and count > 1) else None
        children = {_fork(rank, count, store, function): rank for rank in range(count)}
        failed = None
        while children:
            child, status = os.wait()
            rank = children.pop(child)
            if status != 0 and failed is None:
                failed = rank
                for other in children:
                    os.kill(other, signal.SIGKILL)
    if failed is not None:
        raise RuntimeError(f"Process {failed} of {count} failed.")


def _fork(rank: int, count: int, store: Path | None, function: Callable[[], None]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        if store is not None:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in names.items()}
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        function()
        status = 0
    except BaseException:
        print(f"Process {rank} of {count}:\n{traceback.format_exc()}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return child


def run_program(program: str, *arguments: object, timeout: float = 900.0) -> None:
    """Run a program of `tests/programs` in one thread per process, and fail with what it says if it does.

    Args:
        program: File name.
        *arguments: Its arguments.
        timeout: In seconds.
    """
    command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as run:
        try:
            _, errors = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # with its forks
            raise
    assert run.returncode == 0, errors[-6000:]
