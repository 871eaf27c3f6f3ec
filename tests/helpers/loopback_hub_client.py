"""Points the clients in this process to the loopback Hub."""

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import close_session
from huggingface_hub.utils._http import default_client_factory
from loopback_hub import OTHER_SETTINGS, LoopbackHub


def use_hub(
    monkeypatch: pytest.MonkeyPatch,
    hub: LoopbackHub,
    token: str | None = None,
    cache: Path | None = None,
    timeout: float = 5.0,
) -> list[float]:
    """Point this process's huggingface_hub and transformers to the Hub, although both have been imported already.

    Until that is undone, the process can connect to no other machine.

    Args:
        monkeypatch: Undoes it.
        hub: The Hub.
        token: The token that one is logged in with.
        cache: The folder of downloads; another folder stands for another machine.
        timeout: Seconds until a download gives up. The client has no limit for its other calls.

    Returns:
        The waits, in seconds, that the client has made between its tries; they are over in no time.
    """
    cache = cache or hub.folder / "cache"
    for name in OTHER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)

    values = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_ETAG_TIMEOUT": timeout,
        "HF_HUB_DOWNLOAD_TIMEOUT": timeout,
    }
    for name, value in values.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", timeout, raising=False)
    # `huggingface_hub.create_repo` and its like are methods of this object, which has read the address long ago.
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api._whoami_cache", {}, raising=False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)

    # Who sets another one changes it in this process for good.
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY", default_client_factory)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(min(seconds, 0.01))

    clock = SimpleNamespace(**{**vars(time), "sleep": sleep})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)

    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            raise ConnectionRefusedError(f"Not loopback: {address}")
        connect(self, address)

    monkeypatch.setattr("socket.socket.connect", connect_here)
    close_session()  # its client has read the proxies
    return waits
