"""A process reward model finds wrong steps; ensembles give means and deviations; scoring resumes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_formulas import check, sigmoid
from toy_task import make_config, question, write_lines

from maxlm.cli import main
from maxlm.config.data import RecordFormat
from maxlm.data.examples.steps import LabeledSteps, encode_steps
from maxlm.errors import CheckpointError, DataError
from maxlm.interop.load import load_reward_model
from maxlm.ops.binary_loss import binary_cross_entropy
from maxlm.scoring.score import RewardModels
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train

RIGHT, WRONG = "yes", "no"
SOLUTIONS = [
    {
        "prompt": question(f"coin {n}"),
        "steps": [RIGHT if right else WRONG for right in rights],
        "labels": [int(right) for right in rights],
    }
    for n in range(6)
    for rights in ([True, True], [True, False], [False, True, True], [False, False])
]


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_binary_cross_entropy(label):
    logits = np.random.default_rng(0).normal(scale=5, size=50)
    y = np.float64(np.float32(label))

    def reference(x):
        return -y * np.log(sigmoid(x)) - (1 - y) * np.log(sigmoid(-x))

    check(lambda x: binary_cross_entropy(x, jnp.float32(label)), reference, logits)


def test_binary_cross_entropy_is_finite_where_sigmoid_underflows():
    np.testing.assert_allclose(binary_cross_entropy(jnp.array([1e4, -1e4]), jnp.array([0.0, 1.0])), [1e4, 1e4])
    assert jnp.isfinite(jax.grad(binary_cross_entropy)(jnp.float32(-1e4), jnp.float32(1.0)))


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("process_reward")
    data = write_lines(folder / "train.jsonl", SOLUTIONS[:20])
    valid = write_lines(folder / "valid.jsonl", SOLUTIONS[20:])
    objective = {"kind": "process_reward", "train_file": data, "valid_file": valid}
    manifest = train(make_config(folder / "run", init_from=str(tuned[0]), objective=objective, steps=30, log_every=1))
    return folder / "run", manifest


@pytest.fixture(scope="module")
def reward_runs(tuned, tmp_path_factory):
    """Two reward models that prefer opposite answers to coins, and agree on colors."""
    folder = tmp_path_factory.mktemp("reward_models")
    runs = []
    for chosen, rejected in (("yes", "no"), ("no", "yes")):
        pairs = [{"prompt": question(f"coin {n}"), "chosen": chosen, "rejected": rejected} for n in range(4)]
        pairs += [{"prompt": question("sky"), "chosen": "blue", "rejected": "red", "margin": 1.0}]
        objective = {"kind": "reward", "center": 0.01, "train_file": write_lines(folder / f"{chosen}.jsonl", pairs)}
        train(make_config(folder / chosen, init_from=str(tuned[0]), objective=objective, steps=12))
        runs.append(str(folder / chosen))
    return runs


def test_wrong_steps_are_found_on_held_out_prompts(run):
    folder, manifest = run
    first, *_ = (record for record in read_metrics(folder) if "step_cross_entropy" in record)
    assert first["step_cross_entropy"] == pytest.approx(math.log(2), abs=1e-5), "all probabilities start at one half"
    valid = manifest["metrics"]["valid"]
    assert valid["accuracy"] == valid["accuracy_of_right"] == valid["accuracy_of_wrong"] == 1.0
    assert valid["loss"] < 0.3
    assert load_reward_model(folder)[0].config.labels == ("process_reward",)


def test_score_gives_probabilities_of_steps(run, tmp_path, capsys):
    records = [
        {"prompt": question("coin 5"), "steps": [RIGHT, WRONG, RIGHT]},
        {"prompt": question("coin 5"), "steps": [RIGHT], "labels": [1]},
    ]
    path = write_lines(tmp_path / "solutions.jsonl", records)
    scores = {}
    for step_score in ("min", "product", "last"):
        assert main(["score", str(run[0]), path, "--json", "--step-score", step_score]) == 0
        report = json.loads(capsys.readouterr().out)
        first, second = report["scores"]
        assert [p > 0.5 for p in first["steps"]] == [True, False, True]
        scores[step_score] = first["score"]
        assert second["score"] == second["steps"][0]
        # What follows a step does not change its probability.
        assert second["steps"][0] == pytest.approx(first["steps"][0], rel=1e-4)
    assert scores["min"] == min(first["steps"])
    assert scores["product"] == pytest.approx(math.prod(first["steps"]))
    assert scores["last"] == first["steps"][-1]
    for record, sentence in [
        ({"prompt": "a", "completion": "b"}, ":1: has prompt, completion; a record for a process reward model is"),
        ({"prompt": "a", "steps": []}, ":1: steps must be a list of texts"),
        ({"steps": ["a"]}, ":1: lacks 'prompt'"),
    ]:
        assert main(["score", str(run[0]), write_lines(tmp_path / "bad.jsonl", [record])]) == 2
        assert sentence in capsys.readouterr().err


def test_ensemble_gives_mean_deviation_and_lower_bound(reward_runs, tmp_path, capsys):
    records = [
        {"prompt": question("coin 1"), "completion": "yes"},
        {"prompt": question("sky"), "completions": ["blue", "red", "green"]},
        {"prompt": question("coin 2"), "chosen": "yes", "rejected": "no"},
    ]
    path = write_lines(tmp_path / "answers.jsonl", records)
    alone = []
    for run in reward_runs:
        assert main(["score", run, path, "--json"]) == 0
        alone.append(json.loads(capsys.readouterr().out)["scores"])
    assert main(["score", *reward_runs, path, "--json", "--uncertainty", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["answers"], report["pairs"]) == (3, 6, 1)
    coin, colors, pair = report["scores"]
    members = [each[0]["score"] for each in alone]
    assert coin["by_model"] == pytest.approx(members, rel=1e-4, abs=1e-5)
    assert coin["mean"] == pytest.approx(np.mean(members), abs=1e-5)
    assert coin["std"] == pytest.approx(np.std(members), rel=1e-4)
    assert coin["score"] == pytest.approx(coin["mean"] - 2 * coin["std"], rel=1e-5)
    assert [each["score"] for each in alone[0][1]["completions"]] == pytest.approx(
        [each["by_model"][0] for each in colors["completions"]], rel=1e-4, abs=1e-5
    )
    assert coin["std"] > colors["completions"][0]["std"], "they disagree on coins"
    assert pair["chosen_by_model"][0] > pair["rejected_by_model"][0]
    assert pair["chosen_by_model"][1] < pair["rejected_by_model"][1]


def test_models_of_different_kinds_are_no_ensemble(run, reward_runs, tuned):
    with pytest.raises(CheckpointError, match=r"is a process reward model, and .* is a reward model; score them sep"):
        RewardModels([reward_runs[0], run[0]])
    with pytest.raises(CheckpointError, match="is a language model, not a reward model"):
        RewardModels([reward_runs[0], tuned[0]])


def test_interrupted_scoring_continues(reward_runs, tmp_path, capsys):
    records = [{"prompt": question(f"coin {n}"), "completion": "yes"} for n in range(5)]
    path, output = write_lines(tmp_path / "answers.jsonl", records), tmp_path / "scores.jsonl"
    command = ["score", reward_runs[0], path, "--output", str(output)]
    assert main(command) == 0
    whole = output.read_text()
    # Cut off within the fourth line; the third one is marked, to see that it is kept.
    lines = whole.splitlines(keepends=True)
    marked = json.dumps({**json.loads(lines[2]), "score": 123.0}) + "\n"
    output.write_text("".join([*lines[:2], marked, lines[3][:20]]))
    capsys.readouterr()
    assert main(command) == 0
    assert "3 records were scored before, 5 records, mean score" in capsys.readouterr().err
    assert output.read_text().splitlines(keepends=True)[2] == marked
    assert len(output.read_text().splitlines()) == 5
    assert main(command) == 0, "nothing is left to do"
    assert "5 records were scored before" in capsys.readouterr().err

    for changed, sentence in [
        ([*command, "--uncertainty", "1"], "holds scores of other models, records or settings; give another path"),
        (["score", reward_runs[1], *command[2:]], "holds scores of other models"),
    ]:
        assert main(changed) == 2
        assert sentence in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text("mine\n")
    assert main([*command[:-1], str(other)]) == 2
    assert "exists and is not of an interrupted `maxlm score`" in capsys.readouterr().err
    assert other.read_text() == "mine\n"
    for value in ("-1", "x", "inf"):
        with pytest.raises(SystemExit) as exit_:
            main([*command, "--uncertainty", value])
        assert exit_.value.code == 2


def test_steps_are_scored_at_their_last_tokens(tokenizer, tmp_path):
    records = [
        {"prompt": question("sky"), "steps": ["blue", "green and red"], "labels": ["+", "-"]},
        {"prompt": "coin", "steps": ["yes", "no", "yes"], "labels": [True, None, 0.25]},
    ]
    path = write_lines(tmp_path / "s.jsonl", records)
    solutions = LabeledSteps.read(path, tokenizer, row_length=64, form=RecordFormat())
    batch = solutions.batch(np.array([1, 0, -1]))
    text, labels_BL = batch["text"], batch.values["labels_BL"]
    assert [labels_BL[row][text.loss_weights[row] > 0].tolist() for row in range(3)] == [[1, 0.25], [1, 0], []]
    for row, record in ((1, records[0]), (0, records[1])):
        ids = text.tokens[row][text.segment_ids[row] > 0].tolist()
        expected, ends = encode_steps(tokenizer, record["prompt"], record["steps"], "s")
        assert ids == expected
        for end, step in zip(ends, record["steps"]):
            assert tokenizer.decode(ids[: end + 1]).endswith(f"{step}\n")
        # A step has the same tokens whatever follows.
        assert encode_steps(tokenizer, record["prompt"], record["steps"][:1], "s")[0] == ids[: ends[0] + 1]
    assert not text.segment_ids[2].any()
    assert solutions.places(1) == [f"{path}:2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, r":1: steps must be a list of texts, and not empty"),
        ({"steps": ["a", " "]}, r":1: step 2 must be a text, and not empty, not ' '"),
        ({"steps": ["a", {"text": "b"}]}, r":1: step 2 must be a text"),
        ({"labels": [1]}, r":1: labels must be a list with one for each of the 2 steps; it has 1"),
        ({"labels": "+-"}, r":1: labels must be a list with one for each of the 2 steps; it has no list of"),
        (
            {"labels": [1, -1]},
            r":1: label 2 must be true or false, \+ or -, a number from 0 to 1, or null .*, not '-1'",
        ),
        ({"labels": [1, "good"]}, r":1: label 2 must be .* not 'good'"),
        ({"labels": [1, float("nan")]}, r":1: label 2 must be "),
        ({"labels": [None, None]}, r":1: no step has a label"),
        ({"lable": 1}, r":1: the record has the unknown key 'lable'; did you mean 'labels'"),
        ({"steps": ["a", "\ud800"]}, r":1: .*surrogate"),
        ({"prompt": None}, r":1: messages must be a list"),
    ],
)
def test_bad_solutions_are_reported_with_file_and_line(tokenizer, tmp_path, changes, message):
    record = {"prompt": "p", "steps": ["a", "b"], "labels": [1, 0], **changes}
    with pytest.raises(DataError, match=rf"s\.jsonl{message}"):
        LabeledSteps.read(write_lines(tmp_path / "s.jsonl", [record]), tokenizer, row_length=64, form=RecordFormat())


def test_too_long_solutions_are_counted(tokenizer, tmp_path, capsys):
    long = {"prompt": "p", "steps": ["no " * 50], "labels": [1]}
    path = write_lines(tmp_path / "s.jsonl", [SOLUTIONS[0], long])
    assert len(LabeledSteps.read(path, tokenizer, row_length=48, form=RecordFormat())) == 1
    assert "1 of 2 solutions are longer" in " ".join(capsys.readouterr().err.split())
