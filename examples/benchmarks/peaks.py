"""Peak memory of an action, in a process of its own that imports only what the action needs."""

import gc
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

#: With it, glibc gives each block back to the system when it is freed. Other allocators ignore it.
_MAPPING_FOR_EACH_BLOCK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def peak_memory(device: str = "cpu") -> float:
    """Peak memory of this process so far, in MB: resident, or allocated on the GPU.

    On Linux `ru_maxrss` of a new process starts at the peak of its parent, so the kernel's other figure is used there.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:6] == "VmHWM:") / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def peak_memory_of(
    action: Callable[..., object], *arguments: object, device: str = "cpu", live: bool = False
) -> float:
    """Measure the peak memory in MB of an action in a new process, without that of the imports.

    Args:
        action: A function that can be imported.
        *arguments: Its arguments.
        device: Where it computes.
        live: Whether to leave out freed memory that glibc keeps for later. It depends on the order of all allocations,
            and lets the resident peak of the same program vary by several percent.
    """
    # Resident memory: each action runs in a fork of a server that has imported the libraries and never computes, so
    # the new process starts small and fast. Live memory: the allocator reads the environment when a program starts.
    context = multiprocessing.get_context("spawn" if live else "forkserver")
    context.set_forkserver_preload(["ctcd_trainer"])
    added = _MAPPING_FOR_EACH_BLOCK if live else {}
    os.environ.update(added)
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_rise_of_peak, action, arguments, device).result()
    finally:
        for name in added:
            del os.environ[name]


def _rise_of_peak(action: Callable[..., object], arguments: Sequence[object], device: str) -> float:
    gc.freeze()  # a collection would look at all that has been imported, and so copy it
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
    before = peak_memory(device)
    action(*arguments)
    return peak_memory(device) - before
