"""Forms of answers: how they are asked for, read and refused."""

import pytest

from maxlm.errors import ConfigError
from maxlm.prompts.answer_formats import ChoiceFormat, JsonFormat, RegexFormat, UnreadableAnswer

YES_NO = ChoiceFormat(("yes", "no", "not sure"))
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Answer: yes", "yes"),
        ("It is odd.\nAnswer: No.", "no"),
        ("Answer: yes or no?\n\n**Answer:** `no`", "no"),
        ("answer：YES", "yes"),
        ("> Answer: [[not sure]]\n", "not sure"),
        (" Yes! ", "yes"),
        ("“no”", "no"),
        ("Ａｎｓｗｅｒ of a kind\nAnswer: ｙｅｓ", "yes"),
    ],
)
def test_choices(text, choice):
    assert YES_NO.parse(text) == choice


@pytest.mark.parametrize(
    "text", ["", "yes and no", "Answer: maybe", "The answer: yes", "Answer:", "no idea", "Answer yes"]
)
def test_no_choice(text):
    with pytest.raises(UnreadableAnswer, match="where X is yes, no or not sure"):
        YES_NO.parse(text)


def test_chinese_choices():
    form = ChoiceFormat(("是", "否"), label="答案")
    assert form.parse("因为如此。\n答案：是。") == "是"
    assert form.instruction() == 'End with one line, "答案: X", where X is 是 or 否.'


@pytest.mark.parametrize("choices", [("a",), ("a", ""), ("a", "A"), ("a", "*a*")])
def test_choices_that_cannot_be_told_apart_are_refused(choices):
    with pytest.raises(ConfigError, match="two or more different words"):
        ChoiceFormat(choices)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ann", "age": 3}',
        'Here it is:\n```json\n{"name": "Ann", "age": 3}\n```\nBye {now}.',
        'First {"name": 1}, no: {"age": 3, "name": "Ann"} [sic]',
        '  {"name": "Ann",\n "age": 3}',
    ],
)
def test_json_in_any_text(text):
    assert JsonFormat(PERSON).parse(text) == {"name": "Ann", "age": 3}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no JSON value"),
        ("Ann is 3.", "holds no JSON value"),
        ('{"name": "Ann"', "holds no JSON value"),
        ('{"age": 3}', "'name' is a required property"),
        ('{"name": "Ann", "age": -1}', "age: -1 is less than the minimum of 0"),
        ('{"name": "Ann", "old": true}', "Additional properties are not allowed"),
        ('["Ann"]', r"\['Ann'\] is not of type 'object'"),
        ("[" * 100_000, "holds no JSON value"),
    ],
)
def test_json_that_does_not_fit(text, reason):
    with pytest.raises(UnreadableAnswer, match=reason):
        JsonFormat(PERSON).parse(text)


def test_values_that_are_no_objects_must_stand_alone():
    form = JsonFormat({"type": "integer"})
    assert form.parse(" 7\n") == 7
    with pytest.raises(UnreadableAnswer):
        form.parse("It is 7")


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "objekt"}, "json_schema: type: 'objekt' is not valid"),
        ({"$ref": "https://example.com/schema.json"}, "the reference https://example.com/schema.json is to nothing"),
        ({"$schema": 5}, r"\$schema: must be a string"),
        ({"type": "string", "pattern": "("}, "json_schema: pattern: '\\(' is not a 'regex'"),
        ({"$ref": "#"}, "a reference leads back to itself"),
        ({"$ref": "#/$defs/nothing"}, "the reference /\\$defs/nothing is to nothing|the reference #/"),
    ],
)
def test_wrong_schemas_are_refused_and_nothing_is_fetched(schema, sentence):
    with pytest.raises(ConfigError, match=sentence):
        JsonFormat(schema)


def test_regular_expressions():
    assert RegexFormat(r"\d{4}").parse("born 1901, died 1999.") == "1999"
    assert RegexFormat(r"year: (\d+)").parse("year: 12\nyear: 7 or so") == "7"
    assert RegexFormat(r"(?:a(\d)|b(\d))$").parse("a1\nb2") == "2"
    with pytest.raises(UnreadableAnswer, match=r"has nothing that matches \\d\+"):
        RegexFormat(r"\d+").parse("none")
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
        RegexFormat("(")
