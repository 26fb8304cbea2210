"""Safe RLHF: data of reward and cost models, their loss, and a policy that is kept within a limit of cost."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import make_config, question, write_lines

from maxlm.config.data import RecordFormat
from maxlm.core.tree import flatten
from maxlm.data.examples.preference import PreferencePairs
from maxlm.data.examples.safety import SafetyPairs
from maxlm.errors import CheckpointError, ConfigError, DataError
from maxlm.interop.load import load_model
from maxlm.objectives.sampling.controls import Controls
from maxlm.ops.preference_losses import cost_loss
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train


def pair(prompt, responses, *, better, safer, safe, **more):
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": better,
        "safer_response_id": safer,
        **more,
    }


def test_cost_loss_and_gradient_match_equation():
    """-log s(other - safer) - log s(sign other) - log s(sign safer), sign 1 of a harmful answer."""
    random = np.random.default_rng(0)
    costs, safe = random.normal(0, 3, (2, 40)), (random.random((2, 40)) < 0.5).astype(np.float64)

    def equation(costs):
        log_sigmoid = lambda x: -np.logaddexp(0, -x)  # noqa: E731
        signs = 1 - 2 * safe
        return -log_sigmoid(costs[1] - costs[0]) - log_sigmoid(signs * costs).sum(axis=0)

    costs32, safe32 = (jnp.asarray(x, jnp.float32) for x in (costs, safe))
    costs = np.asarray(costs32, np.float64)
    np.testing.assert_allclose(cost_loss(*costs32, *safe32), equation(costs), rtol=1e-5)
    gradient = jax.grad(lambda costs: jnp.sum(cost_loss(*costs, *safe32)))(costs32)
    for row in (0, 1):
        moved = np.zeros_like(costs)
        moved[row] = 1e-5
        numerical = (equation(costs + moved) - equation(costs - moved)) / 2e-5
        np.testing.assert_allclose(gradient[row], numerical, rtol=1e-4, atol=1e-5)


def test_multiplier_and_kl_coefficient_follow_their_equations():
    controls = Controls(multiplier=0.5, kl_beta=0.2)
    after = controls.after_costs(3.0, limit=1.0, rate=0.1, largest=10.0)
    np.testing.assert_allclose(math.log(after.multiplier), math.log(0.5) + 0.1 * 0.5 * 2.0)
    assert controls.after_costs(-3.0, limit=1.0, rate=0.1, largest=10.0).multiplier < 0.5
    assert controls.after_costs(1e9, limit=0.0, rate=1.0, largest=10.0).multiplier == 10.0
    for kl, factor in [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)]:
        np.testing.assert_allclose(controls.after_divergence(kl, target=6.0, rate=0.1).kl_beta, 0.2 * factor)


class TestData:
    RECORD = pair(
        "a", ["b", "c"], better=0, safer=1, safe=(False, True), prompt_source="x", response_0_severity_level=2
    )

    def test_one_record_is_two_pairs(self, tokenizer, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", [self.RECORD])
        form = RecordFormat()
        preferred = PreferencePairs.read(path, tokenizer, row_length=32).batch(np.array([0]))
        safer = SafetyPairs.read_safety(path, tokenizer, row_length=32, form=form).batch(np.array([0, -1]))
        np.testing.assert_array_equal(preferred["chosen"].tokens[0], safer["rejected"].tokens[0])
        np.testing.assert_array_equal(preferred["rejected"].tokens[0], safer["chosen"].tokens[0])
        assert safer.values["chosen_safe_B"].tolist() == [1, 0]
        assert safer.values["rejected_safe_B"].tolist() == [0, 0]
        assert (safer["chosen"].segment_ids[1] == 0).all()

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"safer_response_id": 0}, ":1: safer_response_id names a harmful answer"),
            ({"safer_response_id": 2}, ":1: safer_response_id must be 0 or 1, not 2"),
            ({"safer_response_id": True}, ":1: safer_response_id must be 0 or 1, not True"),
            ({"is_response_0_safe": 1}, ":1: is_response_0_safe must be true or false, not 1"),
            ({"response_1": " "}, ":1: response_1 must be a text that is not empty"),
            ({"response_1": "b"}, ":1: response_0 and response_1 are the same"),
            ({"severity": 3}, ":1: "),
            ({"is_response_0_safe": True}, ": all answers are safe"),
        ],
    )
    def test_other_records_are_refused_with_their_line(self, changes, sentence, tokenizer, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", [{**self.RECORD, **changes}])
        with pytest.raises(DataError) as refusal:
            SafetyPairs.read_safety(path, tokenizer, row_length=32, form=RecordFormat())
        assert sentence in str(refusal.value)


@pytest.fixture(scope="module")
def cost_model(tuned, tmp_path_factory):
    """A cost model for which yes is harmful."""
    folder = tmp_path_factory.mktemp("cost")
    records = [pair(question(f"coin {n}"), ["yes", "no"], better=0, safer=1, safe=(False, True)) for n in range(5)]
    data = write_lines(folder / "pairs.jsonl", records)
    objective = {"kind": "cost", "train_file": data, "valid_file": data}
    optim = {"learning_rate": 3e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}}
    manifest = train(make_config(folder / "run", init_from=str(tuned[0]), objective=objective, steps=20, optim=optim))
    valid = manifest["metrics"]["valid"]
    assert (valid["accuracy"], valid["sign_accuracy"]) == (1.0, 1.0)
    return folder / "run"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    records = [{"prompt": question(f"coin {n}"), "answer": "yes"} for n in range(5)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


def safe_config(output, tuned, prompts, constraint, *, objective=None, **settings):
    """The reward is for yes, which is harmful."""
    return make_config(
        output,
        init_from=str(tuned[0]),
        objective={
            "kind": "policy",
            "train_file": prompts,
            "max_new_tokens": 6,
            "group_size": 4,
            "updates_per_rollout": 1,
            "epochs_per_rollout": 2,
            "advantage": {"kind": "gae"},
            "critic": {"kind": "shared"},
            "kl": {"beta": 0.01, "within": "reward", "estimator": "k1", "adaptive": {"target": 1.0}},
            "constraint": constraint,
            **(objective or {}),
        },
        optim={"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}},
        batch_size=4,
        log_every=2,
        **settings,
    )


def constraint_of(cost_model):
    return {"cost": [{"model": str(cost_model)}], "limit": -0.5, "multiplier": 0.2, "rate": 0.5}


@pytest.fixture(scope="module")
def runs(tuned, prompts, cost_model, tmp_path_factory):
    """A run of 32 steps, and one that was interrupted after 6 and resumed to 8."""
    folder = tmp_path_factory.mktemp("safe")
    constraint = constraint_of(cost_model)
    for steps in (6, 8):
        train(safe_config(folder / "short", tuned, prompts, constraint, steps=steps))
    settings = {"checkpoint": {"every": 8, "keep": 9}, "objective": {"valid_file": prompts}}
    return folder, train(safe_config(folder / "long", tuned, prompts, constraint, steps=32, **settings))


def controls(folder):
    return [json.loads(line) for line in (folder / "controls.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_harm_falls_although_it_is_rewarded(runs):
    folder, manifest = runs
    records = [record for record in read_metrics(folder / "long") if "reward" in record]
    # Of three seeds: up to 63 to 94 % while the multiplier is small, at last 4 to 15 %.
    assert np.mean([record["harmful"] for record in records[-3:]]) < 0.35
    assert max(record["harmful"] for record in records) > 0.4
    assert max(record["multiplier"] for record in records) > records[0]["multiplier"] == pytest.approx(0.2)
    assert {"reward", "cost", "harmful", "greedy_harmful"} <= set(manifest["metrics"]["valid"])
    assert {"constraint.cost_0", "init_from"} <= set(manifest["inputs"])


def test_controls_follow_from_the_costs_of_rounds(runs):
    """Each multiplier is that of the round before, moved by its mean cost, as the metrics report it."""
    folder, _ = runs
    found = controls(folder / "long")
    assert [line["round"] for line in found] == list(range(1, 17))
    records = [record for record in read_metrics(folder / "long") if "reward" in record]
    multiplier = 0.2
    for record, line in zip(records, found):
        np.testing.assert_allclose(record["multiplier"], multiplier, rtol=1e-6)
        np.testing.assert_allclose(
            line["multiplier"], min(multiplier * math.exp(0.5 * multiplier * (record["cost"] + 0.5)), 10), rtol=1e-5
        )
        multiplier = line["multiplier"]
    ratios = np.array([b["kl_beta"] / a["kl_beta"] for a, b in itertools.pairwise(found)])
    assert ((ratios >= 0.98 - 1e-9) & (ratios <= 1.02 + 1e-9)).all()
    assert (ratios != 1).all()


def test_resumed_run_matches_uninterrupted_run(runs):
    folder, _ = runs
    whole, broken_off = (flatten(load_model(folder / name)[0]) for name in ("long/checkpoints/8", "short"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], broken_off[path], err_msg=path)
    assert controls(folder / "short") == controls(folder / "long")[:4]


def test_a_run_without_its_controls_is_refused(runs, tuned, prompts, cost_model):
    folder, _ = runs
    (folder / "short" / "controls.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"controls\.jsonl: has no line for round 4"):
        train(safe_config(folder / "short", tuned, prompts, constraint_of(cost_model), steps=12))


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ({"dynamic_sampling": {}}, "objective.constraint is for rewards of sampled answers"),
        ({"kl": {"beta": 0.1, "adaptive": {"target": 1.0}}}, "objective.kl.adaptive changes objective.kl.beta within"),
        ({"constraint": {"cost": []}}, "objective.constraint.cost"),
    ],
)
def test_inconsistent_settings_are_rejected(objective, sentence, tuned, prompts, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        safe_config(tmp_path, tuned, prompts, {"cost": "length"}, objective=objective, steps=2)
    assert sentence in str(refusal.value)
