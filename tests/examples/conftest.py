"""Fixtures of the tests of `run_glue_ctcd.py`; the tests of the other scripts have their own of these names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from script_glue import save_model
from script_runs import run_script

from examples import run_glue_ctcd


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Runs the script."""
    return partial(run_script, run_glue_ctcd, output_dir=tmp_path / "out", max_seq_length=32)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pre-trained model without a head."""
    return save_model(tmp_path_factory.mktemp("teacher"), head=False)
