"""The real OpenAI client against a real server."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

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


def test_a_chat_completion_is_the_models_own_text(client, model):
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


def test_a_stream_is_the_same_text_in_pieces(client):
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


def test_n_choices_are_those_of_the_seeds_that_follow(client):
    settings = {"model": "tiny-int8", "messages": MESSAGES, "max_tokens": 15, "temperature": 1.0}
    several = client.chat.completions.create(**settings, seed=40, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    for index, choice in enumerate(several.choices):
        alone = client.chat.completions.create(**settings, seed=40 + index)
        assert choice.message.content == alone.choices[0].message.content
    streamed = {}
    for chunk in client.chat.completions.create(**settings, seed=40, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {choice.index: choice.message.content for choice in several.choices}


def test_text_does_not_depend_on_who_else_asks(client):
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


def test_mistakes_are_the_clients_own_exceptions(client):
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as error:
        chat(model="gpt-4", messages=MESSAGES)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="the context holds 128"):
        chat(model="tiny-int8", messages=MESSAGES, max_tokens=1000)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty is not supported"):
        chat(model="tiny-int8", messages=MESSAGES, frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="chat role 'usr' is unknown; did you mean 'user'"):
        chat(model="tiny-int8", messages=[{"role": "usr", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as error:
        chat(model="tiny-int8", messages=MESSAGES, temperature=9)
    assert error.value.param == "temperature"
