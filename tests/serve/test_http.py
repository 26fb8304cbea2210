"""What the server does with odd, hostile and absent clients, and what it tells of itself."""

import json
import re
import socket
import struct
import time

import httpx
import pytest
from running_server import serve, sse_events, wait_until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "The quick brown"}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b"\xff\xfe\x00",
        b'{"messages": []}',
        b'{"messages": [{}]}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "user", "content": null}]}',
        b'{"messages": [{"role": "user", "content": 5}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1.5}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e300}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop": [""]}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop": {"a": 1}}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_k": -1}',
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "no_such_field": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_malformed_body_is_told_as_400(http, body):
    reply = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("prompt", "told"),
    [([], "prompt"), ([5, -1], "outside of the vocabulary"), ([10**9], "outside of the vocabulary"), ({}, "prompt")],
)
def test_odd_prompts_of_completions(http, prompt, told):
    reply = http.post("/v1/completions", json={"prompt": prompt})
    assert reply.status_code == 400
    assert told in reply.text


def test_mistakes_name_the_field(http):
    reply = http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "top_p": 3, "temprature": 1})
    message = reply.json()["error"]["message"]
    assert "top_p: Input should be less than or equal to 1" in message
    assert "temprature: this field is unknown" in message


def test_a_body_of_another_type_is_told_the_header_that_it_lacks(http):
    for content_type in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"):
        reply = http.post(CHAT, content=json.dumps({"messages": MESSAGES}), headers={"Content-Type": content_type})
        assert reply.status_code == 400
        assert "Content-Type: application/json" in reply.json()["error"]["message"]


def test_fields_without_effect_are_accepted(http):
    body = {
        "messages": MESSAGES,
        "max_tokens": 1,
        "user": "me",
        "store": False,
        "presence_penalty": 0,
        "logit_bias": {},
    }
    assert http.post(CHAT, json=body).status_code == 200


def test_a_body_too_large_is_refused(http):
    large = json.dumps({"messages": [{"role": "user", "content": "x" * 9_000_000}]}).encode()
    assert http.post(CHAT, content=large).status_code == 413
    in_chunks = (large[start : start + 65536] for start in range(0, len(large), 65536))
    assert http.post(CHAT, content=in_chunks).status_code == 413


def test_a_long_text_within_the_limit_is_told_its_length(http):
    reply = http.post(CHAT, json={"messages": [{"role": "user", "content": "fox " * 100_000}]})
    assert reply.status_code == 400
    assert re.search(r"prompt has \d+ tokens .* the context holds 128", reply.json()["error"]["message"])


def test_unknown_paths_and_methods_have_the_same_shape(http):
    for reply, status in ((http.get("/nothing"), 404), (http.get(CHAT), 405), (http.get("/static/../app.py"), 404)):
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_a_stream_is_server_sent_events(http):
    reply = http.post(CHAT, json={"messages": MESSAGES, "stream": True, "max_tokens": 5, "seed": 1})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events, done = sse_events(reply.text)
    assert done
    assert all(event["object"] == "chat.completion.chunk" for event in events)


def test_a_stream_that_cannot_start_is_an_error_not_a_stream(http):
    reply = http.post(CHAT, json={"messages": MESSAGES, "stream": True, "max_tokens": 5000})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_killed_frees_its_slots(served, stream):
    url, engine = served
    host, port = url.removeprefix("http://").split(":")
    # Four times as many answers as slots: killed at the first sign of life, most have not begun.
    body = json.dumps({"messages": MESSAGES, "stream": stream, "n": 16}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    before = finished(url)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: engine.num_active > 0)
        # A reset in place of a farewell, as of a process that is killed.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: sum(finished(url).values()) == sum(before.values()) + 16)
    assert engine.num_active == engine.num_waiting == 0
    assert finished(url)["cancelled"] >= before.get("cancelled", 0) + 8


def finished(url):
    """Generations ended, by reason, as /metrics tells."""
    text = httpx.get(f"{url}/metrics").text
    return {m[1]: float(m[2]) for m in re.finditer(r'maxlm_generations_total{reason="(\w+)"} (\S+)', text)}


def test_half_a_request_and_noise_do_no_harm(url):
    host, port = url.removeprefix("http://").split(":")
    for noise in (
        b"",
        b"\x16\x03\x01\x02\x00",
        b"GET",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(noise)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_full_queue_is_told_as_429(model):
    with serve(model, num_slots=2, max_waiting=0) as (url, engine):
        reply = httpx.post(f"{url}{CHAT}", json={"messages": MESSAGES, "max_tokens": 1, "n": 3})
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "queue_full"
        assert reply.headers["retry-after"] == "1"
        wait_until(lambda: engine.num_active == engine.num_waiting == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_tells_when_the_engine_has_failed(model):
    with serve(model) as (url, engine):
        assert httpx.get(f"{url}/health").status_code == 200
        engine._state.cache.keys.delete()
        reply = httpx.post(f"{url}{CHAT}", json={"messages": MESSAGES, "max_tokens": 5})
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "server_error"
        assert httpx.get(f"{url}/health").status_code == 503
        reply = httpx.post(f"{url}{CHAT}", json={"messages": MESSAGES, "max_tokens": 5})
        assert reply.status_code == 503
        assert "the engine has stopped" in reply.json()["error"]["message"]


def test_metrics_count_what_happened(model):
    with serve(model, num_slots=2) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        tokens = 0
        for seed in range(3):
            reply = http.post("/v1/completions", json={"prompt": "The", "max_tokens": 4, "seed": seed}).json()
            tokens += reply["usage"]["completion_tokens"]
        http.get("/nothing/here")
        values = {}
        time.sleep(0.05)
        for line in http.get("/metrics").text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+({\w+="[^"]*"(,\w+="[^"]*")*})? \S+', line)
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[name] = float(value)
        assert values['maxlm_http_requests_total{path="/v1/completions",status="200"}'] == 3
        assert values['maxlm_http_requests_total{path="other",status="404"}'] == 1
        assert values["maxlm_generated_tokens_total"] == tokens
        assert values["maxlm_prompt_tokens_total"] == 3 * len(model.encode("The"))
        assert values["maxlm_time_to_first_token_seconds_count"] == 3
        assert values['maxlm_time_to_first_token_seconds_bucket{le="+Inf"}'] == 3
        assert values["maxlm_generation_seconds_sum"] >= values["maxlm_time_to_first_token_seconds_sum"] > 0
        assert values["maxlm_slots"] == 2
        assert values["maxlm_slots_active"] == values["maxlm_queue_length"] == 0
        buckets = [value for name, value in values.items() if name.startswith("maxlm_generation_seconds_bucket")]
        assert buckets == sorted(buckets)


def test_an_unknown_model_may_have_any_name(http):
    for name in ("other", "a" * 10_000, "\ud800", "\n"):
        body = json.dumps({"messages": MESSAGES, "model": name})
        reply = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"


def test_a_chat_without_a_model_asks_the_one_that_is_served(http):
    reply = http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1}).json()
    assert reply["model"] == "tiny-int8"
