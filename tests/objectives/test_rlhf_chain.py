"""From SFT over preferences and a reward model to PPO: the policy learns what only the reward model knows."""

import json

import numpy as np
import pytest
from toy_task import chat, make_config, question, write_lines

from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.load import load_model, load_reward_model
from maxlm.runtime.manifest import manifest_chain
from maxlm.scoring.reward_model import score
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Prompts without answers: rules cannot judge them."""
    folder = tmp_path_factory.mktemp("prompts")
    return write_lines(folder / "prompts.jsonl", [{"prompt": question(f"coin {n}")} for n in range(5)])


@pytest.fixture(scope="module")
def reward_model(tuned, tmp_path_factory):
    """A reward model that prefers yes, trained from the model that is to be aligned."""
    folder = tmp_path_factory.mktemp("reward")
    pairs = [{"prompt": question(f"coin {n}"), "chosen": "yes", "rejected": "no"} for n in range(5)]
    data = write_lines(folder / "pairs.jsonl", pairs)
    objective = {"kind": "reward", "train_file": data, "valid_file": data}
    optim = {"learning_rate": 3e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}}
    manifest = train(make_config(folder / "run", init_from=str(tuned[0]), objective=objective, steps=20, optim=optim))
    assert manifest["metrics"]["valid"]["accuracy"] == 1.0
    return folder / "run"


def ppo_config(output, tuned, prompts, reward_model, *, critic=None, objective=None, **settings):
    return make_config(
        output,
        init_from=str(tuned[0]),
        objective={
            "kind": "policy",
            "train_file": prompts,
            "reward": [{"model": str(reward_model)}],
            "max_new_tokens": 6,
            "group_size": 4,
            "epochs_per_rollout": 2,
            "advantage": {"kind": "gae"},
            "critic": {"kind": "own", "start": str(reward_model), **(critic or {})},
            "kl": {"beta": 0.01, "within": "reward", "estimator": "k1"},
            **(objective or {}),
        },
        optim={"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}},
        batch_size=4,
        log_every=2,
        **settings,
    )


@pytest.fixture(scope="module")
def chain(tuned, prompts, reward_model, tmp_path_factory):
    """A run of 24 steps, and one that was interrupted after 6 and resumed to 8."""
    folder = tmp_path_factory.mktemp("chain")
    for steps in (6, 8):
        train(ppo_config(folder / "short", tuned, prompts, reward_model, steps=steps))
    settings = {"checkpoint": {"every": 8, "keep": 9}, "objective": {"valid_file": prompts}}
    return folder, train(ppo_config(folder / "long", tuned, prompts, reward_model, steps=24, **settings))


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_policy_learns_what_the_reward_model_prefers(chain):
    folder, manifest = chain
    records = [record for record in read_metrics(folder / "long") if "reward" in record]
    # Of three seeds: by 2.0 to 2.8; yes at first 50 to 75 %, later 92 %.
    assert np.mean([record["reward"] for record in records[-4:]]) > records[0]["reward"] + 0.5
    found = samples(folder / "long")
    early, late = (
        [s["answer"] == "yes" for s in found if lower <= s["step"] < upper] for lower, upper in ((0, 4), (12, 24))
    )
    assert np.mean(early) < 0.9, "a coin"
    assert np.mean(late) > 0.75
    assert manifest["metrics"]["valid"]["greedy_reward"] > records[0]["reward"]


def test_rewards_are_the_scores_of_the_reward_model(chain, reward_model):
    """The reward of a sampled chat is what `score` gives for its messages."""
    folder, _ = chain
    model, tokenizer = load_reward_model(reward_model)
    # An answer that was cut off has no end token to be read at.
    found = [each for each in samples(folder / "long") if not each["truncated"]][:6]
    numbers = [each["id"].rpartition(":")[2] for each in found]
    chats = [chat(f"coin {int(n) - 1}", each["answer"])["messages"] for n, each in zip(numbers, found)]
    np.testing.assert_allclose([each["reward"] for each in found], score(model, tokenizer, chats), atol=2e-5)


def test_manifest_names_the_reward_model_and_the_chain_before_it(chain, reward_model):
    folder, manifest = chain
    assert {"reward_0", "critic", "init_from", "train_file"} <= set(manifest["inputs"])
    assert manifest["inputs"]["reward_0"]["hash"]
    assert {"train/reward", "train/sft"} <= {item["stage"] for item in manifest_chain(folder / "long")}


def test_resumed_run_matches_uninterrupted_run(chain):
    folder, _ = chain
    whole, broken_off = (flatten(load_model(folder / name)[0]) for name in ("long/checkpoints/8", "short"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], broken_off[path], err_msg=path)


@pytest.mark.exhaustive
def test_scores_do_not_depend_on_the_mesh(tuned, prompts, reward_model, tmp_path):
    """One step on one device and on four: the same rewards, with a rule beside the model, asynchronously."""
    rewards = {}
    for name, mesh in {"one": {"data": 1, "fsdp": 1}, "four": {"data": 2, "fsdp": 2, "tensor": 1}}.items():
        parts = [{"model": str(reward_model), "weight": 2.0}, {"name": "length", "settings": {"high": 1, "margin": 5}}]
        objective = {"reward": parts, "staleness": 1, "epochs_per_rollout": 1}
        train(ppo_config(tmp_path / name, tuned, prompts, reward_model, steps=2, objective=objective, mesh=mesh))
        (record,) = (record for record in read_metrics(tmp_path / name) if "reward" in record)
        rewards[name] = [record["reward"], record["reward_run"], record["reward_length"]]
    np.testing.assert_allclose(rewards["one"], rewards["four"], rtol=1e-4)
    total, of_model, of_length = rewards["one"]
    np.testing.assert_allclose(total, 2 * of_model + of_length, rtol=1e-5)


@pytest.mark.parametrize(
    ("objective", "error", "sentence"),
    [
        ({"reward": [{"model": "TUNED"}]}, CheckpointError, "is a language model, not a reward model"),
        ({"reward": [{"model": "nowhere"}]}, CheckpointError, "nowhere"),
        ({"reward": [{"name": "length", "model": "nowhere"}]}, ConfigError, "give either name, a reward function"),
        ({"reward": [{"model": "a", "settings": {"b": 1}}]}, ConfigError, "a reward model has none"),
        ({"critic": {"kind": "shared", "start": "a"}}, ConfigError, "objective.critic.start is for"),
    ],
)
def test_other_models_are_refused(objective, error, sentence, tuned, prompts, reward_model, tmp_path):
    tree = json.loads(json.dumps(objective).replace("TUNED", str(tuned[0])))
    with pytest.raises(error) as refusal:
        train(ppo_config(tmp_path / "run", tuned, prompts, reward_model, objective=tree, steps=2))
    assert sentence in str(refusal.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
