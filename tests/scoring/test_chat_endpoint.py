"""The client of OpenAI-compatible APIs against a real HTTP server that fails in every way."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from judge_server import completion, failure, judge_server

from maxlm.config.feedback import EndpointConfig
from maxlm.errors import ConfigError, RequestError
from maxlm.scoring.chat_endpoint import ChatEndpoint
from maxlm.scoring.chat_models import ChatRequest, Reply, ReplyError, Stopped
from maxlm.scoring.ledger import Ledger

REQUEST = ChatRequest([{"role": "user", "content": "Hello"}], max_tokens=7, temperature=0.5, seed=3)
PRICES = {"input": 1e6, "output": 2e6}  # a token of the prompt costs 1, one of the reply 2


@pytest.fixture
def server():
    with judge_server() as server:
        yield server


def endpoint(server, *, ledger=None, stopping=None, **settings):
    config = EndpointConfig(
        **{"kind": "endpoint", "base_url": server.base_url, "model": "judge", "retry_seconds": 0.001, **settings}
    )
    return closing(ChatEndpoint(config, ledger=ledger or Ledger(), stopping=stopping or threading.Event()))


def test_request_and_reply(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with endpoint(server, api_key_variable="JUDGE_KEY", prices=PRICES) as model:
        assert model.reply(REQUEST) == Reply("fine", 10, 5, is_complete=True, requests=1, cost=20.0)
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == "Bearer secret"
    messages = [{"role": "user", "content": "Hello"}]
    expected = {"model": "judge", "messages": messages, "max_tokens": 7, "temperature": 0.5, "seed": 3}
    assert server.bodies == [expected]


def test_fields_of_the_body_can_be_changed(server):
    body = {"max_tokens": None, "max_completion_tokens": 9, "reasoning_effort": "low"}
    with endpoint(server, body=body) as model:
        model.reply(ChatRequest("Hello", max_tokens=7))
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0].items() >= {"max_completion_tokens": 9, "reasoning_effort": "low"}.items()
    # A text has no roles; chat APIs take it as the user's.
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Hello"}]


def test_cut_off_reply_and_reply_without_usage(server):
    server.reply = lambda body, number: completion("fi", finish_reason="length", usage=None)
    with endpoint(server, prices=PRICES) as model:
        reply = model.reply(REQUEST)
    assert not reply.is_complete
    # 5 bytes and the tokens around a message at 1 each, and 7 new tokens at 2.
    assert reply.cost == 5 + 16 + 16 + 7 * 2


@pytest.mark.parametrize(
    "bad",
    [
        failure(429, retry_after="0"),
        failure(500),
        failure(503, "<html>overloaded</html>"),
        (200, {"content-type": "text/html"}, b"<html>Welcome to the hotel's network</html>"),
        (200, {"content-type": "application/json"}, b'{"choices": []}'),
        (200, {"content-type": "application/json"}, b'{"choices": [{"message": {"content": nu'),
        (200, {"content-type": "application/json", "content-encoding": "gzip"}, b"not gzip"),
        (200, {}, b""),
        None,
    ],
    ids=["429", "500", "503", "page", "no choices", "half JSON", "not gzip", "empty", "broken connection"],
)
def test_transient_failures_are_retried(server, bad):
    server.reply = lambda body, number: completion("fine") if number == 2 else bad
    ledger = Ledger()
    with endpoint(server, ledger=ledger) as model:
        assert model.reply(REQUEST).requests == 3
        server.reply = lambda body, number: bad
        with pytest.raises(ReplyError, match=server.base_url) as error:
            model.reply(REQUEST)
    assert error.value.requests == 6
    assert ledger.requests == 9


def test_silent_and_slow_servers_are_given_up(server):
    """The time limit holds for the whole reply, also if a byte comes now and then."""
    ends = threading.Event()

    def drip():
        while not ends.wait(0.02):
            yield b" "

    try:
        with endpoint(server, timeout_seconds=0.1, retries=1, prices=PRICES) as model:
            for content in (b"late", drip()):

                def reply(body, number, content=content):
                    if isinstance(content, bytes):
                        ends.wait(5)
                    return 200, {}, content if isinstance(content, bytes) else drip()

                server.reply = reply
                with pytest.raises(ReplyError, match=r"does not answer in 0\.1 s") as error:
                    model.reply(REQUEST)
                # The server may bill what it computed.
                assert error.value.cost == 2 * 51
                assert error.value.requests == 2
    finally:
        ends.set()


def test_endless_reply_is_bounded(server):
    def flood():
        while True:
            yield b" " * (1 << 20)

    server.reply = lambda body, number: (200, {}, flood())
    with endpoint(server, retries=0) as model, pytest.raises(ReplyError, match="sends more than 8 MiB"):
        model.reply(REQUEST)


def test_server_that_is_not_there():
    with judge_server() as server:
        pass
    with endpoint(server, retries=1) as model, pytest.raises(ReplyError, match="cannot be reached") as error:
        model.reply(REQUEST)
    assert error.value.requests == 2


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            failure(401, '{"error": {"message": "bad key secret"}}'),
            r"refuses the key in JUDGE_KEY \(401\): bad key \*\*\*",
        ),
        (failure(403, "secret"), r"refuses the key in JUDGE_KEY \(403\): \*\*\*"),
        (failure(404, '{"error": "no such model"}'), "answers 404: no such model; check base_url"),
        (failure(302, location="https://example.com/"), "redirects to https://example.com/; set base_url"),
        (
            failure(429, '{"error": {"message": "none left", "code": "insufficient_quota"}}'),
            "no quota left .*: none left",
        ),
    ],
)
def test_refusal_of_all_requests_ends_the_run_at_once(server, reply, sentence, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.reply = lambda body, number: reply
    with endpoint(server, api_key_variable="JUDGE_KEY") as model, pytest.raises(RequestError, match=sentence):
        model.reply(REQUEST)
    assert len(server.bodies) == 1


def test_refusal_of_one_request_is_not_retried(server):
    server.reply = lambda body, number: failure(400, '{"error": {"message": "the prompt is too long"}}')
    with endpoint(server, prices=PRICES) as model:
        with pytest.raises(ReplyError, match=r"refuses the request \(400\): the prompt is too long") as error:
            model.reply(REQUEST)
        assert (error.value.requests, error.value.cost) == (1, 0.0)
        tree = {"choices": [{"message": {"content": None, "refusal": "I cannot help"}}]}
        server.reply = lambda body, number: completion("", **tree)
        with pytest.raises(ReplyError, match="declines: I cannot help"):
            model.reply(REQUEST)
    assert len(server.bodies) == 2


def test_api_key_must_be_set(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment variable JUDGE_KEY is not set"):
        endpoint(server, api_key_variable="JUDGE_KEY")


def test_rate_and_concurrency_are_bounded(server):
    def slow(body, number):
        time.sleep(0.02)
        return completion("fine")

    server.reply = slow
    with endpoint(server, concurrent=2) as model, ThreadPoolExecutor(8) as pool:
        list(pool.map(model.reply, [REQUEST] * 8))
    assert server.most_running <= 2
    server.times.clear()
    with endpoint(server, requests_per_minute=3000) as model, ThreadPoolExecutor(8) as pool:
        list(pool.map(model.reply, [REQUEST] * 6))
    # Six requests, 20 ms apart; the first one may arrive late.
    assert max(server.times) - min(server.times) > 3 * 0.02


def test_pause_that_a_server_asks_for_is_obeyed(server):
    server.reply = lambda body, number: failure(429, retry_after="0.2") if number == 0 else completion("fine")
    with endpoint(server) as model:
        model.reply(REQUEST)
    assert server.times[1] - server.times[0] >= 0.19


def test_cost_never_passes_its_limit(server):
    """Eight threads at a time: what is in flight counts at its worst."""
    ledger = Ledger(max_cost=300.0, cost=10.0)
    server.reply = lambda body, number: completion("fine", usage=(20, 5))
    with endpoint(server, ledger=ledger, prices=PRICES) as model, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(model.reply, REQUEST) for _ in range(20)]
    errors = [future.exception() for future in futures]
    # Each costs 30, and 51 at worst: eight come to 240, and a ninth fits: 250 + 51 > 300.
    assert ledger.cost == 10 + 30 * 9 - 30
    assert sum(error is None for error in errors) == 8
    assert "above limits.max_cost=300" in str(next(filter(None, errors)))


def test_number_of_requests_never_passes_its_limit(server):
    server.reply = lambda body, number: failure(500)
    ledger = Ledger(max_requests=3)
    sentence = r"3 requests were sent, and limits\.max_requests=3"
    with endpoint(server, ledger=ledger) as model, pytest.raises(RequestError, match=sentence):
        model.reply(REQUEST)
    assert len(server.bodies) == 3


def test_nothing_is_sent_once_the_run_ends(server):
    stopping = threading.Event()
    stopping.set()
    with endpoint(server, stopping=stopping) as model, pytest.raises(Stopped):
        model.reply(REQUEST)
    assert server.bodies == []


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("api.example.com/v1", "must begin with http"),
        ("https://me:secret@example.com/v1", "must not hold a password"),
        ("https://example.com/v1?key=1", "must not hold a password or parameters"),
        ("https://example.com/v1/chat/completions", "leave out /chat/completions"),
    ],
)
def test_wrong_addresses_are_refused(address, sentence):
    with pytest.raises(ValueError, match=sentence):
        EndpointConfig(kind="endpoint", base_url=address, model="judge")
