"""Continuous batching: results do not depend on concurrent requests, and slots are always freed."""

import threading
import time

import jax
import numpy as np
import pytest

from maxlm.errors import RequestError
from maxlm.generate.model import LoadedModel
from maxlm.generate.request import BatchTooLargeError, QueueFullError, Request
from tests.generate.conftest import make_decoder


def random_ids(model, seed, length):
    return tuple(np.random.default_rng(seed).integers(10, model.config.vocab_size, length).tolist())


def follow(stream):
    """Token ids, text and finish reason of a stream of events."""
    events = list(stream)
    tokens = [event.token.id for event in events if event.token]
    return tokens, "".join(event.text for event in events), events[-1].finish_reason


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.8}, {"temperature": 1.2, "top_k": 9}],
)
def test_text_does_not_depend_on_concurrent_requests(model, settings):
    request = Request(random_ids(model, 0, 13), max_new_tokens=30, seed=7, **settings)
    with model.engine(num_slots=8) as engine:
        alone = follow(engine.stream(request))
        # The others differ in length, settings and stops, so they leave and let more join while this one runs.
        others = [
            Request(
                random_ids(model, index, 5 + 9 * index % 60),
                max_new_tokens=3 + 5 * index,
                temperature=(0.0, 1.0, 2.0)[index % 3],
                top_p=(1.0, 0.5)[index % 2],
                top_k=(0, 0, 4)[index % 3],
                seed=index,
            )
            for index in range(1, 12)
        ]
        streams = [engine.stream(other) for other in others[:5]]
        amid = engine.stream(request)
        streams += [engine.stream(other) for other in others[5:]]
        assert follow(amid) == alone
        for stream in streams:
            follow(stream)


def test_more_requests_than_slots_all_finish(model):
    with model.engine(num_slots=2) as engine:
        streams = [engine.stream(Request(random_ids(model, i, 4), max_new_tokens=1 + i, seed=i)) for i in range(9)]
        for index, stream in enumerate(streams):
            tokens, _, reason = follow(stream)
            assert reason in ("length", "stop")
            assert len(tokens) == 1 + index or reason == "stop"
        assert engine.num_active == engine.num_waiting == 0


def test_without_a_limit_the_answer_fills_the_context(model):
    prompt = random_ids(model, 3, 100)
    with model.engine(num_slots=2) as engine:
        for seed in range(20):
            tokens, _, reason = follow(engine.stream(Request(prompt, seed=seed)))
            if reason == "length":
                assert len(tokens) == model.execution.max_length - 100
                return
    pytest.fail("no seed gave an answer without a stop token")


def test_cancelling_frees_the_slot_and_the_queue(model):
    with model.engine(num_slots=2) as engine:
        events = []
        running = [engine.submit(Request(random_ids(model, i, 5), seed=i, top_k=5), events.append) for i in range(4)]
        for generation in running:
            generation.cancel()
        wait_until(lambda: sum(event.finish_reason is not None for event in events) == 4)
        assert engine.num_active == engine.num_waiting == 0
        assert follow(engine.stream(Request(random_ids(model, 9, 5), max_new_tokens=2)))[2] in ("length", "stop")


def test_leaving_a_stream_cancels_it(model):
    with model.engine(num_slots=2) as engine:
        stream = engine.stream(Request(random_ids(model, 1, 5)))
        next(stream)
        stream.close()
        wait_until(lambda: engine.num_active == 0)


def test_failing_callback_ends_only_its_own_request(model):
    def broken(event):
        raise OSError("gone")

    with model.engine(num_slots=2) as engine:
        engine.submit(Request(random_ids(model, 1, 5)), broken)
        wait_until(lambda: engine.num_active == 0 and engine.num_waiting == 0)
        assert follow(engine.stream(Request(random_ids(model, 2, 5), max_new_tokens=2)))[2] in ("length", "stop")


def test_queue_is_bounded(model):
    entered, go_on = threading.Event(), threading.Event()

    def block(event):
        entered.set()
        go_on.wait(20)

    with model.engine(num_slots=2, max_waiting=1) as engine:
        engine.submit(Request(random_ids(model, 0, 5), max_new_tokens=1), block)
        entered.wait(20)
        streams = [engine.stream(Request(random_ids(model, i, 5), max_new_tokens=1)) for i in range(2)]
        with pytest.raises(QueueFullError, match="3 requests are already running or waiting"):
            engine.submit(Request(random_ids(model, 3, 5)), print)
        with pytest.raises(BatchTooLargeError, match=r"4 answers .* at most 3"):
            engine.submit_all([Request((1,))] * 4, print)
        go_on.set()
        assert [follow(stream)[2] for stream in streams] == ["length", "length"]


