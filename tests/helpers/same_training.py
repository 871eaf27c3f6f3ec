"""Assertions that two trainings, of any number of processes, gave the same logs, metrics and weights."""

from pathlib import Path

import pytest
import torch

TOLERANCE = 1e-5


def assert_same(actual: dict, expected: dict, logs: int = 3) -> None:
    """Logs, metrics and weights, to the tolerance."""
    assert len(actual["logs"]) == len(expected["logs"]) == logs
    pairs = [*zip(actual["logs"], expected["logs"], strict=True), (actual["metrics"], expected["metrics"])]
    for found, wanted in pairs:
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name
    assert_same_weights(actual["weights"], expected["weights"])


def assert_same_weights(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = (actual[name] - value).abs().max().item()
        assert difference <= tolerance, f"{name}: {difference}"


def assert_ranks_agree(folder: Path, name: str, count: int) -> None:
    """Every process must hold the same weights, bit for bit."""
    first, *others = (torch.load(folder / f"{name}-{rank}.pt")["weights"] for rank in range(count))
    for other in others:
        assert [name for name, value in first.items() if not torch.equal(value, other[name])] == []
