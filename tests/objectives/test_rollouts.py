"""Rounds of sampling: with earlier weights, repeated until there is a signal, against greedy answers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import make_config, question, write_lines

from maxlm.cli import main
from maxlm.config.load import dump_yaml
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.interop.load import load_model
from maxlm.objectives.sampling.sampler import Sampler
from maxlm.runtime.time_limit import in_background
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    records = [{"prompt": question(f"coin {n}"), "answer": "yes"} for n in range(4)]
    records += [{"prompt": question("sky"), "answer": "blue"}, {"prompt": question("sun"), "answer": "yellow"}]
    return write_lines(folder / "prompts.jsonl", records)


def policy_config(output, tuned, prompts, *, steps=8, every=4, **objective):
    settings = {"kind": "policy", "train_file": prompts, "max_new_tokens": 6, "group_size": 4, **objective}
    return make_config(
        output,
        init_from=str(tuned[0]),
        objective=settings,
        optim={"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}},
        checkpoint={"every": every, "keep": 9},
        steps=steps,
        batch_size=4,
        log_every=2,
    )


@pytest.fixture(scope="module")
def late(tuned, prompts, tmp_path_factory):
    """Two rounds late: a run of 8 steps, and one that was interrupted after 4 and resumed."""
    folder = tmp_path_factory.mktemp("late")
    settings = {"staleness": 2, "advantage": {"kind": "greedy"}}
    train(policy_config(folder / "whole", tuned, prompts, **settings))
    for steps in (4, 8):
        train(policy_config(folder / "resumed", tuned, prompts, steps=steps, **settings))
    return folder


def test_answers_are_sampled_with_earlier_weights(late):
    """The first rounds have the initial weights: without staleness, training and sampling agree to 1e-5."""
    first, later = (record for record in read_metrics(late / "whole") if record["step"] in (2, 6) and "ratio" in record)
    # Step 2 learns from the second round, after one update.
    assert first["sampler_mismatch"] > 1e-4
    assert later["sampler_mismatch"] > first["sampler_mismatch"]


def test_resumed_run_matches_uninterrupted_run(late):
    whole, resumed = (flatten(load_model(late / name)[0]) for name in ("whole", "resumed"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], resumed[path], err_msg=path)


def test_a_run_without_its_rounds_is_refused(late, tuned, prompts):
    for file in (late / "resumed" / "rollouts").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"rollouts/8\.0\.npz: is missing; its answers were sampled with earlier"):
        train(policy_config(late / "resumed", tuned, prompts, steps=12, staleness=2, advantage={"kind": "greedy"}))


def test_samples_are_written_with_their_rewards(late):
    records = [json.loads(line) for line in (late / "resumed" / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0] * 4 + [2] * 4 + [4] * 4 + [6] * 4
    assert {"id", "prompt", "answer", "reward", "advantage", "truncated"} <= records[0].keys()
    assert records == [json.loads(line) for line in (late / "whole" / "samples.jsonl").read_text().splitlines()]
    assert all(
        (record["answer"] == "yes") == (record["reward"] == 1) for record in records if "coin" in record["prompt"]
    )


def test_dynamic_sampling_replaces_groups_without_a_signal(tuned, prompts, tmp_path):
    """Colors are known, so that their groups have equal rewards; a half of the prompts are coins."""
    signal = {}
    for name, dynamic in (("plain", None), ("dynamic", {"max_rounds": 4})):
        train(policy_config(tmp_path / name, tuned, prompts, steps=2, every=2, dynamic_sampling=dynamic))
        (record,) = (record for record in read_metrics(tmp_path / name) if "groups_with_signal" in record)
        signal[name] = record["groups_with_signal"]
    assert signal["plain"] < 0.9
    assert signal["dynamic"] == 1.0


def test_a_function_in_the_background_returns_or_raises():
    assert in_background(lambda: 3)() == 3
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)()


def test_run_stops_when_a_round_is_sampled_with_stale_weights(tuned, prompts, tmp_path, monkeypatch, capsys):
    original, kept = Sampler.__call__, []

    def stale(self, model, *args, **settings):
        # A copy: a training step donates its weights.
        kept.append(jax.tree.map(jnp.copy, model))
        return original(self, kept[0], *args, **settings)

    monkeypatch.setattr(Sampler, "__call__", stale)
    config = policy_config(tmp_path / "run", tuned, prompts, steps=4)
    (tmp_path / "stale.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert main(["train", str(tmp_path / "stale.yaml")]) == 1
    assert "sampling used other weights than those that are trained" in " ".join(capsys.readouterr().err.split())
    # The first round was right, and its step is saved.
    assert flatten(load_model(tmp_path / "run")[0])
