"""GRPO increases the reward; a run resumes exactly; sampling does not depend on the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_task import make_config, question

from maxlm.config.fault import GuardConfig
from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError, DataError
from maxlm.interop.load import load_model
from maxlm.objectives.sampling.rollouts import policy_rows
from maxlm.objectives.sampling.sampler import Sampler
from maxlm.objectives.sequences import target_log_probabilities
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from maxlm.train.state import create_state
from maxlm.train.step import judge


def grpo_config(output, tuned, prompts, *, objective=None, **settings):
    return make_config(
        output,
        init_from=str(tuned[0]),
        objective={
            "kind": "policy",
            "train_file": prompts,
            "max_new_tokens": 6,
            "group_size": 4,
            "updates_per_rollout": 2,
            "kl": {"beta": 0.01},
            **(objective or {}),
        },
        batch_size=4,
        log_every=2,
        **settings,
    )


@pytest.fixture(scope="module")
def runs(tuned, prompts, tmp_path_factory):
    """One run of 16 steps, and one that was interrupted after 6 and resumed to 8."""
    folder = tmp_path_factory.mktemp("policy")
    train(grpo_config(folder / "short", tuned, prompts, steps=6))
    train(grpo_config(folder / "short", tuned, prompts, steps=8))
    checkpoint = {"every": 8, "keep": 9}
    config = grpo_config(
        folder / "long",
        tuned,
        prompts,
        steps=16,
        checkpoint=checkpoint,
        eval_every=8,
        objective={"valid_file": prompts},
    )
    return folder, train(config)


def test_reward_increases(runs):
    folder, manifest = runs
    records = [record for record in read_metrics(folder / "long") if "reward" in record]
    assert records[0]["reward"] < 0.75, "a coin"
    assert np.mean([record["reward"] for record in records[-2:]]) > 0.9
    assert manifest["metrics"]["valid"]["reward"] > 0.7
    assert manifest["metrics"]["valid"]["greedy_reward"] == 1.0
    assert records[0]["groups_with_signal"] > 0.3
    assert 1 < records[0]["completion_length"] <= 6
    assert records[-1]["kl"] > 0


def test_resumed_run_matches_uninterrupted_run(runs):
    folder, _ = runs
    whole = flatten(load_model(folder / "long" / "checkpoints" / "8")[0])
    broken_off = flatten(load_model(folder / "short")[0])
    for path in whole:
        np.testing.assert_array_equal(whole[path], broken_off[path], err_msg=path)


@pytest.fixture(scope="module")
def sampled(tuned, tokenizer):
    """Answers to the same prompts on one device and on eight."""
    drawn = {}
    prompts = [Prompt(tokenizer.encode_chat(question(f"coin {n}"), generation_prompt=True).ids, {}) for n in range(8)]
    for name, sizes in {"one": MeshConfig(data=1, fsdp=1), "eight": MeshConfig(data=4, fsdp=2)}.items():
        mesh = make_mesh(sizes)
        model, _ = load_model(tuned[0], mesh)
        sampler = Sampler(tokenizer, mesh, prompt_length=16, max_new_tokens=6, seed=0)
        with jax.set_mesh(mesh):
            drawn[name] = sampler(model, prompts, np.arange(8), stream=3, temperature=1.3)
            drawn[name, "again"] = sampler(model, prompts, np.arange(8), stream=3, temperature=1.3)
            drawn[name, "other"] = sampler(model, prompts, np.arange(8), stream=4, temperature=1.3)
    return drawn


def test_answers_depend_on_weights_seed_stream_and_row_but_not_on_mesh(sampled):
    one, eight = sampled["one"], sampled["eight"]
    assert one.texts == eight.texts == sampled["one", "again"].texts
    assert one.texts != sampled["one", "other"].texts
    np.testing.assert_array_equal(one.tokens_RN, eight.tokens_RN)
    np.testing.assert_allclose(one.log_probabilities_RN, eight.log_probabilities_RN, atol=1e-5)
    assert len(set(one.texts)) > 1


def test_training_and_sampling_use_the_same_policy(sampled, tuned):
    """The training pass gives sampled tokens the probability they were sampled with: the ratio starts at 1."""
    model, _ = load_model(tuned[0])
    rows, sampled_BL = policy_rows(sampled["one"])
    log_p = target_log_probabilities(model, rows, temperature=1.3)
    np.testing.assert_allclose(log_p, sampled_BL, atol=2e-5)
    assert rows.loss_weights.sum() == sampled["one"].lengths_R.sum()


def test_rows_hold_each_prompt_followed_by_its_answer(sampled, tokenizer):
    answers = sampled["one"]
    rows, _ = policy_rows(answers)
    for row in range(8):
        prompt = answers.prompts_RP[row, : answers.prompt_lengths_R[row]].tolist()
        answer = answers.tokens_RN[row, : answers.lengths_R[row]].tolist()
        here = rows.segment_ids[row] > 0
        assert rows.tokens[row][here].tolist() == prompt + answer
        assert rows.targets[row][rows.loss_weights[row] > 0].tolist() == answer


def test_steps_with_zero_gradient_do_not_make_the_next_one_a_spike():
    guard, state = GuardConfig(spike_factor=10.0), create_state({}, optax.identity())
    for grad_norm in [0.0] * 30 + [1.0] + [0.0] * 300 + [2.0]:
        good, guard_state = judge(guard, state, jnp.float32(0.5), jnp.float32(grad_norm))
        state = dataclasses.replace(state, step=state.step + 1, guard=guard_state)
        assert good
    good, _ = judge(guard, state, jnp.float32(0.5), jnp.float32(50.0))
    assert not good


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5}, r"steps \(5\) must be a multiple of updates_per_rollout \(2\)"),
        ({"steps": 4, "checkpoint": {"every": 3}}, r"checkpoint\.every \(3\) must be a multiple"),
        ({"steps": 4, "row_length": 6}, r"max_new_tokens \(6\) leaves no room for a prompt in row_length \(6\)"),
    ],
)
def test_inconsistent_settings_are_rejected(tuned, prompts, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        grpo_config(tmp_path, tuned, prompts, **settings)


def test_prompts_without_room_for_an_answer_are_rejected(tuned, prompts, tmp_path):
    with pytest.raises(DataError, match="all 5 prompts with their answers are longer than row_length=8"):
        train(grpo_config(tmp_path / "run", tuned, prompts, steps=2, row_length=8))
