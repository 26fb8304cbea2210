"""Rules about the form, length, language and repetition of completions."""

import numpy as np
import pytest

from maxlm.errors import ConfigError
from maxlm.scoring.rewards import RewardPart, find_rewards


def reward(name, completions, num_tokens=None, **settings):
    (found,) = find_rewards([RewardPart(name=name, settings=settings)])
    return list(found("?", completions, {}, num_tokens or [1] * len(completions)))


def test_regex():
    texts = ["answer: 18", "answer: x", "the answer: 18."]
    assert reward("regex_match", texts, pattern=r"answer: \d+") == [1, 0, 1]
    assert reward("regex_match", texts, pattern=r"answer: \d+", whole=True) == [1, 0, 0]


def test_regex_of_exponential_time_is_ended():
    assert reward("regex_match", ["ab" * 40 + "c", "ab"], pattern=r"(?:(?:a|b|ab)*)*d|ab$") == [0, 1]


@pytest.mark.parametrize(
    ("text", "expected", "anywhere"),
    [
        ("<think>2+2</think><answer>4</answer>", 1, 1),
        ("\n<think>2+2</think>\n <answer>4</answer>\n", 1, 1),
        ("So <think>2+2</think> <answer>4</answer>", 0, 1),
        ("<think>2+2</think><answer>4</answer>!", 0, 1),
        ("<think>2+2</think><answer> </answer>", 0, 0),
        ("<answer>4</answer><think>2+2</think>", 0, 0),
        ("<think>2+2<answer>4</answer></think>", 0, 0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0, 0),
        ("<think>2+2<answer>4</answer>", 0, 0),
        ("</think><think><answer>4</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_tags(text, expected, anywhere):
    assert reward("tag_format", [text], tags=["think", "answer"]) == [expected]
    assert reward("tag_format", [text], tags=["think", "answer"], only=False) == [anywhere]


def test_json():
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    texts = ['{"age": 3}', 'Here:\n```json\n{"age": 3}\n```', '{"age": "3"}', "{}", "{", "", '{"age": NaN}', "[" * 9999]
    assert reward("json_format", texts, schema=schema) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert reward("json_format", texts)[:4] == [1, 1, 1, 1]


def test_length():
    tokens = [0, 5, 10, 20, 25, 30, 99]
    expected = [0, 0.5, 1, 1, 0.5, 0, 0]
    assert reward("length", [""] * 7, tokens, low=10, high=20, margin=10) == expected
    assert reward("length", ["abc", "abcde"], low=1, high=3, margin=4, unit="characters") == [1, 0.5]
    assert reward("length", ["a b c d", "我是学生", ""], low=1, high=2, margin=4, unit="words") == [0.5, 0.5, 0.75]


def test_overlong_punishment_is_equation_13_of_dapo():
    max_tokens, buffer = 20, 8
    lengths = np.arange(0, 30)
    expected = np.where(
        lengths <= max_tokens - buffer,
        0.0,
        np.where(lengths <= max_tokens, ((max_tokens - buffer) - lengths) / buffer, -1.0),
    )
    got = reward("overlong", [""] * 30, list(lengths), max_tokens=max_tokens, buffer=buffer)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "The sky is blue.", 1),
        ("en", "天空是蓝色的", 0),
        ("zh", "天空是 blue。", 3 / 7),
        ("zh", "答案是 $x = \\frac{a}{b}$，见 `code` 和 <answer>四</answer>", 1),
        ("zh", "```python\nprint(1)\n```", 0),
        ("ja", "空は青いです", 1),
        ("ru", "Небо голубое", 1),
        ("Cyrillic", "Небо голубое", 1),
        ("ko", "하늘은 파랗다", 1),
        ("el", "", 0),
        ("el", "18", 0),
    ],
)
def test_language_by_script(language, text, expected):
    assert reward("language", [text], language=language) == pytest.approx([expected])


def test_repetition():
    texts = ["a b c d e f g", "a b a b a b", "a b c", "", "好" * 10]
    # Bigrams: all 6 differ; 2 of 5; of characters 1 of 9.
    assert reward("repetition", texts, size=2) == pytest.approx([0, 2 / 5 - 1, 0, 0, 1 / 9 - 1])
    assert reward("repetition", texts, size=4) == pytest.approx([0, 2 / 3 - 1, 0, 0, 1 / 7 - 1])


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("regex_match", {"pattern": "("}, "pattern: '\\(' is not a regular expression: missing"),
        ("regex_match", {}, "the setting 'pattern' is missing"),
        ("tag_format", {"tags": ["<think>"]}, "tags: '<think>' is not the name of a tag; give think"),
        ("tag_format", {"tags": ["a", "a"]}, "tags: a tag is named twice"),
        ("tag_format", {"tags": []}, "tags: list should have at least 1 item"),
        ("json_format", {"schema": {"type": "objekt"}}, "schema: is not a JSON schema: 'objekt' is not"),
        ("length", {"high": 3}, "the setting 'margin' is missing"),
        ("length", {"high": 3, "margin": 0}, "margin: input should be greater than or equal to 1"),
        ("overlong", {"max_tokens": 3, "buffer": 2.5}, "buffer: input should be a valid integer"),
        ("language", {"language": "Klingon"}, "language: 'Klingon' is neither a script of Unicode"),
    ],
)
def test_wrong_settings_are_one_sentence(name, settings, sentence):
    with pytest.raises(ConfigError, match=f"^objective.reward: {name}: {sentence}"):
        find_rewards([RewardPart(name=name, settings=settings)])
