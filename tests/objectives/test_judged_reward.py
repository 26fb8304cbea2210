"""A judge as a reward: answers that it does not judge are left out, and a resumed run asks nothing twice."""

import json
import re
import threading

import numpy as np
import pytest
from etils import epath
from judge_server import completion, failure, judge_server
from toy_task import make_config, question

from maxlm.config.feedback import JudgedReward
from maxlm.core.tree import flatten
from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError, FaultError, RequestError
from maxlm.interop.load import load_model
from maxlm.objectives.online_preference import best_and_worst
from maxlm.ops.advantages import (
    group_advantages,
    has_signal,
    leave_one_out_advantages,
    length_weighted_advantages,
)
from maxlm.scoring.judged_reward import JudgeOfAnswers
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train

CONSTITUTION = """
kind: constitution
principles: [{id: agree, prefer: "Which agrees?", rate: It agrees.}]
prompts: {compare: "<{{ answer_a }}> <{{ answer_b }}>", rate: "<{{ answer }}>"}
"""


@pytest.fixture
def server():
    with judge_server() as found:
        yield found


@pytest.fixture(scope="module")
def constitution(tmp_path_factory):
    path = tmp_path_factory.mktemp("constitution") / "constitution.yaml"
    path.write_text(CONSTITUTION)
    return str(path)


def part(server, constitution, *, judge=None, **settings):
    endpoint = {"kind": "endpoint", "base_url": server.base_url, "model": "critic", "retry_seconds": 0.01}
    return {"judge": endpoint | (judge or {}), "constitution": constitution, **settings}


def judge_of(server, constitution, *, folder=None, time_limit=60.0, **settings):
    config = JudgedReward(**part(server, constitution, **settings))
    return JudgeOfAnswers(config, name="critic", folder=folder, seed=0, share=1.0, time_limit=time_limit)


def shown(body):
    return re.findall(r"<(.*?)>", body["messages"][0]["content"])


def by_length(body, number):
    """Rates an answer by its length; prefers the longer one; says nothing about `?`."""
    texts = shown(body)
    if "?" in texts:
        return completion("I cannot say.")
    if len(texts) == 1:
        return completion(f"Rating: {len(texts[0])}")
    first, second = map(len, texts)
    return completion(f"Verdict: {'tie' if first == second else 'A' if first > second else 'B'}")


def prompt(answer="aaa", place="p.jsonl:1"):
    return Prompt([1], {"answer": answer}, place, question("coin"))


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("rating", [0, 3 / 9, 3 / 9, np.nan]),
        ("wins_in_group", [0, 0.75, 0.75, np.nan]),
        ("wins_over_reference", [0, 1, 1, np.nan]),
    ],
)
def test_rewards_of_answers(measure, expected, server, constitution):
    server.reply = by_length
    asked = prompt()
    rewards = judge_of(server, constitution, measure=measure)([asked] * 4, ["a", "aaaa", "aaaa", "?"])
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_answers_of_several_prompts_are_judged_together(server, constitution):
    all_there = threading.Barrier(4, timeout=10)

    def waits(body, number):
        all_there.wait()
        return by_length(body, number)

    server.reply = waits
    judge = judge_of(server, constitution, judge={"concurrent": 4})
    np.testing.assert_allclose(
        judge([prompt()] * 2 + [prompt()] * 2, ["a", "aa", "aaa", "aaaa"]) * 9, range(4), rtol=1e-6
    )


def test_answers_to_other_prompts_are_no_opponents(server, constitution):
    server.reply = by_length
    rewards = judge_of(server, constitution, measure="wins_in_group")(
        [prompt(), prompt(place="p.jsonl:2")], ["a", "aaaa"]
    )
    assert np.isnan(rewards).all()
    assert not server.bodies


def test_same_questions_are_asked_once_also_by_the_next_run(server, constitution, tmp_path):
    """Those without a usable reply too, so that a resumed run leaves out the same answers."""

    def refuses(body, number):
        return failure(400, "too long") if shown(body) == ["b"] else by_length(body, number)

    server.reply = refuses
    folder, asked, texts = judge_folder(tmp_path), prompt(), ["aa", "aa", "b", "?"]
    first = judge_of(server, constitution, folder=folder)([asked] * 4, texts)
    assert len(server.bodies) == 3
    server.reply = lambda body, number: completion("Rating: 10")
    again = judge_of(server, constitution, folder=folder)([asked] * 4, texts)
    np.testing.assert_array_equal(again, first)
    assert len(server.bodies) == 3
    lines = [json.loads(line) for line in (folder / "aside.jsonl").read_text().splitlines()]
    assert {line["place"] for line in lines} == {"p.jsonl:1"}
    reasons = {line["answers"][0]: line["reason"] for line in lines}
    assert "refuses the request (400): too long" in reasons["b"]
    assert "has no line Rating: X" in reasons["?"]


def judge_folder(tmp_path):
    return epath.Path(tmp_path / "judge")


