"""Rewards of completions."""

import pytest

from maxlm.errors import ConfigError, DataError
from maxlm.scoring.rewards import RULES, RewardPart, check_record, find_function, find_rewards

RIGHT = [
    # reward, completion, answer
    ("exact_match", " yes\n", "yes"),
    ("exact_match", "4", 4),
    ("exact_match", "18", 18.0),
    ("exact_match", "0.5", 0.5),
    ("exact_match", "cafe\u0301", "caf\u00e9"),
    ("exact_match", "18", "16 - 3 - 4 = 9 eggs\nand 9 * 2 = 18\n#### 18"),
    ("contains", "I say yes!", "yes"),
    ("contains", "a+b is right", "a+b"),
    ("contains", "首都是北京。", "北京"),
    ("contains", "我住在北京市", "北京"),
    ("contains", "共18元", "18"),
    ("contains", "使用GPT模型", "GPT"),
    ("contains", "答えは東京です", "東京"),
    ("contains", "りんごを食べた", "りんご"),
    ("contains", "アップルパイ", "パイ"),
    ("contains", "คำตอบคือกรุงเทพมหานคร", "กรุงเทพ"),
    ("contains", "정답은 서울입니다", "서울"),
    ("contains", "यह कमल है", "कमल"),
    ("contains", "It is 18.", "18"),
    ("contains", "so -3 it is", "-3"),
    ("contains", "yesterday, yes", "yes"),
    ("last_number", "2 and 2 make 4.", "4"),
    ("last_number", "1,200 in all", "1200.0"),
    ("last_number", "-3", "-3"),
    ("last_number", "it is .5", "0.5"),
    ("last_number", "0.50", ".5"),
    ("last_number", "2e5 people", "200000"),
    ("last_number", "2E+5", 200000),
    ("last_number", "1e-3", "0.001"),
    ("last_number", "2 × 10^5", "2e5"),
    ("last_number", "10⁵", "100000"),
    ("last_number", "50%", "50%"),
    ("last_number", "it is 50 %", "0.5"),
    ("last_number", "0.5", "50%"),
    ("last_number", "that is 50%", "50"),
    ("last_number", "50 percent", "50%"),
    ("last_number", "$18", "18"),
    ("last_number", "she makes $18.00 a day", "$18"),
    ("last_number", "-$18", "$-18"),
    ("last_number", "USD 1,000", "1000"),
    ("last_number", "1,000,000.5", "1000000.50"),
    ("last_number", "12,34,567", "1234567"),
    ("last_number", "1\u202f000", "1000"),
    ("last_number", "3/4", "0.75"),
    ("last_number", "6 / 8 of it", "3/4"),
    ("last_number", "1 1/2 cups", "1.5"),
    ("last_number", "-1 1/2", "-3/2"),
    ("last_number", "1½", "3/2"),
    ("last_number", "１８", "18"),
    ("last_number", "１，０００．５", "1000.5"),
    ("last_number", "５０％", "50%"),
    ("last_number", "٣", "3"),
    ("last_number", "x = \u22123", "-3"),
    ("last_number", "答案是-3", "-3"),
    ("last_number", "共18元", "18"),
    ("last_number", "共3万元", "30000"),
    ("last_number", "1.5 million", "1500000"),
    ("last_number", "Answer: 18 dollars", "18 dollars"),
    ("last_number", "**18**", "18"),
    ("last_number", "5-3 = 2", "2"),
    ("last_number", "it takes 5-3", "3"),
    ("last_number", "1, 2,3", "3"),
    ("last_number", "18 g of CO2", "18"),
    ("last_number", "18 m²", "18"),
    ("last_number", "on 1/2/2024", "2024"),
    ("last_number", "70000", "80,000*1.5=<<80000*1.5=120000>>120,000\n#### 70,000"),
    ("last_number_zh", "答案是十八", "18"),
    ("last_number_zh", "十八个", "十八"),
    ("last_number_zh", "一千零五", 1005),
    ("last_number_zh", "两万三千", "23000"),
    ("last_number_zh", "一百二", "120"),
    ("last_number_zh", "三点五", "3.5"),
    ("last_number_zh", "负三", "-3"),
    ("last_number_zh", "四分之三", "0.75"),
    ("last_number_zh", "百分之五十", "50%"),
    ("last_number_zh", "二〇二四", "2024"),
    ("last_number_zh", "壹佰贰拾", "120"),
    ("last_number_zh", "共18个", "十八"),
    ("tagged_answer", "so <answer> 4 </answer>", "4"),
]

