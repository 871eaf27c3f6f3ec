"""Trainings in one process, with which those of several processes are compared."""

from collections.abc import Callable
from functools import cache

import pytest


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Callable[[str], dict]:
    """Train a scenario in this process, each scenario once."""
    from distributed_training import train

    return cache(lambda scenario: train(scenario, tmp_path_factory.mktemp(scenario)))
