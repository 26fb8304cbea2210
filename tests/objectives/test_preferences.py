"""DPO makes the chosen answer more likely than the rejected one; a reward model ranks them."""

import json

import numpy as np
import pytest
from toy_task import chat, make_config, question, write_lines

from maxlm.cli import main
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, RequestError
from maxlm.generate.model import load
from maxlm.interop.load import load_model, load_reward_model
from maxlm.scoring.reward_model import score
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """`yes` is preferred to `no`; numbers 5 and 6 are held out."""
    folder = tmp_path_factory.mktemp("pairs")
    records = [{"prompt": question(f"coin {n}"), "chosen": "yes", "rejected": "no"} for n in range(7)]
    files = write_lines(folder / "train.jsonl", records[:5]), write_lines(folder / "valid.jsonl", records[5:])
    return dict(zip(("train_file", "valid_file"), files))


@pytest.fixture(scope="module")
def dpo_run(tuned, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    objective = {"kind": "preference", "loss": {"kind": "dpo", "beta": 0.3}, **pairs}
    manifest = train(make_config(folder, init_from=str(tuned[0]), objective=objective, steps=12, log_every=1))
    return folder, manifest


def test_dpo_increases_margin_on_held_out_prompts(dpo_run):
    folder, manifest = dpo_run
    first, *_, last = (record for record in read_metrics(folder) if "dpo" in record)
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-4), "the model starts as its own reference"
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-4)
    assert last["reward_margin"] > 1
    assert manifest["metrics"]["valid"]["accuracy"] == 1.0
    assert manifest["metrics"]["valid"]["reward_margin"] > 1


def test_dpo_separates_probabilities_of_answers(dpo_run, tuned):
    prompts = [question("coin 1"), question("coin 5")]
    before, after = load(tuned[0]), load(dpo_run[0])
    gain = [
        after.score([prompt], [answer])[0].log_probability - before.score([prompt], [answer])[0].log_probability
        for prompt in prompts
        for answer in ("yes", "no")
    ]
    assert gain[0] > gain[1] + 1
    assert gain[2] > gain[3] + 1


@pytest.fixture(scope="module", params=[None, {"kind": "lora", "rank": 2}], ids=["full", "lora"])
def reward_run(request, tuned, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    settings = {"init_from": str(tuned[0]), "objective": {"kind": "reward", "center": 0.01, **pairs}}
    manifest = train(make_config(folder, **settings, adapters=request.param, steps=12, log_every=1))
    return folder, manifest, request.param


def test_reward_model_ranks_answers_to_held_out_prompts(reward_run):
    folder, manifest, _ = reward_run
    first, *_ = (record for record in read_metrics(folder) if "bradley_terry" in record)
    assert first["bradley_terry"] == pytest.approx(np.log(2), abs=1e-5), "initial rewards are equal"
    assert manifest["metrics"]["valid"]["accuracy"] == 1.0
    assert manifest["metrics"]["valid"]["loss"] < 0.5

    model, tokenizer = load_reward_model(folder)
    chats = [[*question(f"coin {n}"), {"role": "assistant", "content": a}] for n in (5, 6) for a in ("yes", "no")]
    rewards = score(model, tokenizer, chats)
    assert rewards[0] > rewards[1]
    assert rewards[2] > rewards[3]
    margin = np.mean([rewards[0] - rewards[1], rewards[2] - rewards[3]])
    assert margin == pytest.approx(manifest["metrics"]["valid"]["reward_margin"], rel=1e-3)


def test_score_prints_a_line_per_record_and_a_summary(reward_run, pairs, tuned, tmp_path, capsys):
    folder, manifest, lora = reward_run
    assert main(["score", str(folder), pairs["valid_file"], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    valid = manifest["metrics"]["valid"]
    assert (report["records"], report["pairs"], report["accuracy"]["value"]) == (2, 2, valid["accuracy"])
    assert report["margin"]["value"] == pytest.approx(valid["reward_margin"], rel=1e-3)
    if lora is not None:
        return
    by_line = [(item["chosen_score"], item["rejected_score"]) for item in report["scores"]]
    assert [item["id"] for item in report["scores"]] == [f"{pairs['valid_file']}:{n}" for n in (1, 2)]
    records = [
        chat("coin 5", "yes"),
        {"messages": question("coin 5"), "completion": "no"},
        {"prompt": question("coin 6"), "completion": "yes"},
        {"prompt": "coin", "completion": " yes"},
    ]
    path, output = write_lines(tmp_path / "answers.jsonl", records), tmp_path / "scores.jsonl"
    assert main(["score", str(folder), path, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"{path}:{n}" for n in (1, 2, 3, 4)]
    expected = [by_line[0][0], by_line[0][1], by_line[1][0]]
    np.testing.assert_allclose([line["score"] for line in lines[:3]], expected, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "4 records, mean score" in printed.err
    write_lines(tmp_path / "answers.jsonl", [records[0]])
    assert main(["score", str(folder), path]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(lines[0]["score"], rel=1e-4)

    mistakes = [
        ({"prompt": "a"}, r":2: has prompt; a record is {prompt, completion}"),
        ({"prompt": "a", "chosen": "b"}, r":2: has chosen; a record is"),
        ({"completion": "b"}, ":2: must have either prompt or messages with completion"),
        ({"messages": question("sky")}, ":2: must end with a message of role 'assistant'"),
        ({"prompt": "a", "completion": None}, ":2: if the prompt is a string, the answers must be strings"),
        ({"prompt": "sky", "completion": "sky " * 90}, "tokens exceed the model's context of 64; shorten"),
    ]
    for record, sentence in mistakes:
        write_lines(tmp_path / "answers.jsonl", [records[0], record])
        assert main(["score", str(folder), path]) == 2
        assert f"{path}:2" in (err := capsys.readouterr().err)
        assert sentence in err
    write_lines(tmp_path / "answers.jsonl", [])
    for arguments, sentence in [
        ([str(folder), path], "contains no records; a record is"),
        ([str(folder), path, "--output", path], "is the file to score"),
        ([str(folder), str(tmp_path / "none"), "--output", str(output)], "none: there is no such file"),
        ([str(folder), path, "--output", str(tmp_path)], "must be a file in an existing folder"),
        ([str(tuned[0]), pairs["valid_file"]], "is a language model, not a reward model; give the run folder"),
    ]:
        assert main(["score", *arguments]) == 2
        assert sentence in capsys.readouterr().err


def test_score_depends_only_on_its_own_text(reward_run):
    model, tokenizer = load_reward_model(reward_run[0])
    texts = ["sky", question("coin 1"), "grass and snow and coal"]
    together = score(model, tokenizer, texts)
    alone = [score(model, tokenizer, [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match=r"text 1: its \d+ tokens exceed the model's context of 64"):
        score(model, tokenizer, ["sky", "sky " * 100])


def test_reward_model_with_adapters_trains_head_and_keeps_base(reward_run, tuned):
    folder, _, lora = reward_run
    model, _ = load_reward_model(folder)
    assert np.abs(model.score).max() > 0
    start, trained = flatten(load_model(tuned[0])[0]), flatten(model)
    same = {path: (np.asarray(start[path]) == np.asarray(trained[path])).all() for path in start}
    assert same["embedding"] == same["final_norm/scale"] == (lora is not None)
    assert not same["layers/0/0/mlp/up"]


def test_models_of_the_wrong_kind_are_rejected(reward_run, tuned):
    with pytest.raises(CheckpointError, match="is a reward model, which cannot generate text"):
        load_model(reward_run[0])
    with pytest.raises(CheckpointError, match="is a language model"):
        load_reward_model(tuned[0])
