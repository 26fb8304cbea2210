"""Connection timeouts against slow, stalled and half-closed clients."""

import json
import socket
import time
from contextlib import contextmanager

import pytest
from running_server import serve, wait_until

from maxlm.serve import connection as connections
from maxlm.serve import middleware

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "The quick brown"}]


@contextmanager
def connect(url, *, buffer=None):
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        if buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(20)
        client.connect((host, int(port)))
        yield client


def head(length, *, method="POST", path=CHAT, more=""):
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{more}\r\n"
    ).encode()


def read_all(client):
    """All bytes until the server closes the connection."""
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def error_of(reply):
    return json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connections, "READ_SECONDS", 0.4)
    monkeypatch.setattr(connections, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(middleware, "REFUSED_BODY_SECONDS", 0.2)


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: loc"])
@pytest.mark.parametrize("is_second", [False, True])
def test_incomplete_head_times_out(url, quick, sent, is_second):
    with connect(url) as client:
        if is_second and sent:  # without a byte it is an idle keep-alive connection, open for 30 s
            client.sendall(GET)
            reply = b""
            while not reply.endswith(b'{"status":"ok"}'):
                reply += client.recv(1000)
        client.sendall(sent)
        assert read_all(client) == b""


def test_slowly_sent_head_times_out(url, quick):
    with connect(url) as client:
        client.settimeout(0.05)
        for _ in range(400):
            try:
                client.sendall(b"X")
                client.recv(1)
            except TimeoutError:
                continue
            except OSError:
                return
    pytest.fail("the connection is still open")


@pytest.mark.parametrize("sent", [b"", b'{"messages": '])
def test_incomplete_body_gets_408(url, quick, sent):
    with connect(url) as client:
        client.sendall(head(500) + sent)
        reply = read_all(client)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert "did not arrive in full" in error_of(reply)
    assert b"\r\nx-request-id: req_" in reply


def test_huge_body_gets_413(url, quick):
    """A client that keeps sending still receives the response."""
    with connect(url) as client:
        client.sendall(head(10**12) + b" " * 3_000_000)
        reply = read_all(client)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert "larger than 8388608 bytes" in error_of(reply)
    with connect(url) as client:
        client.sendall(head("9" * 5000))
        assert read_all(client).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"A" * 100_000])
def test_invalid_http_gets_an_error_body(url, noise):
    with connect(url) as client:
        client.sendall(noise)
        reply = read_all(client)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert "not a valid HTTP/1.1 request" in error_of(reply)
    assert b"\r\nx-request-id: req_" in reply


@pytest.mark.parametrize("stream", [True, False])
def test_half_closed_connection_frees_its_slot(served, stream):
    url, engine = served
    body = json.dumps({"messages": MESSAGES, "stream": stream, "n": 16}).encode()
    with connect(url) as client:
        client.sendall(head(len(body)) + body)
        wait_until(lambda: engine.num_active > 0)
        client.shutdown(socket.SHUT_WR)
        read_all(client)
    # The first request may still be compiling.
    wait_until(lambda: engine.num_active == engine.num_waiting == 0, seconds=60)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_does_not_read_is_disconnected(served, quick, monkeypatch, stream):
    """The response is larger than the buffers of the server and the system."""
    url, engine = served
    made, lost = connections.BoundedConnection.connection_made, connections.BoundedConnection.connection_lost
    ended = []

    def with_a_small_buffer(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(connections.BoundedConnection, "connection_made", with_a_small_buffer)
    monkeypatch.setattr(
        connections.BoundedConnection, "connection_lost", lambda self, exc: ended.append(lost(self, exc))
    )
    fields = {"n": 4, "max_tokens": 60, "logprobs": True, "top_logprobs": 20, "stream": stream, "seed": 1}
    body = json.dumps({"messages": MESSAGES, **fields}).encode()
    with connect(url, buffer=4096) as client:
        client.sendall(head(len(body)) + body)
        wait_until(lambda: ended, seconds=60)
        assert not read_all(client).endswith(b"0\r\n\r\n")
    wait_until(lambda: engine.num_active == engine.num_waiting == 0, seconds=60)


def test_incomplete_requests_do_not_block_shutdown(model):
    """Idle, half-sent and half-answered connections, and a server that is asked to stop."""
    body = json.dumps({"messages": MESSAGES, "stream": True, "max_tokens": 5}).encode()
    with serve(model) as (url, _), connect(url) as idle, connect(url) as begun, connect(url) as asking:
        begun.sendall(b"GET / HTTP/1.1\r\nHost")
        asking.sendall(head(len(body)) + body[:20])
        idle.sendall(GET)
        assert idle.recv(1000)
        time.sleep(0.1)
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 5