WRONG = [
    ("exact_match", "yes.", "yes"),
    ("exact_match", "", "0"),
    ("contains", "yesterday", "yes"),
    ("contains", "concatenate", "cat"),
    ("contains", "snake_case", "case"),
    ("contains", "कमी", "कम"),
    ("contains", "218", "18"),
    ("contains", "1,218", "218"),
    ("contains", "18.5", "18"),
    ("contains", "it is -18", "18"),
    ("contains", "首都是上海。", "北京"),
    ("last_number", "it is 4, not 5", "4"),
    ("last_number", "none", "4"),
    ("last_number", "", "4"),
    ("last_number", "H2O", "2"),
    ("last_number", "v1.5", "5"),
    ("last_number", "1/3", "0.333"),
    ("last_number", "5000%", "50%"),
    ("last_number", "3/0", "3"),
    ("last_number", "9e999999999", "9"),
    ("last_number", "9" * 5000, "9"),
    ("last_number", "1,2,3", "123"),
    ("last_number", "十八", "18"),
    ("last_number_zh", "十九", "18"),
    ("tagged_answer", "4", "4"),
    ("tagged_answer", "<answer>4</answer> <answer>5</answer>", "4"),
]


@pytest.mark.parametrize(
    ("cases", "expected"), [(RIGHT, 1.0), (WRONG, 0.0), ([("tagged_answer", "so <answer>5</answer>", "4")], 0.1)]
)
def test_rewards(cases, expected):
    for name, completion, answer in cases:
        assert find_function(name)("?", [completion], {"answer": answer}) == [expected], (name, completion, answer)


@pytest.mark.parametrize(
    ("completion", "answer", "settings", "expected"),
    [
        ("3.14", "3.14159", {}, 0.0),
        ("3.14", "3.14159", {"absolute_tolerance": 0.01}, 1.0),
        ("3.13", "3.14159", {"absolute_tolerance": 0.01}, 0.0),
        ("1010", "1000", {"relative_tolerance": 0.01}, 1.0),
        ("1011", "1000", {"relative_tolerance": 0.01}, 0.0),
        ("1011", "1000", {"relative_tolerance": 0.01, "absolute_tolerance": 20.0}, 1.0),
        ("-1010", "-1000", {"relative_tolerance": 0.01}, 1.0),
        ("51%", "0.5", {"absolute_tolerance": 0.01}, 1.0),
        ("0.51", "50%", {"absolute_tolerance": 1.0}, 1.0),
        ("none", "0", {"absolute_tolerance": 9.0}, 0.0),
    ],
)
def test_numbers_with_a_tolerance(completion, answer, settings, expected):
    for name in ("last_number", "last_number_zh"):
        (reward,) = find_rewards([RewardPart(name=name, settings=settings)])
        assert reward("?", [completion], {"answer": answer}, [1]) == [expected]


