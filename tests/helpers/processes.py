"""Several processes on this machine, forked from one that has everything imported and has computed nothing.

`python some_program.py` imports for seconds; a fork of it starts at once. The program calls `run_forked`.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed
from places import PROGRAMS

_SERVED = multiprocessing.get_context("forkserver")
_IMPORTED = ["transformers.trainer", "transformers.models.bert.modeling_bert", "transformers.pipelines"]


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
        gc.freeze()  # a collection in a fork would look at, and so copy, all that has been imported
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


def start_python(
    *arguments: object, cwd: Path | None = None, output: Path | None = None, errors: Path | None = None
) -> BaseProcess:
    """Start `python ARGUMENT...` with one thread, in a fork of a process that has imported what takes seconds.

    Args:
        *arguments: A file, or `-c` and code, or `-m` and a module; then the arguments of the program.
        cwd: Folder in which it runs; that of this process by default.
        output: File for what it prints.
        errors: File for its stderr.

    Returns:
        The process; it is the first of a group of processes.
    """
    _SERVED.set_forkserver_preload(_IMPORTED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the server has that of its own start
    files = {1: output or os.devnull, 2: errors or os.devnull}
    process = _SERVED.Process(target=_be_python, args=(list(map(str, arguments)), environment, cwd, files))
    process.start()
    return process


def _be_python(arguments: list[str], environment: dict[str, str], cwd: Path | None, files: dict[int, str]) -> None:
    gc.freeze()
    os.setsid()
    for number, file in files.items():
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if cwd is not None:
        os.chdir(cwd)
    option, *sys.argv = arguments if arguments[0] in ("-c", "-m") else ["", *arguments]
    if option == "-c":
        exec(compile(sys.argv[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def run_python(
    *arguments: object, cwd: Path | None = None, timeout: float = 900.0
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENT...` as `start_python` does, for at most so many seconds."""
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        process = start_python(*arguments, cwd=cwd, output=Path(output.name), errors=Path(errors.name))
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its forks
            raise subprocess.TimeoutExpired(list(map(str, arguments)), timeout, output.read(), errors.read())
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read(), errors.read())


def run_program(program: str, *arguments: object, timeout: float = 900.0) -> None:
    """Run a program of `tests/programs` in one thread per process, and fail with what it says if it does.

    Args:
        program: File name.
        *arguments: Its arguments.
        timeout: In seconds.
    """
    done = run_python(PROGRAMS / program, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]
