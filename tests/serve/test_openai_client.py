"""The real OpenAI client against a real server."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from maxlm.generate.request import Request

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown"}]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny-int8"]
    assert client.models.retrieve("tiny-int8").owned_by == "maxlm"
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


def test_chat_completion_matches_the_models_text(client, model):
    reply = client.chat.completions.create(model="tiny-int8", messages=MESSAGES, max_tokens=12, temperature=0)
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == model.generate(MESSAGES, max_new_tokens=12)[0]
    assert choice.finish_reason in ("length", "stop")
    num_prompt_tokens = len(model.tokenizer.encode_chat(MESSAGES, generation_prompt=True).ids)
    assert reply.usage.prompt_tokens == num_prompt_tokens
    assert reply.usage.total_tokens == num_prompt_tokens + reply.usage.completion_tokens
    if choice.finish_reason == "length":
        assert reply.usage.completion_tokens == 12


def test_stream_gives_the_same_text_in_chunks(client):
    settings = {"model": "tiny-int8", "messages": MESSAGES, "max_tokens": 40, "temperature": 0.9, "seed": 5}
    whole = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_every_choice_has_its_own_random_stream(client):
    settings = {"model": "tiny-int8", "messages": MESSAGES, "max_tokens": 15, "temperature": 1.0}
    several = client.chat.completions.create(**settings, seed=40, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    alone = client.chat.completions.create(**settings, seed=40)
    assert alone.choices[0].message.content == several.choices[0].message.content
    next_seed = client.chat.completions.create(**settings, seed=41, n=3)
    assert len({choice.message.content for reply in (several, next_seed) for choice in reply.choices}) == 6
    streamed = {}
    for chunk in client.chat.completions.create(**settings, seed=40, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {choice.index: choice.message.content for choice in several.choices}


def test_equal_prompts_give_different_texts_reproducible_from_the_seed(client):
    settings = {"model": "tiny-int8", "prompt": ["The dog"] * 5, "max_tokens": 15, "temperature": 1, "n": 2}
    drawn = client.completions.create(**settings)
    texts = [choice.text for choice in drawn.choices]
    assert len(set(texts)) == 10
    assert 0 <= drawn.seed < 2**53
    again = client.completions.create(**settings, seed=drawn.seed)
    assert [choice.text for choice in again.choices] == texts
    assert again.seed == drawn.seed
    assert client.completions.create(**settings).seed != drawn.seed
    chunks = client.completions.create(**{**settings, "prompt": "The"}, seed=7, stream=True)
    assert {chunk.seed for chunk in chunks} == {7}


def test_top_p_of_0_is_greedy(client):
    settings = {"model": "tiny-int8", "prompt": "The dog", "max_tokens": 15}
    greedy = client.completions.create(**settings, temperature=0).choices[0].text
    assert client.completions.create(**settings, temperature=1.5, top_p=0).choices[0].text == greedy


def test_max_tokens_is_limited_by_the_context(client):
    for settings in ({"max_tokens": 10**6}, {"max_completion_tokens": 10**6}, {}):
        reply = client.chat.completions.create(model="tiny-int8", messages=MESSAGES, seed=1, **settings)
        assert reply.usage.total_tokens == 128 or reply.choices[0].finish_reason == "stop"
    reply = client.completions.create(model="tiny-int8", prompt=[20] * 120, max_tokens=500, seed=1)
    assert reply.usage.total_tokens == 128 or reply.choices[0].finish_reason == "stop"


def test_all_client_parameters_are_known(client, http):
    """An unsupported field is rejected for its value; null is a no-op."""
    its_own = {"extra_headers", "extra_query", "extra_body", "timeout", "self"}
    for create, path, body in (
        (client.chat.completions.create, "chat/completions", {"messages": MESSAGES}),
        (client.completions.create, "completions", {"prompt": "The"}),
    ):
        names = {*inspect.signature(create).parameters} - its_own
        reply = http.post(f"/v1/{path}", json={**dict.fromkeys(names), **body, "max_tokens": 1})
        assert reply.status_code == 200, reply.text


def test_text_does_not_depend_on_concurrent_requests(client):
    def ask(index):
        settings = [{"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.8}][index % 3]
        reply = client.completions.create(
            model="tiny-int8", prompt=f"The dog {index}", max_tokens=10 + 5 * index, seed=index, **settings
        )
        return reply.choices[0].text

    alone = [ask(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_stop_strings_end_the_text(client):
    settings = {"model": "tiny-int8", "prompt": "A model", "max_tokens": 40, "temperature": 1, "seed": 2}
    whole = client.completions.create(**settings).choices[0].text
    stop = whole[8:11]
    for value in (stop, [stop, "\x00never"]):
        choice = client.completions.create(**settings, stop=value).choices[0]
        assert choice.text == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"


def test_completions_take_text_ids_and_lists(client, model):
    ids = model.encode("The fox")
    settings = {"model": "tiny-int8", "max_tokens": 6, "temperature": 0}
    text = client.completions.create(**settings, prompt="The fox").choices[0].text
    assert client.completions.create(**settings, prompt=ids).choices[0].text == text
    both = client.completions.create(**settings, prompt=["A dog", "The fox"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == text
    assert client.completions.create(**settings, prompt=[ids, ids]).choices[1].text == text
    assert client.completions.create(**settings, prompt="").usage.prompt_tokens == 1


def test_log_probabilities(client, model):
    settings = {"model": "tiny-int8", "max_tokens": 5, "temperature": 0}
    chat = client.chat.completions.create(**settings, messages=MESSAGES, logprobs=True, top_logprobs=2)
    entries = chat.choices[0].logprobs.content
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
        assert len(entry.top_logprobs) == 2
        assert entry.logprob <= 0
    completion = client.completions.create(**settings, prompt="The", logprobs=3).choices[0]
    assert len(completion.logprobs.tokens) == len(completion.logprobs.token_logprobs)
    assert all(len(top) == 3 for top in completion.logprobs.top_logprobs)
    # 0 gives only the sampled tokens; without the field there are none.
    alone = client.completions.create(**settings, prompt="The", logprobs=0).choices[0].logprobs
    assert alone.top_logprobs == [{name: value} for name, value in zip(alone.tokens, alone.token_logprobs)]
    for nothing in (None, False):
        assert client.completions.create(**settings, prompt="The", logprobs=nothing).choices[0].logprobs is None
        chat = client.chat.completions.create(**settings, messages=MESSAGES, logprobs=nothing)
        assert chat.choices[0].logprobs is None


def test_bytes_of_tokens_concatenate_to_the_text(client):
    """Also for tokens that are part of a character, or have no text."""
    for seed in range(20):
        chat = client.chat.completions.create(
            model="tiny-int8", messages=MESSAGES, temperature=2, seed=seed, logprobs=True, top_logprobs=20
        )
        content = chat.choices[0].logprobs.content
        whole = bytes(byte for entry in content for byte in entry.bytes)
        assert whole.decode(errors="replace") == chat.choices[0].message.content
        assert all(top.bytes is not None for entry in content for top in entry.top_logprobs)
        if any(len(entry.bytes) == 1 and entry.bytes[0] > 127 for entry in content):
            return
    pytest.fail("no seed gave a token that is part of a character")


def test_offsets_are_the_starts_of_tokens(client, model):
    settings = {"model": "tiny-int8", "max_tokens": 40, "temperature": 1.5, "seed": 5, "logprobs": 0}
    for echo in (False, True):
        prompt = "The é dog"
        choice = client.completions.create(**settings, prompt=prompt, echo=echo).choices[0]
        assert choice.text.startswith(prompt) == echo
        logprobs, place = choice.logprobs, 0
        assert len(logprobs.text_offset) == len(logprobs.tokens)
        for name, offset, after in zip(logprobs.tokens, logprobs.text_offset, [*logprobs.text_offset[1:], None]):
            if not name.startswith("<"):
                assert choice.text[offset:after] == name
            assert offset >= place
            place = offset


def test_echo_scores_the_prompt_for_lm_eval(client, model):
    """The request of lm-eval's local-completions: log-probabilities of [ctxlen:-1], greedy if equal to the top one."""
    context, ending = model.encode("A model writes"), [200, 31, 32, 60]
    greedy = [event.token.id for event in stream_of(model, context, 4)]
    prompts = [[*context, *ending], [*context, *greedy], [1, 40]]
    reply = client.completions.create(
        model="tiny-int8", prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for prompt, choice in zip(prompts, reply.choices):
        logits = model.logits(np.asarray([prompt]))[0].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        values, top = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert len(values) == len(top) == len(prompt) + 1
        assert values[0] is top[0] is None
        # Rounding to int8 digits turns last-bit differences between batch shapes into whole steps.
        np.testing.assert_allclose(values[1:-1], expected[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-3)
        is_greedy = [value == max(entry.values()) for value, entry in zip(values[1:], top[1:])]
        assert is_greedy == [*(expected[:-1].argmax(-1) == prompt[1:]), True]
        assert choice.text.startswith(model.tokenizer.decode(prompt))
    assert all(reply.choices[1].logprobs.token_logprobs[-5:][i] is not None for i in range(5))
    assert reply.usage.completion_tokens == 3


def test_echo_alone_and_in_a_stream(client, model):
    full = [1, *[40] * 127]  # a prompt that fills the context can be scored, but not continued
    rated = client.completions.create(model="tiny-int8", prompt=full, max_tokens=0, echo=True, logprobs=0)
    assert len(rated.choices[0].logprobs.token_logprobs) == 128
    assert rated.choices[0].finish_reason == "length"
    assert rated.usage.completion_tokens == 0
    bare = client.completions.create(model="tiny-int8", prompt="The dog", max_tokens=0, echo=True).choices[0]
    assert (bare.text, bare.logprobs) == ("The dog", None)
    settings = {
        "model": "tiny-int8",
        "prompt": ["The", "A dog"],
        "max_tokens": 6,
        "seed": 2,
        "echo": True,
        "logprobs": 2,
    }
    whole = client.completions.create(**settings)
    texts, tokens, offsets = {}, {}, {}
    for chunk in client.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.logprobs:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert offsets[choice.index] == choice.logprobs.text_offset


def stream_of(model, ids, count):
    with model.engine(num_slots=2) as engine:
        request = Request(tuple(ids), max_new_tokens=count, temperature=0)
        return [event for event in engine.stream(request) if event.token]


def test_errors_raise_the_clients_own_exceptions(client):
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as error:
        chat(model="gpt-4", messages=MESSAGES)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 128.*the context holds 128") as error:
        chat(model="tiny-int8", messages=[{"role": "user", "content": "fox " * 200}], max_tokens=1)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny-int8", prompt=[40] * 128)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="frequency_penalty is not supported"):
        chat(model="tiny-int8", messages=MESSAGES, frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="chat role 'usr' is unknown; did you mean 'user'"):
        chat(model="tiny-int8", messages=[{"role": "usr", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as error:
        chat(model="tiny-int8", messages=MESSAGES, temperature=9)
    assert error.value.param == "temperature"
    assert error.value.request_id.startswith("req_")