def test_too_many_failures_end_the_run_and_are_not_kept(server, constitution, tmp_path):
    folder = judge_folder(tmp_path)
    server.reply = lambda body, number: (200, {"content-type": "text/html"}, b"<html>sorry</html>")
    settings = {"judge": {"retries": 1}, "limits": {"max_failed_fraction": 0.02}}
    judge = judge_of(server, constitution, folder=folder, **settings)
    wanted = r"^critic: 3 of the last 3 questions .* limits\.max_failed_fraction=0\.02 of 100; .* p\.jsonl:1: .*sorry"
    with pytest.raises(FaultError, match=wanted):
        judge([prompt()] * 8, [f"answer {number}" for number in range(8)])
    assert not (folder / "aside.jsonl").exists()
    server.reply = by_length
    rewards = judge_of(server, constitution, folder=folder)([prompt()], ["answer 0"])
    assert rewards == pytest.approx([7 / 9])


def test_hanging_judge_is_ended_by_the_time_limit(server, constitution):
    released = threading.Event()

    def hangs(body, number):
        released.wait(20)
        return completion("Rating: 1")

    server.reply = hangs
    try:
        with pytest.raises(
            ConfigError, match=r"critic: the judge has answered 0 of 2 questions about 1 prompts after 0\.2"
        ):
            judge_of(server, constitution, time_limit=0.2)([prompt()] * 2, ["a", "b"])
    finally:
        released.set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"votes": 2}, "2 votes under 1 principles repeat one"),
        ({"limits": {"max_requests": 1}}, "limits.max_requests=1"),
    ],
)
def test_settings_that_do_not_fit(settings, message, server, constitution):
    server.reply = by_length
    asked = prompt()
    with pytest.raises((ConfigError, RequestError), match=re.escape(message)):
        judge_of(server, constitution, **settings)([asked] * 2, ["a", "b"])


def test_answers_without_a_reward_do_not_count():
    """The advantages of the others are those of a group without it."""
    rewards, lengths = np.array([[0.0, 1.0, np.nan, 3.0]]), np.array([[2, 5, 9, 4]])
    kept = [0, 1, 3]
    for given, smaller in (
        (group_advantages(rewards, normalize_std=True), group_advantages(rewards[:, kept], normalize_std=True)),
        (leave_one_out_advantages(rewards), leave_one_out_advantages(rewards[:, kept])),
        (length_weighted_advantages(rewards, lengths), length_weighted_advantages(rewards[:, kept], lengths[:, kept])),
    ):
        np.testing.assert_array_equal(given[:, kept], smaller)
    assert has_signal(np.array([[np.nan, 1.0], [np.nan, np.nan], [1, 2]])).tolist() == [False, False, True]
    best, worst, gaps = best_and_worst(np.array([[np.nan, 2, 1], [np.nan] * 3]))
    assert (best[0], worst[0], gaps.tolist()) == (1, 2, [1, 0])


def policy_config(output, tuned, server, constitution, prompts, *, steps, kind="policy"):
    return make_config(
        output,
        init_from=str(tuned[0]),
        objective={
            "kind": kind,
            "train_file": prompts,
            "valid_file": prompts,
            "max_new_tokens": 6,
            "group_size": 4,
            "reward": [part(server, constitution, limits={"max_failed_fraction": 0.9})],
            **({"top_entropy_fraction": 0.25} if kind == "policy" else {}),
        },
        batch_size=4,
        log_every=1,
        steps=steps,
        checkpoint={"every": 1, "keep": 9},
    )


def says_yes(body, number):
    """Rates `yes` with 10 and everything else with 1, and says nothing about every third answer that it sees."""
    text = shown(body)[0]
    return completion("no idea" if text == "no" else f"Rating: {10 if text == 'yes' else 1}")


def test_run_leaves_out_what_is_not_judged_and_resumes_exactly(tuned, prompts, server, constitution, tmp_path):
    server.reply = says_yes
    train(policy_config(tmp_path / "whole", tuned, server, constitution, prompts, steps=2))
    train(policy_config(tmp_path / "parts", tuned, server, constitution, prompts, steps=1))
    # What was said stays said.
    server.reply = lambda body, number: says_yes(body, number) if shown(body)[0] not in ("yes", "no") else failure(500)
    train(policy_config(tmp_path / "parts", tuned, server, constitution, prompts, steps=2))
    whole, parts = (flatten(load_model(tmp_path / name)[0]) for name in ("whole", "parts"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], parts[path], err_msg=path)
    records = [record for record in read_metrics(tmp_path / "whole") if "reward" in record]
    assert 0.2 < records[0]["unjudged"] < 0.8
    assert records[0]["reward"] > 0.9, "a mean over the answers that were judged"
    assert 0.2 < records[0]["high_entropy"] < 0.5, "tokens with the entropy of the last one are kept too"
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert all((sample["reward"] is None) == (sample["answer"] == "no") for sample in samples)
    assert any(sample["reward"] is None and sample["advantage"] == 0 for sample in samples)


def test_online_preference_pairs_what_was_judged(tuned, prompts, server, constitution, tmp_path):
    server.reply = says_yes
    train(policy_config(tmp_path / "run", tuned, server, constitution, prompts, steps=1, kind="online_preference"))
    (record,) = [record for record in read_metrics(tmp_path / "run") if "reward" in record]
    assert 0.2 < record["unjudged"] < 0.8
    assert record["reward"] > 0.9


def test_wrong_address_ends_the_run_before_its_first_step(tuned, prompts, server, constitution, tmp_path):
    server.reply = lambda body, number: failure(404, "no such model")
    config = policy_config(tmp_path / "run", tuned, server, constitution, prompts, steps=1)
    with pytest.raises(RequestError, match="404: no such model; check base_url"):
        train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
