"""`response_format`: the prompt asks for the form, and the reply has the value that was read, or why there is none."""

import re
import time

import openai
import pytest

from maxlm.errors import ConfigError
from maxlm.serve.formats import ResponseFormat, read_answer

MESSAGES = [{"role": "user", "content": "The quick brown"}]
WORDS = {"type": "regex", "pattern": "[^ ]+"}


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def create(client, form, **settings):
    return client.chat.completions.create(
        model="tiny-int8", messages=MESSAGES, max_tokens=20, temperature=0, response_format=form, **settings
    )


def test_reply_has_the_value_in_its_text(client, model):
    reply = create(client, WORDS)
    message = reply.choices[0].message
    asked = [{"role": "user", "content": "The quick brown\n\nThe answer must match the regular expression [^ ]+"}]
    assert message.content == model.generate(asked, max_new_tokens=20)[0]
    assert message.parsed == re.findall("[^ ]+", message.content)[-1]
    assert message.unreadable is None
    missing = create(client, {"type": "regex", "pattern": "Q{9}"}).choices[0].message
    assert missing.parsed is None
    assert missing.unreadable.endswith("has nothing that matches Q{9}")


def test_last_chunk_of_a_choice_has_the_value(client):
    whole = create(client, WORDS, n=2)
    chunks = [chunk.choices[0] for chunk in create(client, WORDS, n=2, stream=True)]
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.delta.content or "" for chunk in mine) == choice.message.content
        assert mine[-1].delta.parsed == choice.message.parsed
        assert all("parsed" not in (chunk.delta.model_extra or {}) for chunk in mine[:-1])


def test_replies_without_a_form_have_no_value(client):
    assert "parsed" not in create(client, {"type": "text"}).choices[0].message.model_extra


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "regex", "pattern": "("}, "response_format: pattern: '\\(' is not a regular expression"),
        ({"type": "regex", "choices": ["a", "b"]}, "response_format: type regex needs pattern"),
        ({"type": "choices", "choices": ["a", "A"]}, "choices: must be two or more different words"),
        ({"type": "json_object", "pattern": "a"}, "pattern is not for type json_object"),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            r"response_format\.json_schema\.schema: Field required",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"type": "text"}}}}},
            r"response_format\.json_schema\.schema: properties\.a\.type: 'text' is not",
        ),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/a"}}}, "the reference .* is to nothing"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"patternProperties": {"a": {}}}}},
            "patternProperties is not supported",
        ),
    ],
    ids=range(8),
)
def test_malformed_forms_get_400_with_the_place(form, message, client):
    with pytest.raises(openai.BadRequestError, match=message):
        create(client, form)


def test_form_needs_a_message_of_the_user(client):
    messages = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(openai.BadRequestError, match="response_format: needs a message of the user"):
        client.chat.completions.create(model="tiny-int8", messages=messages, response_format=WORDS)


def schema(tree):
    return ResponseFormat(type="json_schema", json_schema={"schema": tree}).build()


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (schema({"type": "object", "required": ["a"]}), 'Well: {"b": 1} or {"a": 2}', {"a": 2}),
        (schema({"type": "null"}), "null", None),
        (ResponseFormat(type="json_object").build(), "```json\n{}\n```", {}),
        (ResponseFormat(type="choices", choices=["yes", "no"]).build(), "I think so.\nAnswer: **Yes**", "yes"),
    ],
    ids=range(4),
)
def test_values_are_read_as_in_evaluation(form, text, expected):
    assert read_answer(form, text, "stop") == {"parsed": expected, "unreadable": None}


@pytest.mark.parametrize(
    ("form", "text", "reason"),
    [
        (schema({"type": "object", "required": ["a"]}), '{"b": 1}', "'a' is a required property"),
        (schema({}), "NaN", "holds no JSON value"),
        (schema({}), '"\\ud800"', "holds a value that JSON cannot encode"),
        (schema({"type": "string", "pattern": "^(a|aa)+$"}), f'"{"a" * 50}b"', "takes more than "),
        (ResponseFormat(type="regex", pattern="^(a|aa)+$").build(), "a" * 50 + "b", "takes more than "),
    ],
    ids=range(5),
)
def test_unreadable_answers_say_why_and_hang_nothing(form, text, reason):
    start = time.monotonic()
    found = read_answer(form, text, "length")
    assert time.monotonic() - start < 5
    assert found["parsed"] is None
    assert found["unreadable"].startswith("is cut off, and ")
    assert reason in found["unreadable"]


def test_unusable_schema_is_an_error_of_its_field():
    with pytest.raises(ConfigError, match=r"^response_format\.json_schema\.schema: type: 1 is not valid"):
        schema({"type": 1})
