"""Alignment losses and their gradients against their equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops.advantages import group_advantages, has_signal, leave_one_out_advantages
from maxlm.ops.policy_losses import clipped_importance_loss, clipped_surrogate, kl_estimate
from maxlm.ops.preference_losses import bradley_terry_loss, dpo_loss, hinge_loss

DELTA = 1e-6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numerical_gradient(function, x):
    """Central differences of an elementwise float64 function."""
    return (function(x + DELTA) - function(x - DELTA)) / (2 * DELTA)


def check(ours, reference, x):
    """Values and gradients of an elementwise float32 function against a float64 one."""
    x32 = jnp.asarray(x, jnp.float32)
    x = np.asarray(x32, np.float64)
    np.testing.assert_allclose(ours(x32), reference(x), rtol=2e-6, atol=2e-6)
    gradient = jax.grad(lambda value: jnp.sum(ours(value)))(x32)
    np.testing.assert_allclose(gradient, numerical_gradient(reference, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(beta, smoothing):
    margins = np.random.default_rng(0).normal(scale=10, size=50)

    def reference(m):
        return -(1 - smoothing) * np.log(sigmoid(beta * m)) - smoothing * np.log(sigmoid(-beta * m))

    check(lambda m: dpo_loss(m, beta=beta, label_smoothing=smoothing), reference, margins)


def test_dpo_is_finite_where_sigmoid_underflows():
    loss = dpo_loss(jnp.array([1e4, -1e4]), beta=1.0, label_smoothing=0.1)
    np.testing.assert_allclose(loss, [1e3, 9e3])


def test_smoothed_dpo_is_minimal_where_model_matches_label_noise():
    gradient = jax.grad(lambda m: dpo_loss(m, beta=1.0, label_smoothing=0.2))
    np.testing.assert_allclose(gradient(jnp.log(0.8 / 0.2)), 0.0, atol=1e-6)


def test_hinge():
    margins = np.random.default_rng(0).normal(scale=10, size=50)
    check(lambda m: hinge_loss(m, beta=0.1), lambda m: np.maximum(0, 1 - np.float64(np.float32(0.1)) * m), margins)


def test_bradley_terry():
    rejected = np.float32(0.7)
    chosen = np.random.default_rng(0).normal(scale=3, size=50)
    check(lambda r: bradley_terry_loss(r, rejected), lambda r: -np.log(sigmoid(r - np.float64(rejected))), chosen)


def test_bradley_terry_with_margin():
    rejected, margins = np.float32(0.7), np.array([0, 0.5, 3], np.float32)[:, None]
    chosen = np.random.default_rng(0).normal(scale=3, size=(3, 20))

    def reference(r):
        return -np.log(sigmoid(r - np.float64(rejected) - np.float64(margins)))

    check(lambda r: bradley_terry_loss(r, rejected, margins), reference, chosen)
    # A pair whose rewards are as far apart as its margin is at the middle of the sigmoid.
    gradient = jax.grad(bradley_terry_loss, argnums=(0, 1))(jnp.float32(3.7), jnp.float32(0.7), 3.0)
    np.testing.assert_allclose(gradient, (-0.5, 0.5), rtol=1e-6)


def test_kl_estimate():
    reference_log_p = np.float32(-1.3)
    log_p = np.random.default_rng(0).normal(loc=-1.5, size=50)

    def reference(lp):
        log_ratio = np.float64(reference_log_p) - lp
        return np.exp(log_ratio) - log_ratio - 1

    check(lambda lp: kl_estimate(lp, reference_log_p, estimator="k3"), reference, log_p)


def test_kl_estimate_is_zero_at_reference_and_positive_and_unbiased():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    estimates = np.asarray(kl_estimate(jnp.log(p), jnp.log(q), estimator="k3"), np.float64)
    assert (estimates > 0).all()
    np.testing.assert_allclose(p @ estimates, p @ np.log(p / q), rtol=1e-5)
    assert float(kl_estimate(jnp.float32(-2.0), jnp.float32(-2.0), estimator="k3")) == 0.0


@pytest.mark.parametrize("advantage", [0.8, -1.7])
def test_clipped_surrogate(advantage):
    log_ratio = np.random.default_rng(0).normal(scale=0.5, size=50)

    def reference(x):
        ratio, a = np.exp(x), np.float64(np.float32(advantage))
        return -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a)

    def ours(x):
        return clipped_surrogate(x, jnp.full_like(x, advantage), clip_low=0.2, clip_high=0.28)[0]

    check(ours, reference, log_ratio)


def test_clip_zeroes_gradient_beyond_bounds_in_direction_of_advantage():
    log_ratio = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1]])).T
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0]]).T

    def loss(x):
        return jnp.sum(clipped_surrogate(x, advantages, clip_low=0.2, clip_high=0.28)[0])

    _, is_clipped = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.28)
    assert is_clipped[:, 0].tolist() == [True, False, False, True, False]
    np.testing.assert_array_equal(jax.grad(loss)(log_ratio)[:, 0] == 0, is_clipped[:, 0])


@pytest.mark.parametrize("advantage", [0.8, -1.7])
def test_clipped_importance(advantage):
    """The gradient is that of log p times a constant weight."""
    log_p = np.random.default_rng(0).normal(loc=-1, scale=0.7, size=50)
    sampled = np.float32(-1.2)
    ratio = np.exp(np.asarray(np.float32(log_p), np.float64) - np.float64(sampled))
    weight, a = np.minimum(ratio, 1.28), np.float64(np.float32(advantage))

    def ours(x):
        return clipped_importance_loss(x, x - sampled, jnp.full_like(x, advantage), clip_low=1.0, clip_high=0.28)[0]

    check(ours, lambda x: -weight * a * x, log_p)
    log_p = jnp.float32(log_p)
    _, is_clipped = clipped_importance_loss(log_p, log_p - sampled, jnp.ones(50), clip_low=1.0, clip_high=0.28)
    np.testing.assert_array_equal(is_clipped, ratio > 1.28)


def test_leave_one_out_advantages():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    expected = [[row[n] - np.delete(row, n).mean() for n in range(4)] for row in rewards]
    np.testing.assert_allclose(leave_one_out_advantages(rewards), expected, rtol=1e-6)
    assert (leave_one_out_advantages(np.full((2, 3), 0.1)) == 0).all()


def test_group_advantages():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    centered = rewards - rewards.sum(axis=1, keepdims=True) / 4
    deviation = np.sqrt((centered**2).sum(axis=1, keepdims=True) / 3)
    np.testing.assert_allclose(group_advantages(rewards, normalize_std=True), centered / (deviation + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, normalize_std=False), centered, rtol=1e-6)


def test_group_with_equal_rewards_has_zero_advantages():
    rewards = np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]])
    assert has_signal(rewards).tolist() == [False, True]
    advantages = group_advantages(rewards, normalize_std=True)
    assert (advantages[0] == 0.0).all()
    np.testing.assert_allclose(advantages[1].sum(), 0.0, atol=1e-6)
    assert advantages[1].argmax() == 1
