"""What errors of the Hub's client mean for an upload, and a limit to the client's patience."""

from functools import partial
from typing import Any

from huggingface_hub import get_token, set_client_factory
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import _http

#: Seconds without any data after which a connection is given up; the client itself would wait for ever.
_SILENCE = 120.0
_REFUSALS = (401, 403)


def status_of(error: Exception) -> int | None:
    """The status of the Hub's answer; `None` if it has not answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_refusal(error: Exception) -> bool:
    """Whether the Hub does not take the token, or does not let it do that."""
    return status_of(error) in _REFUSALS


def needs_mending(error: Exception) -> bool:
    """Whether waiting alone is no use: a right, a repository, a name or a folder must be mended first."""
    return status_of(error) in (*_REFUSALS, 404) or isinstance(error, (HFValidationError, NotADirectoryError))


def seconds_asked_for(error: Exception) -> float:
    """How long the Hub wants to be left alone; 0 if it does not say."""
    said = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(said) if said.isdecimal() else 0.0


def without_token(error: Exception, token: str | None) -> str:
    """An error in words that do not tell the token (`None` for the one that the machine is logged in with)."""
    text = f"{type(error).__name__}: {error}"
    token = token or get_token()
    return text.replace(token, "***") if token else text


def limit_silence() -> None:
    """Have the connections of the client give up when nothing has come for too long, unless the user has set a limit.

    A limit that is set in the client's session is lost when the client makes a new one, as it does after some errors.
    """
    factory = _http._GLOBAL_CLIENT_FACTORY  # the client tells nobody which it is, and the user may have set it
    if not (isinstance(factory, partial) and factory.func is _limited):
        set_client_factory(partial(_limited, factory))


def _limited(factory: _http.CLIENT_FACTORY_T) -> Any:
    client = factory()
    if client.timeout.read is None:
        client.timeout = _SILENCE
    return client
