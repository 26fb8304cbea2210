"""Malformed requests, hostile and disconnected clients, health and metrics."""

import json
import re
import socket
import struct
import time

import httpx
import jax
import pytest
from running_server import serve, sse_events, wait_until

import maxlm

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
        b'{"messages": [{"role": "user", "content": "x", "\\ud800": 1}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "stream_options": {"\\ud800": 1}, "\\ud800": 1}',
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
def test_malformed_body_gets_400(http, body):
    reply = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "the key 'seed' is given twice in one object"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true, "include_usage": false}}', "'include_usage'"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b"\xff", "it is not UTF-8"),
        (b"{", "Expecting property name"),
    ],
)
def test_invalid_json_error_names_the_reason(http, body, expected):
    reply = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.startswith("the body is not valid JSON: ")
    assert expected in message


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([], "prompt"), ([5, -1], "outside the vocabulary"), ([10**9], "outside the vocabulary"), ({}, "prompt")],
)
def test_invalid_prompts_of_completions(http, prompt, expected):
    reply = http.post("/v1/completions", json={"prompt": prompt})
    assert reply.status_code == 400
    assert expected in reply.text


def test_errors_name_the_field(http):
    reply = http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "top_p": 3, "temprature": 1})
    message = reply.json()["error"]["message"]
    assert "top_p: Input should be less than or equal to 1" in message
    assert "temprature: unknown field" in message


def test_wrong_content_type_error_names_the_header(http):
    for content_type in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"):
        reply = http.post(CHAT, content=json.dumps({"messages": MESSAGES}), headers={"Content-Type": content_type})
        assert reply.status_code == 400
        assert "Content-Type: application/json" in reply.json()["error"]["message"]


CHAT_FIELDS = {
    "user": "me",
    "store": False,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "modalities": ["text"],
    "stop": [],
    "top_p": 0,
    "stream_options": {"include_usage": True},
    "logprobs": False,
    "top_logprobs": 0,
    "add_generation_prompt": True,
    "max_completion_tokens": 1,
}


def test_fields_without_effect_are_accepted(http):
    assert http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, **CHAT_FIELDS}).status_code == 200
    answer = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "annotations": []}
    reply = http.post(CHAT, json={"messages": [*MESSAGES, answer, *MESSAGES], "max_tokens": 1})
    assert reply.status_code == 200
    body = {"prompt": "The", "max_tokens": 1, "best_of": 2, "n": 2, "suffix": "", "echo": False, "logprobs": False}
    reply = http.post("/v1/completions", json=body)
    assert [choice["logprobs"] for choice in reply.json()["choices"]] == [None, None]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.1),
        ("frequency_penalty", -2),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 100}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format.type", "xml"),
        ("response_format", {"type": "regex"}),
        ("store", True),
        ("service_tier", "flex"),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("stream_options.include_obfuscation", True),
        ("stream_options.chunk_size", 5),
        ("echo", True),
        ("guided_json", {}),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("max_completion_tokens", 3),
        ("max_tokens", True),
        ("n", "2"),
        ("seed", False),
        ("temperature", "0"),
        ("stream", "false"),
        ("messages.0.name", "Ann"),
        ("messages.0.weight", 0),
        ("messages.0.content", [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]),
        ("messages.0.content", [{"type": "image_url", "image_url": {"url": "data:"}}]),
    ],
)
def test_unsupported_fields_get_400_with_their_name(http, field, value):
    """A field is used or rejected, never dropped; the error names it in `param` and in the message."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    *path, last = field.split(".")
    place = body
    for part in path:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[last] = value
    reply = http.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    named = "max_tokens" if field == "max_completion_tokens" else field
    assert error["param"] == named
    assert named in error["message"] or last in error["message"]


def test_partial_answer_is_continued_on_request(http, model):
    """A final assistant message is ambiguous: without continue_final_message it is rejected."""
    whole = model.generate(MESSAGES, max_new_tokens=12)[0]
    ids = model.tokenizer.encode(whole)
    begun = model.tokenizer.decode(ids[:2])
    body = {"messages": [*MESSAGES, {"role": "assistant", "content": begun}], "temperature": 0, "max_tokens": 8}
    refused = http.post(CHAT, json=body).json()["error"]
    assert refused["param"] == "messages"
    assert "continue_final_message: true" in refused["message"]
    reply = http.post(CHAT, json={**body, "continue_final_message": True, "add_generation_prompt": False}).json()
    assert reply["usage"]["prompt_tokens"] == len(model.encode(MESSAGES)) + len(model.tokenizer.encode(begun))
    assert model.tokenizer.encode(begun) == ids[:2]
    assert (begun + reply["choices"][0]["message"]["content"]).startswith(whole[: len(begun) + 3])


def test_every_response_has_a_request_id(http):
    """The client's own if it is safe to log, else a new one; also for errors and the page."""
    for reply in (http.get("/health"), http.get("/nothing"), http.post(CHAT, content=b"{"), http.get("/static/app.js")):
        assert re.fullmatch(r"req_[0-9a-f]{32}", reply.headers["x-request-id"])
    assert http.get("/health", headers={"x-request-id": "my-1.2"}).headers["x-request-id"] == "my-1.2"
    for odd in ("", "a b", "x" * 200, "é"):
        reply = http.get("/health", headers={"x-request-id": odd.encode("latin-1")})
        assert reply.headers["x-request-id"].startswith("req_")


