"""Everything that a run reads or calls is opened and tested before its first step, and errors are one sentence."""

import functools
import json
import os
import sys

import numpy as np
import pytest
from toy_task import chat, make_config, question, write_lines

from maxlm.checkpoint.folder import find_checkpoint
from maxlm.data.preference import Prompt
from maxlm.errors import ConfigError, DataError
from maxlm.scoring.reward_call import CheckedReward
from maxlm.scoring.rewards import find_reward
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

def reward(completion, record):
    global calls
    calls += 1
    if calls > LIMIT:
        return None
    record.clear()
    return len(completion) % 3
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


def give(value, completion, record):
    if isinstance(value, BaseException):
        raise value
    return value


async def later(completion, record):
    return 1.0


def of_one_argument(completion):
    return 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (functools.partial(give, None), "returned None"),
        (functools.partial(give, float("nan")), "returned nan"),
        (functools.partial(give, float("-inf")), "returned -inf"),
        (functools.partial(give, 1e300), r"returned 1e\+300"),
        (functools.partial(give, "1.0"), r"returned the text '1\.0'"),
        (functools.partial(give, []), "returned 0 values in a list"),
        (functools.partial(give, [1.0]), "returned 1 values in a list"),
        (functools.partial(give, np.ones(3)), "returned 3 values in a ndarray"),
        (functools.partial(give, [[1], [1, 2]]), "returned an object of type list"),
        (functools.partial(give, {"reward": 1}), "returned an object of type dict"),
        (functools.partial(give, 1j), "returned an object of type complex"),
        (functools.partial(give, ValueError("no\nanswer")), "raised ValueError: no answer"),
        (functools.partial(give, SystemExit(3)), "raised SystemExit: 3"),
        (later, "returned a coroutine"),
        (of_one_argument, "raised TypeError: .*takes 1 positional argument"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the id of a partial would contain an address
)
def test_reward_that_is_not_a_number_is_an_error_with_value_and_place(function, message):
    reward = CheckedReward("mine:reward", function)
    wanted = rf"^objective\.reward: mine:reward for p\.jsonl:1 and the completion '4' {message}"
    with pytest.raises(ConfigError, match=wanted) as caught:
        reward.try_out([Prompt([1], {"answer": 4}, "p.jsonl:1")])
    assert "a reward function returns a finite number for (completion, record)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(2), np.array(3)], ids=repr)
def test_any_scalar_is_a_reward(value):
    reward = CheckedReward("mine", functools.partial(give, value))
    [got] = reward([Prompt([1], {"answer": 4})], [""])
    assert got == float(value)


def test_reward_that_raises_is_reported_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "raises_a.py").write_text(
        "import json\n\ndef reward(completion, record):\n    return json.loads('{')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"raised JSONDecodeError: .* \(.*raises_a\.py:4\)"):
        CheckedReward("raises_a:reward", find_reward("raises_a:reward")).try_out([Prompt([1], {"answer": ""})])


@pytest.mark.parametrize("text", ["1 / 0", "def f(:", "import nothing_of_this_name", "raise SystemExit(3)"])
def test_reward_module_that_fails_to_import_is_one_sentence(text, tmp_path, monkeypatch):
    (tmp_path / "fails_to_load.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fails_to_load", raising=False)
    with pytest.raises(ConfigError, match=r"'fails_to_load:reward' cannot be imported: "):
        find_reward("fails_to_load:reward")


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
        ConfigError, match=r"own_reward_of_test:reward for .*jsonl:2 and the completion '' returned None"
    ):
        train(reward_config(tmp_path, untrained, limit=3))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_reward_that_fails_during_a_run_loses_no_step(untrained, tmp_path, monkeypatch):
    """It is called 4 times before the first step, and 4 times per step, with copies of the record, which it clears."""
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"for .*prompts\.jsonl:\d and the completion '.*' returned None"):
        train(reward_config(tmp_path, untrained, limit=8))
    assert find_checkpoint(tmp_path / "run").name == "1"
    assert train(reward_config(tmp_path, untrained, limit=100))["metrics"]["steps"] == 2
