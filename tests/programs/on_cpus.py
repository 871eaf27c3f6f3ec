"""Run a script whose processes take CPUs for accelerators: `accelerate launch ... on_cpus.py SCRIPT ARGUMENT...`.

accelerate shards on accelerators alone: told to use CPUs it runs DDP, whatever its settings say. torch and DeepSpeed
shard on CPUs as well.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def backend(*_: object) -> tuple[str, DistributedType]:
    """What accelerate finds where there are GPUs, with gloo for NCCL."""
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = backend
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
