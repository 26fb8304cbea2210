"""The recipes' configurations load, and their makers of data give the same records each time."""

import json
import random
from pathlib import Path

import feedback_loop
import make_chat
import make_sums
import pytest
import rlaif
import safe_rlhf
import yaml

from maxlm.config.load import load_config
from maxlm.scoring.judge import Judge

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configurations_are_valid_and_short(path):
    load_config(path, kind=yaml.safe_load(path.read_text())["kind"])
    assert len(path.read_text().splitlines()) < 60


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sums_are_right_and_held_out_ones_are_in_no_other_file(tmp_path):
    make_sums.main(tmp_path / "a")
    make_sums.main(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    prompts, valid = (read(tmp_path / "a" / f"{name}.jsonl") for name in ("prompts", "valid"))
    for record in [*prompts, *valid]:
        first, second = record["prompt"].rstrip("=").split("+")
        assert int(first) + int(second) == int(record["answer"])
    assert not {record["prompt"] for record in prompts} & {record["prompt"] for record in valid}


def test_verdicts_are_in_the_form_that_the_judge_is_asked_in(tmp_path):
    make_sums.main(tmp_path)
    rlaif.write_verdicts(tmp_path / "prompts.jsonl", tmp_path / "verdicts.jsonl", 50)
    constitution = load_config(ROOT / "configs/recipes/rlaif/constitution.yaml", kind="constitution")

    class Repeats:
        def reply(self, request):
            raise RuntimeError(request.prompt)

    with pytest.raises(RuntimeError, match=r"3\+4=7 3\+4=8"):
        Judge(Repeats(), constitution.prompts).compare("3+4=", "7", "8", principles=constitution.principles)
    verdicts = {}
    for chat in read(tmp_path / "verdicts.jsonl"):
        question, verdict = (message["content"] for message in chat["messages"])
        right = [eval(text.split("=")[0]) == int(text.split("=")[1]) for text in question.split()]
        assert sorted(right) == [False, True]
        verdicts[verdict] = right
    assert verdicts == {"Verdict: A": [True, False], "Verdict: B": [False, True]}


def test_voter_prefers_the_right_answer_but_for_a_tenth():
    numbers = random.Random(0)
    votes = [feedback_loop.vote([" 7", "8"], "7", numbers) for _ in range(2000)]
    assert votes.count("first") / 2000 == pytest.approx(0.9 + 0.1 / 3, abs=0.02)
    assert {feedback_loop.vote(["7", "7 "], "7", random.Random(1)), "tie"} == {"tie"}


def test_answers_of_chats_are_cut_and_pairs_that_become_equal_left_out():
    turn = {"from": "human", "value": "Why?"}
    long = {"value": "x" * 600}
    assert make_chat.pair({"conversations": [turn], "chosen": long, "rejected": {"value": "x" * 501}}, "en") is None
    found = make_chat.pair({"conversations": [turn], "chosen": long, "rejected": {"value": "no"}}, "en")
    assert found == {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "x" * 500, "rejected": "no"}
    assert make_chat.chat({"instruction": "y" * 401, "input": "", "output": "z"}, "en") is None


def test_safety_pairs_are_the_same_each_time_and_of_separate_sums(tmp_path):
    make_sums.main(tmp_path / "data")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        safe_rlhf.write_data(tmp_path / "data", tmp_path / name)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    held_out = {record["prompt"] for record in read(tmp_path / "data" / "valid.jsonl")}
    for name in ("answers", "pairs", "task.prompts"):
        assert not {record["prompt"] for record in read(tmp_path / "a" / f"{name}.jsonl")} & held_out
    for name in ("pairs.valid", "task.valid"):
        assert {record["prompt"] for record in read(tmp_path / "a" / f"{name}.jsonl")} == held_out


def test_labels_of_safety_pairs_follow_the_rules_and_conflict(tmp_path):
    make_sums.main(tmp_path)
    records = read(tmp_path / "prompts.jsonl")
    answers = {record["prompt"]: record["answer"] for record in records}
    conflicts = 0
    for pair in safe_rlhf.make_pairs(records, 500, random.Random(0)):
        texts, right = [pair["response_0"], pair["response_1"]], answers[pair["prompt"]]
        assert [pair["is_response_0_safe"], pair["is_response_1_safe"]] == ["!" not in text for text in texts]
        better, safer = texts[pair["better_response_id"]], texts[pair["safer_response_id"]]
        if len({text.strip("!") == right for text in texts}) == 2:
            assert better.strip("!") == right
        else:
            assert "!" in better or "!" not in "".join(texts)
        assert "!" not in safer or all("!" in text for text in texts)
        conflicts += better != safer
    assert 0.2 < conflicts / 500 < 0.7
