"""What a completion must look like to be rewarded."""

import pytest

from maxlm.errors import ConfigError
from maxlm.post.rewards import REWARDS, find_reward


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact_match", " yes\n", "yes", 1.0),
        ("exact_match", "yes.", "yes", 0.0),
        ("exact_match", "4", 4, 1.0),
        ("contains", "I say yes!", "yes", 1.0),
        ("contains", "yesterday", "yes", 0.0),
        ("contains", "a+b is right", "a+b", 1.0),
        ("last_number", "2 and 2 make 4.", "4", 1.0),
        ("last_number", "it is 4, not 5", "4", 0.0),
        ("last_number", "1,200 in all", "1200.0", 1.0),
        ("last_number", "none", "4", 0.0),
        ("last_number", "-3", "-3", 1.0),
        ("tagged_answer", "so <answer> 4 </answer>", "4", 1.0),
        ("tagged_answer", "so <answer>5</answer>", "4", 0.1),
        ("tagged_answer", "4", "4", 0.0),
        ("tagged_answer", "<answer>4</answer> <answer>5</answer>", "4", 0.0),
    ],
)
def test_rewards(name, completion, answer, expected):
    assert find_reward(name)(completion, {"answer": answer}) == expected


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"objective\.reward: 'exact_mach' .* did you mean exact_match\?"):
        find_reward("exact_mach")
    with pytest.raises(ConfigError, match="allowed: exact_match"):
        find_reward("zzz")


def test_a_function_of_ones_own_is_named_by_its_module():
    assert find_reward("maxlm.post.rewards:contains") is REWARDS["contains"]
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_reward("maxlm.post.rewards:nothing")
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_reward("no_such_module:reward")