@pytest.mark.parametrize(
    ("name", "answer", "sentence"),
    [
        ("exact_match", None, "must be a text or a number, not null"),
        ("exact_match", True, "must be a text or a number, not true"),
        ("contains", ["4"], r'must be a text or a number, not \["4"\]'),
        ("contains", " ", "is empty"),
        ("exact_match", float("nan"), "is nan, which no completion can equal"),
        ("last_number", "four", 'must contain one number, and "four" contains none'),
        ("last_number", "十八", 'must contain one number, and "十八" contains none'),
        ("last_number", "3 or 4", 'must contain one number, and "3 or 4" contains 2'),
        ("last_number", "1.000,50", ".*contains 2"),
        ("last_number", "1e99999", ".*is too large, or divides by zero"),
        ("last_number_zh", "三个苹果和四个梨", ".*contains 2"),
        ("tagged_answer", {}, "must be a text or a number, not {}"),
    ],
)
def test_answer_that_no_completion_can_match_is_rejected_with_its_line(name, answer, sentence):
    with pytest.raises(DataError, match=f"^prompts.jsonl:7: for the reward {name} answer {sentence}; fix or remove"):
        check_record(name, {"answer": answer}, "prompts.jsonl:7")
    with pytest.raises(ValueError, match=sentence):
        find_function(name)("?", ["4"], {"answer": answer})


def test_rules_name_the_field_that_a_record_lacks():
    for setting in ("exact_match", (RewardPart(name="my.module:reward"), RewardPart(name="exact_match"))):
        with pytest.raises(DataError, match=r"^p\.jsonl:7: lacks 'answer'; did you mean 'answer' instead of 'answr'"):
            check_record(setting, {"answr": "4"}, "p.jsonl:7")


def test_custom_reward_accepts_any_record():
    check_record("my.module:reward", {"answer": None}, "prompts.jsonl:7")
    check_record("my.module:reward", {}, "prompts.jsonl:7")


def test_unknown_reward_suggests_nearest_name():
    with pytest.raises(ConfigError, match=r"objective\.reward: 'exact_mach' .* did you mean exact_match\?"):
        find_function("exact_mach")
    with pytest.raises(ConfigError, match="allowed: exact_match"):
        find_function("zzz")


def test_custom_reward_is_imported_from_its_module():
    assert find_function("maxlm.scoring.rules.answers:contains") is RULES["contains"].function
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_function("maxlm.scoring.rewards:nothing")
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_function("no_such_module:reward")


def test_settings_are_checked_by_the_signature():
    def part(name, **settings):
        return [RewardPart(name=name, settings=settings)]

    (reward,) = find_rewards(part("last_number", absolute_tolerance=1))
    assert dict(reward.settings) == {"absolute_tolerance": 1.0}
    for settings, sentence in [
        ({"tolerance": 1}, "there is no setting 'tolerance'; the settings of last_number are absolute_tolerance, rel"),
        ({"absolute_tolerance": "1"}, "absolute_tolerance: input should be a valid number"),
        ({"absolute_tolerance": -1}, "absolute_tolerance: input should be greater than or equal to 0"),
    ]:
        with pytest.raises(ConfigError, match=rf"^objective\.reward: last_number: {sentence}"):
            find_rewards(part("last_number", **settings))
    with pytest.raises(ConfigError, match="exact_match: there is no setting 'low'; it has no settings"):
        find_rewards(part("exact_match", low=1))


def test_settings_of_own_functions(tmp_path, monkeypatch):
    (tmp_path / "own_settings.py").write_text(
        "def words(prompt, completions, record, *, wanted: list[str], num_tokens, scale=1):\n"
        "    return [scale * sum(word in text for word in wanted) - n for text, n in zip(completions, num_tokens)]\n"
        "def anything(prompt, completions, record, **settings):\n"
        "    return [len(settings)] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (reward,) = find_rewards([RewardPart(name="own_settings:words", settings={"wanted": ["a", "b"], "scale": 3})])
    assert reward("?", ["a b", "b", ""], {}, [1, 2, 3]) == [5, 1, -3]
    with pytest.raises(ConfigError, match=r"own_settings:words: the setting 'wanted' is missing; the settings of"):
        find_rewards("own_settings:words")
    with pytest.raises(ConfigError, match=r"there is no setting 'num_tokens'"):
        find_rewards([RewardPart(name="own_settings:words", settings={"wanted": ["a"], "num_tokens": [3]})])
    (reward,) = find_rewards([RewardPart(name="own_settings:anything", settings={"a": 1, "b": None})])
    assert reward("?", ["x"], {}, [1]) == [2]
