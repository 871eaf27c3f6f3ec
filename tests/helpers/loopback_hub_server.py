"""The sockets of the loopback Hub, the requests that arrive at them, and the faults that are injected there."""

import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_hub_api import HubApi
from loopback_hub_calls import Answer, Call, error_answer
from loopback_hub_repos import HubError

MAX_CONNECTIONS = 64
MAX_BODY = 256 * 2**20
IDLE_SECONDS = 60


class Request(NamedTuple):
    """A request that has arrived; the path without its query, unquoted."""

    method: str
    path: str
    token: str | None


@dataclass
class Fault:
    """What is done to the next requests that match; `left` counts down as it happens."""

    match: re.Pattern
    left: int
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str | None = None
    seconds: float = 0.0
    cuts: bool = False
    after_bytes: int | None = None


class Traffic:
    """The requests so far, in order, and the faults to come.

    A `match` is a regular expression for `re.search` in "METHOD path". Of the faults that match a request, the first
    that is not used up happens.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.errors: list[Exception] = []
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._arrived = threading.Condition()

    def wait_for(self, match: str, seconds: float = 10.0, count: int = 1) -> None:
        """Wait until that many requests that match "METHOD path" have arrived, such as to kill a process in a push.

        Raises:
            TimeoutError: They have not.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.requests_like(match)) >= count, seconds):
                raise TimeoutError(f"{len(self.requests_like(match))} of {count} requests like {match!r} arrived")

    def requests_like(self, match: str) -> list[Request]:
        """The requests so far that match "METHOD path"."""
        return [x for x in list(self.requests) if re.search(match, f"{x.method} {x.path}")]

    def fail(
        self,
        match: str,
        status: int = 500,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        message: str | None = None,
    ) -> Fault:
        """Answer an error instead; `headers` for instance `{"Retry-After": "1"}`."""
        return self._add(Fault(re.compile(match), times, status=status, headers=headers or {}, message=message))

    def delay(self, match: str, seconds: float, times: int = 1) -> Fault:
        """Carry the request out only after a while, even if the client has given up by then."""
        return self._add(Fault(re.compile(match), times, seconds=seconds))

    def drop(self, match: str, after_bytes: int | None = None, times: int = 1) -> Fault:
        """Cut the connection.

        Args:
            match: Which requests.
            after_bytes: Cut after this many bytes of the body: of the request if it has one (it is then not carried
                out), or else of the answer. `None`: the request is carried out, and the answer is lost.
            times: How many requests.
        """
        return self._add(Fault(re.compile(match), times, cuts=True, after_bytes=after_bytes))

    def heal(self) -> None:
        """Let nothing more happen of what was injected."""
        with self._arrived:
            self._faults.clear()

    def _add(self, fault: Fault) -> Fault:
        with self._arrived:
            self._faults.append(fault)
        return fault

    def arrive(self, request: Request) -> Fault | None:
        with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()
            for fault in self._faults:
                if fault.left > 0 and fault.match.search(f"{request.method} {request.path}"):
                    fault.left -= 1
                    return fault
        return None


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, traffic: Traffic, api: HubApi) -> None:
        self.traffic = traffic
        self.api = api
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), HubHandler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self.connections) < MAX_CONNECTIONS

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the Hub."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            cut(connection)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE_SECONDS
    server: HubServer

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        traffic = self.server.traffic
        address = urlsplit(self.path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        request = Request(self.command, unquote(address.path), token if scheme == "Bearer" else None)
        fault = traffic.arrive(request)
        has_body = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        if fault and fault.cuts and has_body and fault.after_bytes is not None:
            self.rfile.read(min(fault.after_bytes, int(self.headers.get("Content-Length", fault.after_bytes))))
            return self._cut()
        body = self._read_body()
        if body is None:
            return self._cut()
        if fault and fault.seconds:
            traffic.closing.wait(fault.seconds)
        if fault and fault.status:
            message = fault.message or HTTPStatus(fault.status).phrase
            answer = error_answer(HubError(fault.status, message, **fault.headers))
        else:
            call = Call(self.command, address.path, parse_qs(address.query), self.headers, body, request.token)
            try:
                answer = self.server.api.answer(call)
            except Exception as error:
                traffic.errors.append(error)
                answer = error_answer(HubError(500, f"{type(error).__name__}: {error}"))
        if fault and fault.cuts and fault.after_bytes is None:
            return self._cut()
        self._send(answer, fault.after_bytes if fault and fault.cuts else None)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes | None:
        """The body of the request; `None` if the client has gone away before its end."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body if self.rfile.readline() else None
        size = int(self.headers.get("Content-Length", 0))
        if size > MAX_BODY:
            return None
        body = self.rfile.read(size)
        return body if len(body) == size else None

    def _send(self, answer: Answer, cut_after: int | None) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut_after])
        if cut_after is not None:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        cut(self.connection)


def cut(connection: socket.socket) -> None:
    """End a connection in both directions at once."""
    with suppress(OSError):  # the client may have been faster
        connection.shutdown(socket.SHUT_RDWR)
