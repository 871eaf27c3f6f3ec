"""What goes wrong in one process ends all of them, soon, and says what it was."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("failing_training.py")
#: From the bad row on; before it come the imports of three processes.
SECONDS = 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("label", "IndexError: Target 7 is out of bounds"),
        ("nan", "FloatingPointError: The loss of the teacher and student became NaN or infinite at step 3"),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_message(failure, message, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(PROGRAM), str(tmp_path), failure],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    seconds = time.time() - (tmp_path / "started").stat().st_mtime
    assert run.returncode != 0
    assert message in run.stderr
    assert seconds < SECONDS
