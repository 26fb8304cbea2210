"""Everything that a run reads or calls is opened and tested before its first step, and errors are one sentence."""

import functools
import itertools
import json
import os
import sys
import threading

import numpy as np
import pytest
from toy_task import chat, make_config, question, write_lines

from maxlm.checkpoint.folder import find_checkpoint
from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError, DataError
from maxlm.scoring.reward_call import CheckedReward
from maxlm.scoring.rewards import Reward, RewardPart, find_rewards
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train

PAIR = {"prompt": question("sky"), "chosen": "blue", "rejected": "red"}
RECORDS = {
    "sft": chat("sky", "blue"),
    "preference": PAIR,
    "reward": PAIR,
    "policy": {"prompt": question("sky"), "answer": "blue"},
}
OWN_REWARD = """
calls = 0

def reward(prompt, completions, record):
    global calls
    calls += len(completions)
    if calls > LIMIT:
        return [None] * len(completions)
    record.clear()
    prompt.clear()
    return [len(completion) % 3 for completion in completions]
"""


@pytest.fixture
def no_steps(monkeypatch):
    """Fails if training starts."""
    monkeypatch.setattr("maxlm.train.run.fit", lambda *args, **kwargs: pytest.fail("training started"))


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (None, r"valid\.jsonl: there is no such file"),
        ("", r"valid\.jsonl: has no "),
        ("GOOD\n{bad", r"valid\.jsonl:2: is not JSON"),
        ('GOOD\n{"text": 1}', r"valid\.jsonl:2: "),
    ],
    ids=["missing", "empty", "no JSON", "another record"],
)
def test_held_out_data_is_parsed_before_first_step(kind, valid, message, untrained, tmp_path, no_steps):
    record = RECORDS[kind]
    train_file = write_lines(tmp_path / "train.jsonl", [record])
    if valid is not None:
        (tmp_path / "valid.jsonl").write_text(valid.replace("GOOD", json.dumps(record)), encoding="utf-8")
    objective = {"kind": kind, "train_file": train_file, "valid_file": str(tmp_path / "valid.jsonl")}
    objective |= {"max_new_tokens": 2} if kind == "policy" else {}
    config = make_config(tmp_path / "run", init_from=str(untrained), objective=objective)
    with pytest.raises(DataError, match=message):
        train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def give(value, prompt, completions, record):
    if isinstance(value, BaseException):
        raise value
    return value


async def later(prompt, completions, record):
    return [1.0]


def for_one_completion(completion, record):
    return 1.0


