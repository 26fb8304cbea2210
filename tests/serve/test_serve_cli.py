"""`maxlm serve` as a process: address, signals and errors."""

import argparse
import json
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from running_server import sse_events

from maxlm.errors import RequestError
from maxlm.serve import cli
from maxlm.serve.server import bind, url_of


def arguments(*argv):
    parser = argparse.ArgumentParser(prog="maxlm")
    cli.register(parser.add_subparsers())
    return parser.parse_args(["serve", *map(str, argv)])


@pytest.fixture
def process(bundle):
    command = [sys.executable, "-m", "maxlm.cli", "serve", bundle, "--port", "0", "--slots", "2", "--max-length", "128"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def address(process):
    line = process.stdout.readline()
    match = re.match(r"Serving tiny-int8 on (http://127\.0\.0\.1:\d+) with 2 slots of 128", line)
    assert match, line
    return match[1]


def test_sigterm_finishes_running_requests_and_exits_with_0(process):
    url = address(process)
    # Eight answers per slot, so that the signal arrives while most are waiting.
    body = {"messages": [{"role": "user", "content": "The"}], "stream": True, "n": 16, "max_tokens": 60, "seed": 1}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        lines = reply.iter_text()
        text = next(lines)
        process.send_signal(signal.SIGTERM)
        text += "".join(lines)
    events, done = sse_events(text)
    assert done
    finished = [event["choices"][0] for event in events if event["choices"] and event["choices"][0]["finish_reason"]]
    assert sorted(choice["index"] for choice in finished) == list(range(16))
    assert process.wait(timeout=60) == 0
    assert re.fullmatch(r"\S+ \S+ INFO req_\w+ 127.0.0.1 POST /v1/chat/completions 200 \S+ s\n", process.stderr.read())


def test_sigint_stops_an_idle_server_with_0(process):
    url = address(process)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


def test_port_in_use_raises(bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; use"):
            cli.run(arguments(bundle, "--port", port))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "\x00"])
def test_foreign_address_raises(host):
    with pytest.raises(RequestError, match="listen on"):
        bind(host, 0)


@pytest.mark.parametrize("port", [-1, 65536, 10**10])
def test_port_out_of_range_raises(port):
    with pytest.raises(RequestError, match="listen on"):
        bind("127.0.0.1", port)


def test_address_is_printed_as_a_url():
    with bind("127.0.0.1", 0) as listener:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url_of(listener))


def test_missing_extra_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RequestError, match=r"pip install 'maxlm\[serve\]'"):
        cli.run(arguments(bundle))


def test_context_too_short_raises(bundle):
    with pytest.raises(RequestError, match="max_length is 3"):
        cli.run(arguments(bundle, "--port", 0, "--max-length", 3))


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        arguments("--help")
    assert "example: maxlm serve" in capsys.readouterr().out


def test_openapi_schema_lists_the_endpoints(http):
    paths = json.loads(http.get("/openapi.json").text)["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= set(paths)
