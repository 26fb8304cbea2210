"""Tools over HTTP: what the model sees of them, and its calls as the real OpenAI client gets them."""

import json

import openai
import pytest

from maxlm.generate.request import Event
from maxlm.prompts.tools import read_calls

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
QUESTION = {"role": "user", "content": "Rome?"}
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
TEXT = f"Let me see. <tool_call>\n{json.dumps(CALL)}\n</tool_call>"


class Scripted:
    """Plays `RunningRequests`: each request gets the text, a few characters at a time."""

    text, requests = "", ()

    def __init__(self, engine, requests, metrics):
        type(self).requests = requests
        self.num_new_tokens = len(self.text)

    async def events(self):
        for index in range(len(self.requests)):
            for start in range(0, len(self.text), 3):
                yield index, Event(text=self.text[start : start + 3])
            yield index, Event(text="", finish_reason="stop")


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr("maxlm.serve.app.RunningRequests", Scripted)
    monkeypatch.setattr(Scripted, "text", TEXT)
    return Scripted


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def create(client, messages=(QUESTION,), **settings):
    return client.chat.completions.create(**{"model": "tiny-int8", "messages": messages, "tools": TOOLS, **settings})


def prompt_of(scripted, model):
    return model.tokenizer.decode(scripted.requests[0].prompt_ids)


def test_call_and_its_result(client, scripted, model):
    [choice] = create(client).choices
    assert '{"type": "function", "function": {"name": "weather"' in prompt_of(scripted, model)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see. "
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", *CALL.values())
    scripted.text = "Sunny."
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    [choice] = create(client, [QUESTION, choice.message.model_dump(exclude_none=True), result]).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "Sunny.", None)
    chat = [QUESTION, {"role": "assistant", "content": "Let me see. ", "tool_calls": [{"function": CALL}]}, result]
    ids = model.tokenizer.encode_chat(chat, tools=TOOLS, generation_prompt=True).ids
    assert list(scripted.requests[0].prompt_ids) == ids


def test_streamed_calls(client, scripted):
    chunks = [chunk.choices[0] for chunk in create(client, stream=True, n=2)]
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.delta.content or "" for chunk in mine) == "Let me see. "
        assert [chunk.finish_reason for chunk in mine if chunk.finish_reason] == ["tool_calls"]
        [call] = mine[-1].delta.tool_calls
        assert (call.index, call.function.name) == (0, "weather")


@pytest.mark.parametrize(
    "text", ["1 <tool> < 2 <", "<tool_call>{}</tool_call>", TEXT.replace("weather", "other"), TEXT[:-20]]
)
def test_what_is_no_call_stays_text(text, client, scripted):
    scripted.text = text
    [choice] = create(client).choices
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in create(client, stream=True)) == text


def test_no_tools_are_shown_with_tool_choice_none(client, scripted, model):
    [choice] = create(client, tool_choice="none").choices
    assert choice.message.content == TEXT
    assert "weather" not in prompt_of(scripted, model)


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        (
            [QUESTION, {"role": "tool", "tool_call_id": "x", "content": "sunny"}],
            {},
            "is the result of the call 'x', but",
        ),
        ([QUESTION, {"role": "tool", "content": "sunny"}], {}, "is the result of a tool, but no answer"),
        ([QUESTION], {"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tool 1 is of type 'retrieval'"),
        ([QUESTION], {"tools": [{"type": "function"}]}, "tools: tool 1 must be a function"),
        ([QUESTION], {"tools": TOOLS * 2}, "the name 'weather' is given twice"),
        ([QUESTION], {"tool_choice": "required"}, "tool_choice is not supported by this server except as"),
        ([{"role": "user", "content": None}], {}, "only an answer that calls tools may have none"),
        ([{**QUESTION, "tool_calls": [{"function": CALL}]}], {}, "tool_calls are only for messages of the assistant"),
    ],
    ids=range(8),
)
def test_malformed_tools_and_calls_get_400(messages, settings, message, client, scripted):
    with pytest.raises(openai.BadRequestError, match=message):
        create(client, messages, **settings)


def test_tools_are_refused_where_calls_cannot_be_read(client, scripted, model, monkeypatch):
    monkeypatch.setattr(type(model.tokenizer), "decode", lambda self, ids: "<call:weather>")
    with pytest.raises(
        openai.BadRequestError, match="its chat template writes calls in a form that this server cannot"
    ):
        create(client)


def test_text_around_calls_is_kept():
    assert read_calls(f"{TEXT} and {TEXT}.", ["weather"]) == ("Let me see.  and Let me see. .", [CALL, CALL])