def checked(*functions, weights=(1.0, 1.0), time_limit=60.0, takes=frozenset()):
    rewards = [
        Reward(f"part{index}", f"mine:part{index}", weight, function, {}, takes)
        for index, (function, weight) in enumerate(zip(functions, weights))
    ]
    return CheckedReward(rewards, time_limit=time_limit)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (functools.partial(give, None), "returned None"),
        (functools.partial(give, 1.0), "returned one float instead of a list"),
        (functools.partial(give, np.array(1.0)), "returned one number instead of a list"),
        (functools.partial(give, "1.0"), r"returned the text '1\.0'"),
        (functools.partial(give, {"a": 1, "b": 2}), "returned one dict instead of a list"),
        (functools.partial(give, []), "returned 0 values for 2 completions"),
        (functools.partial(give, [1.0]), "returned 1 value for 2 completions"),
        (functools.partial(give, itertools.count()), "returned more than 2 values for 2 completions"),
        (functools.partial(give, [1, None]), "returned None for the completion ''"),
        (functools.partial(give, [1, float("nan")]), "returned nan for the completion ''"),
        (functools.partial(give, [float("-inf"), 1]), "returned -inf for the completion '4'"),
        (functools.partial(give, [1e300, 1]), r"returned 1e\+300 for the completion '4'"),
        (functools.partial(give, ["1.0", 1]), r"returned the text '1\.0' for the completion '4'"),
        (functools.partial(give, np.ones((2, 3))), "returned 3 values in a ndarray for the completion '4'"),
        (functools.partial(give, [[[1], [1, 2]], 1]), "returned an object of type list for"),
        (functools.partial(give, [{"reward": 1}] * 2), "returned an object of type dict for"),
        (functools.partial(give, [1j, 1]), "returned an object of type complex for"),
        (functools.partial(give, ValueError("no\nanswer")), "raised ValueError: no answer"),
        (functools.partial(give, SystemExit(3)), "raised SystemExit: 3"),
        (functools.partial(give, TimeoutError("a request")), "raised TimeoutError: a request"),
        (later, "returned a coroutine"),
        (for_one_completion, "raised TypeError: .*takes 2 positional arguments"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the id of a partial would contain an address
)
def test_reward_that_is_not_a_list_of_numbers_is_an_error_with_value_and_place(function, message):
    wanted = rf"^objective\.reward: mine:part0 for p\.jsonl:1 {message}"
    with pytest.raises(ConfigError, match=wanted) as caught:
        checked(function).try_out([Prompt([1], {"answer": 4}, "p.jsonl:1")])
    assert "returns one finite number per completion for (prompt, completions, record)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reward_that_hangs_is_ended_by_its_time_limit():
    released = threading.Event()

    def hangs(prompt, completions, record):
        released.wait(60)
        return [0.0] * len(completions)

    try:
        with pytest.raises(ConfigError, match=r"part0 for p\.jsonl:1 has not returned after 0\.05 seconds for 2 compl"):
            checked(hangs, time_limit=0.05).try_out([Prompt([1], {}, "p.jsonl:1")])
    finally:
        released.set()


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(2), np.array(3)], ids=repr)
def test_any_scalar_is_a_reward(value):
    for values in ([value], (value,), np.array([value]), iter([value])):
        rewards = checked(functools.partial(give, values))([Prompt([1], {})], [""], [1])
        assert rewards.total.tolist() == [float(value)]


def test_rewards_are_weighted_and_reported_by_part():
    calls = []

    def length(prompt, completions, record):
        calls.append((prompt, completions, record))
        return [len(text) for text in completions]

    def bonus(prompt, completions, record):
        return [record["bonus"]] * len(completions)

    prompts = [Prompt([1], {"bonus": 1}, text="a"), Prompt([1], {"bonus": 2}, text="b")]
    reward = checked(length, bonus, weights=(0.5, -1.0))
    rewards = reward([prompts[0], prompts[0], prompts[1]], ["", "four", "six"], [1, 1, 1])
    assert rewards.parts["part0"].tolist() == [0, 4, 3]
    assert rewards.parts["part1"].tolist() == [1, 1, 2]
    assert rewards.total.tolist() == [-1, 1, -0.5]
    assert rewards.total.dtype == np.float32
    assert calls == [("a", ["", "four"], {"bonus": 1}), ("b", ["six"], {"bonus": 2})], "one call per prompt"


def test_functions_report_further_numbers():
    def noted(prompt, completions, record, *, metrics):
        if "metrics" in record:
            metrics.update(record["metrics"])
        return [1.0] * len(completions)

    reward = checked(noted, takes=frozenset({"metrics"}))
    good = Prompt([1], {"metrics": {"length": [3, 4.5]}}, "p.jsonl:1")
    rewards = reward([good] * 2, ["a", "b"], [1, 1])
    assert {name: part.tolist() for name, part in rewards.parts.items()} == {"part0": [1, 1], "part0_length": [3, 4.5]}
    assert rewards.total.tolist() == [1, 1]
    for metrics, sentence in [
        (None, "reports other metrics than before"),
        ({"length": [3]}, "returned 1 value for 2 completions"),
        ({"length": [3, None]}, "returned None for the completion 'b'"),
    ]:
        bad = Prompt([1], {} if metrics is None else {"metrics": metrics}, "p.jsonl:2")
        with pytest.raises(ConfigError, match=rf"part0 for p\.jsonl:2 {sentence}"):
            reward([bad] * 2, ["a", "b"], [1, 1])


