"""KTO makes good answers more likely and bad ones less, from answers that were judged alone."""

import json

import numpy as np
import pytest
from toy_task import chat, make_config, question, write_lines

from maxlm.cli import main
from maxlm.config.data import RecordFormat
from maxlm.data.examples.judged import JudgedAnswers
from maxlm.generate.model import load
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train


def judged(number, answer):
    return {"prompt": question(f"coin {number}"), "completion": answer, "label": answer == "yes"}


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kto")
    records = [judged(number, answer) for number in range(7) for answer in ("yes", "no")]
    files = {"train_file": write_lines(folder / "train.jsonl", records[:10])}
    files["valid_file"] = write_lines(folder / "valid.jsonl", records[10:])
    objective = {"kind": "unpaired_preference", "loss": {"kind": "kto", "beta": 0.3}, **files}
    manifest = train(make_config(folder / "run", init_from=str(tuned[0]), objective=objective, steps=12, log_every=1))
    return folder / "run", manifest


def test_good_answers_become_more_likely_on_held_out_prompts(run, tuned):
    folder, manifest = run
    first, *_, last = (record for record in read_metrics(folder) if "kto" in record)
    assert first["kto"] == pytest.approx(0.5, abs=1e-3), "all gains are 0"
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["kto"] < 0.4
    assert manifest["metrics"]["valid"]["reward_margin"] > 0.5
    before, after = load(tuned[0]), load(folder)
    gain = [
        after.score([question("coin 5")], [answer])[0].log_probability
        - before.score([question("coin 5")], [answer])[0].log_probability
        for answer in ("yes", "no")
    ]
    assert gain[0] > gain[1] + 1


def test_values_of_the_starting_model_are_computed_once(run, tuned, monkeypatch):
    """A second run reads those of the first from its folder; the loss is the same."""
    folder, _ = run
    files = sorted((folder / "reference").iterdir())
    assert len(files) == 2, "of the training and of the validation file"
    with np.load(files[0]) as values:
        assert sorted(values) == ["reference_B", "reference_mismatched_B"]
        assert all(np.isfinite(values[name]).all() for name in values)
    times = [file.stat().st_mtime_ns for file in files]
    config = make_config(
        folder,
        init_from=str(tuned[0]),
        objective={
            "kind": "unpaired_preference",
            "loss": {"kind": "kto", "beta": 0.3},
            "train_file": str(folder.parent / "train.jsonl"),
            "valid_file": str(folder.parent / "valid.jsonl"),
        },
        steps=13,
        log_every=1,
    )
    train(config, accept_changes=True)
    assert [file.stat().st_mtime_ns for file in sorted((folder / "reference").iterdir())] == times


def test_records_of_every_form(tokenizer, tmp_path):
    records = [
        judged(1, "yes"),
        {"prompt": "sky", "completion": " blue", "label": 0},
        chat("grass", "green") | {"label": False},
        {"conversations": [{"from": "human", "value": "sun"}, {"from": "gpt", "value": "yellow"}], "label": True},
        {"prompt": question("coin 2"), "chosen": "yes", "rejected": "no"},
    ]
    path = write_lines(tmp_path / "judged.jsonl", records)
    answers = JudgedAnswers.read(path, tokenizer, row_length=32, form=RecordFormat())
    batch = answers.batch(np.array([0, 1, 2, 3, 4, 5, -1]))
    assert batch.values["is_good_B"].tolist() == [1, 0, 0, 1, 1, 0, 0]
    assert [answers.places(index) for index in (0, 5)] == [[f"{path}:1"], [f"{path}:5"]]
    assert not batch["answers"].segment_ids[-1].any()

    def answer_of(name, row):
        stream = batch[name]
        return tokenizer.decode(stream.targets[row][stream.loss_weights[row] > 0].tolist())

    assert [answer_of("answers", row).split()[0] for row in range(6)] == ["yes", "blue", "green", "yellow", "yes", "no"]
    # The answer to the next example with another prompt; its own prompt.
    assert [answer_of("mismatched", row).split()[0] for row in (0, 1, 4)] == ["blue", "green", "yes"]
    for row in range(6):
        prompt = batch["answers"].loss_weights[row].argmax()
        np.testing.assert_array_equal(batch["answers"].tokens[row, :prompt], batch["mismatched"].tokens[row, :prompt])


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([{"prompt": "a", "completion": "b"}], ":1: lacks 'label'"),
        ([{"prompt": "a", "completion": "b", "label": "good"}], ":1: label must be true for a good answer or false"),
        ([{"messages": [{"role": "assistant", "content": "b"}], "label": True}], ":1: must have a prompt before"),
        ([{"prompt": "a", "completion": "b", "label": True, "score": 3}], ":1: the record has the unknown key 'score'"),
        ([judged(1, "yes"), judged(2, "yes")], "all answers are good (label), so there is nothing to tell apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_refused_with_their_line(records, sentence, tuned, tmp_path, capsys):
    path = write_lines(tmp_path / "judged.jsonl", records)
    config = tmp_path / "run.yaml"
    objective = {"kind": "unpaired_preference", "train_file": path}
    settings = {"kind": "train", "output": str(tmp_path / "run"), "init_from": str(tuned[0]), "objective": objective}
    config.write_text(json.dumps(settings | {"row_length": 32, "batch_size": 8}))
    assert main(["train", str(config)]) == 2
    assert sentence in capsys.readouterr().err