def test_each_request_has_a_log_line(http, caplog):
    with caplog.at_level("INFO", logger="maxlm.serve"):
        http.post("/v1/completions?key=hidden", json={"prompt": "Secret words"}, headers={"x-request-id": "abc"})
        wait_until(lambda: "abc" in caplog.text)
    [line] = [record.getMessage() for record in caplog.records if "abc" in record.getMessage()]
    assert re.fullmatch(r"abc 127\.0\.0\.1 POST /v1/completions 200 \d+\.\d{3} s", line)


def test_head_matches_get(http):
    for path, status in (
        ("/", 200),
        ("/health", 200),
        ("/v1/models", 200),
        ("/metrics", 200),
        (CHAT, 405),
        ("/x", 404),
    ):
        reply = http.head(path)
        assert reply.status_code == status
        assert reply.content == b""
        assert int(reply.headers["content-length"]) > 0


def test_body_too_large_gets_413(http):
    large = json.dumps({"messages": [{"role": "user", "content": "x" * 9_000_000}]}).encode()
    assert http.post(CHAT, content=large).status_code == 413
    in_chunks = (large[start : start + 65536] for start in range(0, len(large), 65536))
    assert http.post(CHAT, content=in_chunks).status_code == 413


def test_error_of_a_long_text_gives_its_length(http):
    reply = http.post(CHAT, json={"messages": [{"role": "user", "content": "fox " * 100_000}]})
    assert reply.status_code == 400
    assert re.search(r"prompt has \d+ tokens .* the context holds 128", reply.json()["error"]["message"])


def test_unknown_paths_and_methods_have_the_same_error_format(http):
    for reply, status in ((http.get("/nothing"), 404), (http.get(CHAT), 405), (http.get("/static/../app.py"), 404)):
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_stream_is_server_sent_events(http):
    reply = http.post(CHAT, json={"messages": MESSAGES, "stream": True, "max_tokens": 5, "seed": 1})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events, done = sse_events(reply.text)
    assert done
    assert all(event["object"] == "chat.completion.chunk" for event in events)


def test_stream_that_cannot_start_is_an_error_response(http):
    reply = http.post(CHAT, json={"messages": [{"role": "user", "content": "fox " * 200}], "stream": True})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_killed_client_frees_its_slots(served, stream):
    url, engine = served
    host, port = url.removeprefix("http://").split(":")
    # Four times as many answers as slots: when the client is killed at the first bytes, most have not started.
    body = json.dumps({"messages": MESSAGES, "stream": stream, "n": 16}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    before = finished(url)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: engine.num_active > 0)
        # A reset instead of an orderly close, as from a killed process.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: sum(finished(url).values()) == sum(before.values()) + 16)
    assert engine.num_active == engine.num_waiting == 0
    assert finished(url)["cancelled"] >= before.get("cancelled", 0) + 8


def finished(url):
    """Generations ended, by reason, from /metrics."""
    text = httpx.get(f"{url}/metrics").text
    return {m[1]: float(m[2]) for m in re.finditer(r'maxlm_generations_total{reason="(\w+)"} (\S+)', text)}


def test_incomplete_requests_and_noise_do_no_harm(url):
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


def test_full_queue_gets_429(model):
    """A batch that can never fit gets 400; one that does not fit now gets 429."""
    with serve(model, num_slots=2, max_waiting=1) as (url, engine):
        reply = httpx.post(f"{url}/v1/completions", json={"prompt": ["The", "A"], "max_tokens": 1, "n": 2})
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "batch_too_large"
        assert "4 answers are requested at once, but at most 3" in reply.json()["error"]["message"]
        assert engine.num_active == engine.num_waiting == 0
        with httpx.stream("POST", f"{url}{CHAT}", json={"messages": MESSAGES, "stream": True, "n": 3}):
            reply = httpx.post(f"{url}{CHAT}", json={"messages": MESSAGES, "max_tokens": 1, "n": 3})
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "queue_full"
        assert reply.headers["retry-after"] == "1"
        wait_until(lambda: engine.num_active == engine.num_waiting == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_reports_a_failed_engine(model):
    with serve(model) as (url, engine):
        assert httpx.get(f"{url}/health").status_code == 200
        jax.tree.leaves(engine._state.caches)[0].delete()
        reply = httpx.post(f"{url}{CHAT}", json={"messages": MESSAGES, "max_tokens": 5})
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "server_error"
        assert httpx.get(f"{url}/health").status_code == 503
        reply = httpx.post(f"{url}{CHAT}", json={"messages": MESSAGES, "max_tokens": 5})
        assert reply.status_code == 503
        assert "the engine has stopped" in reply.json()["error"]["message"]


def test_metrics_count_requests_and_tokens(model):
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


def test_unknown_model_may_have_any_name(http):
    for name in ("other", "a" * 10_000, "\ud800", "\n"):
        body = json.dumps({"messages": MESSAGES, "model": name})
        reply = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"


def test_chat_without_a_model_uses_the_served_one(http):
    reply = http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1}).json()
    assert reply["model"] == "tiny-int8"


def test_model_of_hugging_face_is_served_as_it_generates(huggingface_folder):
    model = maxlm.load(huggingface_folder)
    body = {"prompt": ["The statement", "def f("], "max_tokens": 6, "temperature": 0}
    with serve(model) as (url, _):
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert [choice["text"] for choice in reply["choices"]] == model.generate(body["prompt"], max_new_tokens=6)
