"""PPO with a critic increases the reward, resumes exactly, and leaves a model without its critic."""

import numpy as np
import pytest
from toy_task import make_config

from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.interop.load import load_model
from maxlm.objectives.policy import StopConfig
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train

PPO = {
    "kind": "policy",
    "max_new_tokens": 6,
    "group_size": 4,
    "updates_per_rollout": 1,
    "epochs_per_rollout": 2,
    "advantage": {"kind": "gae"},
    "kl": {"beta": 0.01, "within": "reward", "estimator": "k1"},
}


def ppo_config(output, tuned, prompts, critic, **settings):
    objective = {**PPO, "train_file": prompts, "critic": critic}
    optim = {"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}}
    return make_config(
        output, init_from=str(tuned[0]), objective=objective, optim=optim, batch_size=4, log_every=2, **settings
    )


@pytest.fixture(
    scope="module", params=["own", "shared", pytest.param("own with adapters", marks=pytest.mark.exhaustive)]
)
def runs(request, tuned, prompts, tmp_path_factory):
    """A run of 24 steps, and one that was interrupted after 6 and resumed to 8."""
    folder = tmp_path_factory.mktemp("ppo")
    critic = {"kind": request.param.partition(" ")[0]}
    adapters = {"kind": "lora", "rank": 4} if request.param.endswith("adapters") else None
    for steps in (6, 8):
        train(ppo_config(folder / "short", tuned, prompts, critic, steps=steps, adapters=adapters))
    checkpoint = {"every": 8, "keep": 9}
    train(ppo_config(folder / "long", tuned, prompts, critic, steps=24, checkpoint=checkpoint, adapters=adapters))
    return folder


def test_reward_increases_and_values_approach_it(runs):
    records = [record for record in read_metrics(runs / "long") if "reward" in record]
    # Of three seeds: at most 0.5 at first, at least 0.86 in the second half.
    assert records[0]["reward"] < 0.7, "a coin"
    assert np.mean([record["reward"] for record in records[6:]]) > 0.75
    errors = [abs(record["value_mean"] - record["return_mean"]) for record in records]
    assert np.mean(errors[-2:]) < 0.8 * max(errors)
    assert {"value", "policy", "kl", "entropy", "clip_fraction", "truncated"} <= records[0].keys()


def test_resumed_run_matches_uninterrupted_run(runs):
    whole, broken_off = (flatten(load_model(runs / name)[0]) for name in ("long/checkpoints/8", "short"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], broken_off[path], err_msg=path)
    assert not any(path.startswith(("critic", "value")) for path in whole)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"critic": None}, "objective.critic and objective.advantage.kind=gae need one another"),
        ({"advantage": {"kind": "group"}}, "objective.critic and objective.advantage.kind=gae need one another"),
        ({"advantage": {"kind": "group"}, "critic": None, "group_size": 1}, "set objective.group_size to at least 2"),
        ({"kl": {"beta": 0.1, "estimator": "k1"}}, "objective.kl.estimator=k1 has no useful gradient in a loss"),
        ({"epochs_per_rollout": 3}, "steps (4) must be a multiple of epochs_per_rollout (3)"),
        ({"staleness": 1, "dynamic_sampling": {}}, "objective.dynamic_sampling waits for the rewards of a round"),
        ({"stop": {"largest_kl": 1.0}, "kl": {}}, "objective.stop.largest_kl needs the starting model"),
    ],
)
def test_inconsistent_settings_are_rejected(settings, sentence, tuned, prompts, tmp_path):
    objective = {**PPO, "train_file": prompts, "critic": {"kind": "own"}, **settings}
    with pytest.raises(ConfigError) as refusal:
        make_config(tmp_path, init_from=str(tuned[0]), objective=objective, steps=4, checkpoint={"every": 4})
    assert sentence in str(refusal.value)


def test_a_run_ends_early_with_the_reason(tuned, prompts, tmp_path, capsys):
    config = ppo_config(tmp_path / "run", tuned, prompts, {"kind": "shared"}, steps=24)
    stop = {"smallest_entropy": 5.0}
    config = config.model_copy(
        update={"objective": config.objective.model_copy(update={"stop": type(config.objective.stop)(**stop)})}
    )
    manifest = train(config)
    metrics = manifest["metrics"]
    assert metrics["steps"] == 2, "the first record; a multiple of epochs_per_rollout"
    assert metrics["stopped"].startswith("entropy is 0.")
    assert "below objective.stop.smallest_entropy (5)" in metrics["stopped"]
    assert metrics["stopped"] in capsys.readouterr().err
    load_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "record", "reason"),
    [
        ({"largest_kl": 0.5}, {"kl": 0.6}, "kl is 0.6, above objective.stop.largest_kl (0.5)"),
        ({"reward_drop": 0.3}, {"reward": 0.1}, "reward fell from 0.5 to 0.1, by more than objective.stop.reward_drop"),
        ({"largest_kl": 0.5, "smallest_entropy": 0.1, "reward_drop": 0.5}, {}, None),
    ],
)
def test_reasons_to_stop(settings, record, reason):
    usual = {"reward": 0.5, "kl": 0.1, "entropy": 0.3}
    found = StopConfig(**settings).reason([usual, usual | record])
    assert found is None if reason is None else found.startswith(reason)