@pytest.mark.parametrize("window", [20, 40])
def test_prompts_shorter_and_longer_than_a_window_continue_as_in_the_forward_pass(tokenizer, window):
    """Past the window, in slots that held other sequences before."""
    model, counts = LoadedModel(make_decoder(tokenizer, window=window), tokenizer, name="tiny"), []
    with model.engine(num_slots=2) as engine:
        for seed, length in enumerate((5, 30, 60, 3, 7, 4)):
            prompt = random_ids(model, seed, length)
            request = Request(prompt, max_new_tokens=50, seed=seed)
            tokens = [event.token for event in engine.stream(request) if event.token]
            ids = [token.id for token in tokens]
            logits = model.logits(np.asarray([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for token, row in zip(tokens, expected):
                assert token.log_probability == pytest.approx(row[token.id], abs=1e-4)
            counts.append((length, len(ids)))
    assert any(length < 16 and length + count > window for length, count in counts), counts


def test_closing_cancels_running_requests(model):
    ended = []
    engine = model.engine(num_slots=2)
    for index in range(3):
        engine.submit(Request(random_ids(model, index, 5)), lambda event: ended.append(event.finish_reason))
    engine.close()
    assert ended.count("cancelled") + ended.count("stop") + ended.count("length") == 3
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request((1,)), print)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_device_failure_reaches_every_request(model):
    with model.engine(num_slots=2) as engine:
        jax.tree.leaves(engine._state.caches)[0].delete()
        with pytest.raises(RuntimeError, match="deleted"):
            list(engine.stream(Request(random_ids(model, 0, 5))))
        assert engine.failure is not None
        with pytest.raises(RuntimeError, match="has stopped"):
            engine.submit(Request((1,)), print)


def test_log_probabilities_match_the_model(model):
    prompt = random_ids(model, 4, 6)
    with model.engine(num_slots=2) as engine:
        request = Request(prompt, max_new_tokens=8, temperature=0.7, top_p=0.9, seed=1, top_tokens=3)
        events = [event for event in engine.stream(request) if event.token]
    ids = [*prompt, *(event.token.id for event in events)]
    logits = model.logits(np.asarray([ids]))[0, len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for event, row in zip(events, expected):
        assert event.token.log_probability == pytest.approx(row[event.token.id], abs=1e-4)
        assert [id_ for id_, _ in event.token.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([value for _, value in event.token.top], np.sort(row)[::-1][:3], atol=1e-4)


def test_prompt_scores_match_the_forward_pass(model):
    prompt = random_ids(model, 5, 37)
    with model.engine(num_slots=2) as engine:
        events = list(engine.stream(Request(prompt, max_new_tokens=0, score_prompt=True, top_tokens=2)))
        rated = next(engine.stream(Request(prompt, max_new_tokens=3, score_prompt=True)))
    [event] = events
    assert event.finish_reason == "length"
    assert [token.id for token in event.prompt] == list(prompt)
    assert event.prompt[0].log_probability is None
    logits = model.logits(np.asarray([prompt]))[0, :-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = [token.log_probability for token in event.prompt[1:]]
    np.testing.assert_allclose(values, expected[np.arange(36), prompt[1:]], atol=1e-4)
    assert [[id_ for id_, _ in token.top] for token in event.prompt[1:]] == np.argsort(-expected)[:, :2].tolist()
    assert rated.finish_reason is None
    assert [token.log_probability for token in rated.prompt[1:]] == values


def test_context_can_be_shorter_than_the_models(model):
    with model.engine(num_slots=2, max_length=32) as engine:
        with pytest.raises(RequestError, match="the context holds 32"):
            engine.submit(Request(random_ids(model, 0, 30), max_new_tokens=3), print)
        assert follow(engine.stream(Request(random_ids(model, 0, 30), max_new_tokens=2)))[2] in ("length", "stop")
    with pytest.raises(RequestError, match="at least 16"):
        model.engine(num_slots=2, max_length=3)


def test_warm_up_leaves_all_slots_free(model):
    with model.engine(num_slots=2, max_length=40) as engine:
        engine.warm_up()
        assert engine.num_active == engine.num_waiting == 0


@pytest.mark.parametrize("settings", [{}, {"top_tokens": 3}])
def test_nothing_is_compiled_after_warm_up(model, caplog, settings):
    with model.engine(num_slots=3, max_length=44) as engine:
        engine.warm_up()
        jax.config.update("jax_log_compiles", True)
        try:
            follow(engine.stream(Request(random_ids(model, 0, 20), max_new_tokens=12, temperature=0.7, **settings)))
        finally:
            jax.config.update("jax_log_compiles", False)
    assert not [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": ()}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": ("",)}, "stop string"),
        ({"top_tokens": 21}, "top_tokens"),
    ],
)
def test_settings_out_of_range_raise(fields, message):
    with pytest.raises(RequestError, match=message):
        Request(**{"prompt_ids": (1,), **fields})


@pytest.mark.parametrize("token", [-1, 10_000])
def test_token_ids_outside_the_vocabulary_raise(model, token):
    with model.engine(num_slots=2) as engine, pytest.raises(RequestError, match="outside the vocabulary"):
        engine.submit(Request((1, token)), print)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_any_integer_is_a_valid_seed(model, seed):
    with model.engine(num_slots=2) as engine:
        request = Request((1, 20), max_new_tokens=5, seed=seed)
        assert follow(engine.stream(request)) == follow(engine.stream(request))
