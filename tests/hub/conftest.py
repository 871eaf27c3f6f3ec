"""A Hub on this machine, which the client of every test here talks to."""

import pytest
from loopback_hub import LoopbackHub, use_hub


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def client(hub, monkeypatch):
    use_hub(monkeypatch, hub)
    yield
    hub.release()