def test_parts_of_the_same_name_are_numbered():
    found = find_rewards([RewardPart(name="exact_match"), RewardPart(name="contains"), RewardPart(name="exact_match")])
    assert [reward.name for reward in found] == ["exact_match", "contains", "exact_match_2"]


def test_reward_that_raises_is_reported_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "raises_a.py").write_text(
        "import json\n\ndef reward(prompt, completions, record):\n    return json.loads('{')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"raised JSONDecodeError: .* \(.*raises_a\.py:4\)"):
        CheckedReward(find_rewards("raises_a:reward"), time_limit=60).try_out([Prompt([1], {"answer": ""})])


@pytest.mark.parametrize("text", ["1 / 0", "def f(:", "import nothing_of_this_name", "raise SystemExit(3)"])
def test_reward_module_that_fails_to_import_is_one_sentence(text, tmp_path, monkeypatch):
    (tmp_path / "fails_to_load.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fails_to_load", raising=False)
    with pytest.raises(ConfigError, match=r"'fails_to_load:reward' cannot be imported: "):
        find_rewards("fails_to_load:reward")


def reward_config(tmp_path, untrained, limit: int, **settings):
    """A run with a reward function in a user module that returns None after `limit` calls."""
    module = tmp_path / "own_reward_of_test.py"
    module.write_text(OWN_REWARD.replace("LIMIT", str(limit)))
    # Python identifies a module's version by size and time.
    os.utime(module, (limit, limit))
    sys.modules.pop(module.stem, None)
    objective = {
        "kind": "policy",
        "train_file": write_lines(tmp_path / "prompts.jsonl", [RECORDS["policy"]] * 2),
        "reward": "own_reward_of_test:reward",
        "group_size": 2,
        "max_new_tokens": 2,
    }
    return make_config(
        tmp_path / "run",
        init_from=str(untrained),
        steps=2,
        **{"objective": objective, "batch_size": 2, "row_length": 16, "eval_batches": 1, **settings},
    )


def test_reward_is_tested_before_first_step(untrained, tmp_path, monkeypatch, no_steps):
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"own_reward_of_test:reward for .*jsonl:2 returned None for the completion 'blue'"
    ):
        train(reward_config(tmp_path, untrained, limit=3))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_reward_that_fails_during_a_run_loses_no_step(untrained, tmp_path, monkeypatch):
    """It is called 4 times before the first step, and 4 times per step, with copies of the record, which it clears."""
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"for .*prompts\.jsonl:\d returned None for the completion '.*'"):
        train(reward_config(tmp_path, untrained, limit=8))
    assert find_checkpoint(tmp_path / "run").name == "1"
    assert train(reward_config(tmp_path, untrained, limit=100))["metrics"]["steps"] == 2


def test_parts_of_a_reward_are_metrics(untrained, tmp_path):
    """Also where groups with equal rewards are replaced, which takes groups of several rounds of sampling."""
    reward = [
        {"name": "length", "weight": -0.5, "settings": {"high": 2, "margin": 1}},
        {"name": "overlong", "weight": 2.0, "settings": {"max_tokens": 4, "buffer": 2}},
    ]
    config = make_config(
        tmp_path / "run",
        init_from=str(untrained),
        objective={
            "kind": "policy",
            "train_file": write_lines(tmp_path / "prompts.jsonl", [{"prompt": question("sky")}] * 2),
            "reward": reward,
            "group_size": 2,
            "max_new_tokens": 4,
            "dynamic_sampling": {"max_rounds": 2},
        },
        steps=2,
        batch_size=2,
        row_length=16,
        log_every=1,
    )
    train(config)
    records = [record for record in read_metrics(tmp_path / "run") if "reward" in record]
    assert len(records) == 2
    for record in records:
        expected = -0.5 * record["reward_length"] + 2.0 * record["reward_overlong"]
        assert record["reward"] == pytest.approx(expected, abs=1e-6)
        assert -1 <= record["reward_overlong"] < 0
