"""RLAIF whole: a model answers, a judge of ours labels the pairs, and the model learns from them."""

import json

import numpy as np
import pytest
from toy_task import chat, make_config, question, write_lines

import maxlm
from maxlm.cli import main
from maxlm.runtime.manifest import manifest_chain
from maxlm.train.run import train

COINS = [question(f"coin {number}") for number in range(5)]

CONSTITUTION = """
kind: constitution
principles: [{id: agree, prefer: Which answer agrees}]
prompts: {compare: "{{ answer_a }} {{ answer_b }}"}
"""


@pytest.fixture(scope="module")
def judge(untrained, tmp_path_factory):
    """The run folder of a judge that prefers `yes` to `no`."""
    folder = tmp_path_factory.mktemp("judge")
    chats = [chat("yes no", "A"), chat("no yes", "B"), chat("yes yes", "tie"), chat("no no", "tie")]
    data = write_lines(folder / "chats.jsonl", chats * 4)
    objective = {"kind": "sft", "train_file": data, "valid_file": data}
    train(make_config(folder / "run", init_from=str(untrained), objective=objective, steps=60))
    return folder / "run"


@pytest.mark.exhaustive
def test_model_learns_what_the_judge_prefers(tuned, judge, tmp_path, capsys):
    run_folder, _ = tuned
    records = [{"prompt": coin} for coin in COINS]
    (tmp_path / "constitution.yaml").write_text(CONSTITUTION)
    (tmp_path / "feedback.yaml").write_text(
        f"kind: feedback\noutput: {tmp_path}/feedback\nrecords: {write_lines(tmp_path / 'prompts.jsonl', records)}\n"
        f"constitution: {tmp_path}/constitution.yaml\ntask: {{kind: prefer, max_tokens: 4}}\n"
        f"judge: {{kind: local, path: {judge}}}\nmodel: {{kind: local, path: {run_folder}}}\n"
        "answers: {count: 4, max_tokens: 8, temperature: 1.0}\nlimits: {max_failed_fraction: 0.5}\n"
    )
    assert main(["feedback", str(tmp_path / "feedback.yaml"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    pairs = [json.loads(line) for line in (tmp_path / "feedback" / "preferences.jsonl").read_text().splitlines()]
    right = [(pair["chosen"], pair["rejected"]) for pair in pairs].count(("yes", "no"))
    assert len(pairs) >= 5
    assert right >= 0.9 * len(pairs)
    assert summary["made"] == len(pairs)
    assert pairs[0]["judge"] == str(judge)

    config = make_config(
        tmp_path / "dpo",
        init_from=str(run_folder),
        objective={"kind": "preference", "train_file": str(tmp_path / "feedback" / "preferences.jsonl")},
        steps=15,
    )
    train(config)

    def p_yes(path):
        return np.mean([np.exp(score.log_probability) for score in maxlm.load(path).score(COINS, ["yes"] * len(COINS))])

    assert p_yes(tmp_path / "dpo") > p_yes(run_folder) + 0.1
    stages = [item["stage"] for item in manifest_chain(tmp_path / "dpo")]
    assert stages[-2:] == ["feedback/prefer", "train/preference"]
    assert stages.count("train/sft") == 2  # the model and its judge
