"""The loopback Hub, without the real client: what only a broken or an impatient client would send."""

import base64
import http.client
import json
import socket
import time
from hashlib import sha256
from urllib.parse import urlsplit

import pytest
from loopback_hub import LoopbackHub
from loopback_hub_repos import LFS_SIZE, Repository

COMMIT = "/api/models/me/model/commit/main"
LARGE = b"\0" * 1000


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        hub.create("me/model")
        yield hub


def send(method, url, body=b"", token=None, timeout=5.0, **headers):
    """The status, the headers and the body of the answer."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=timeout)
    try:
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, f"{address.path}?{address.query}", body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def commit_body(*lines):
    """A commit request: a header, and pairs of a key and a value."""
    return b"".join(
        json.dumps({"key": key, "value": value}).encode() + b"\n"
        for key, value in [("header", {"summary": "a commit"}), *lines]
    )


def regular(path, data):
    return "file", {"path": path, "content": base64.b64encode(data).decode()}


def upload_url(hub, data):
    """Where the Hub wants to have a large file."""
    wanted = {"objects": [{"oid": sha256(data).hexdigest(), "size": len(data)}]}
    url = f"{hub.endpoint}/me/model.git/info/lfs/objects/batch"
    _, _, body = send("POST", url, json.dumps(wanted), token=hub.token)
    return json.loads(body)["objects"][0]["actions"]["upload"]["href"]


def test_a_commit_is_all_or_nothing(hub):
    large = ("lfsFile", {"path": "large.bin", "oid": sha256(LARGE).hexdigest()})
    gone = ("deletedFile", {"path": "never.txt"})
    card = regular("README.md", b"---\n- no mapping\n---\n")
    for line, status in ((large, 400), (gone, 404), (card, 400), (("nonsense", {}), 400)):
        body = commit_body(regular("a.txt", b"1"), line)
        assert send("POST", hub.endpoint + COMMIT, body, token=hub.token)[0] == status
    assert hub.files("me/model") == {}

    assert send("PUT", upload_url(hub, LARGE), LARGE)[0] == 200
    assert send("POST", hub.endpoint + COMMIT, commit_body(regular("a.txt", b"1"), large), token=hub.token)[0] == 200
    assert hub.files("me/model") == {"a.txt": b"1", "large.bin": LARGE}


def test_the_storage_takes_only_the_file_that_was_announced_and_no_token(hub):
    url = upload_url(hub, LARGE)
    assert send("PUT", url, LARGE[:-1])[0] == 400
    assert send("PUT", url, LARGE, token=hub.token)[0] == 400
    assert send("PUT", url.partition("?")[0], LARGE)[0] == 403
    assert hub.repos["me/model"].lfs == {}


def test_what_decides_about_the_storage_of_a_file():
    mode = Repository("me/model", "me").upload_mode
    assert mode("folder/model.safetensors", b"a", 1) == mode("chart.png", b"\x89PNG\0", 9) == "lfs"
    assert mode("a.txt", b"a", LFS_SIZE + 1) == "lfs"
    assert mode("a.txt", b"a", LFS_SIZE) == mode("empty.safetensors", b"", 0) == "regular"


def test_parts_of_files_are_served(hub):
    files = {"a.txt": b"0123456789", "large.bin": bytes(range(256))}
    hub.commit("me/model", files)
    for name, data in files.items():
        url = f"{hub.endpoint}/me/model/resolve/main/{name}"
        url = send("HEAD", url)[1].get("Location", url)
        for wanted, part in {"bytes=2-4": data[2:5], "bytes=3-": data[3:], "bytes=-2": data[-2:]}.items():
            status, headers, body = send("GET", url, Range=wanted)
            assert (status, body) == (206, part)
            assert headers["Content-Range"].endswith(f"/{len(data)}")
        assert send("GET", url, Range="bytes=999-")[0] == 416


def test_what_a_dying_client_has_sent_of_a_commit_is_not_committed(hub):
    body = commit_body(regular("a.txt", b"1"))
    head = f"POST {COMMIT} HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\nContent-Length: {len(body) + 1}\r\n\r\n"
    with socket.create_connection(urlsplit(hub.endpoint).netloc.split(":"), timeout=5) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # the Hub has noticed, and answers nothing
    assert hub.files("me/model") == {}


def test_a_late_request_is_carried_out_although_the_client_has_gone(hub):
    hub.delay("POST .*/commit/", seconds=0.5)
    with pytest.raises(TimeoutError):
        send("POST", hub.endpoint + COMMIT, commit_body(regular("a.txt", b"1")), token=hub.token, timeout=0.05)
    assert hub.files("me/model") == {}
    end = time.monotonic() + 5
    while not hub.files("me/model") and time.monotonic() < end:
        time.sleep(0.01)
    assert hub.files("me/model") == {"a.txt": b"1"}


def test_a_hub_closes_at_once_whatever_is_under_way():
    with LoopbackHub() as hub:
        hub.delay(".", seconds=600)
        with pytest.raises(TimeoutError):
            send("GET", f"{hub.endpoint}/api/whoami-v2", timeout=0.05)
        start = time.monotonic()
    assert time.monotonic() - start < 5


def test_an_error_of_the_hub_itself_is_raised_in_the_test():
    hub = LoopbackHub()
    with pytest.raises(json.JSONDecodeError), hub:
        assert send("POST", f"{hub.endpoint}/api/repos/create", b"{", token=hub.token)[0] == 500
