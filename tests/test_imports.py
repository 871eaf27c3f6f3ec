"""The package trains without the packages of the extra `examples`."""

import json
import os
import subprocess
import sys

from places import PROGRAMS
from training_without_extras import results_of


def test_it_trains_evaluates_saves_and_resumes_without_the_extra_packages(tmp_path):
    """With the numbers of a process that has them."""
    run = subprocess.run(
        [sys.executable, str(PROGRAMS / "training_without_extras.py"), str(tmp_path / "without")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.splitlines()[-1])
    for precision in ("fp32", "bf16"):
        assert results[precision] == results_of(tmp_path / "with" / precision, precision == "bf16")
        assert results[precision]["resumed"] == results[precision]["classification"]
