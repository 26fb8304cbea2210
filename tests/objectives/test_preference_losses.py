"""Losses of preferences and their gradients against their equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter

from maxlm.objectives.pair_losses import Answers, AnyPairLoss
from maxlm.ops.preference_losses import dpo_loss, kto_loss

PAIRS, DELTA = 6, 1e-6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def nll(z, s=0.0):
    """The logistic loss with label smoothing."""
    return -(1 - s) * np.log(sigmoid(z)) - s * np.log(sigmoid(-z))


def log_odds(log_p):
    return np.log(np.exp(log_p) / (1 - np.exp(log_p)))


def exo(z, s=0.2):
    p, q = np.array([[1 - s], [s]]), np.stack([sigmoid(z), sigmoid(-z)])
    return np.sum(q * np.log(q / p), axis=0)


def discopop(z):
    w = sigmoid(z / 0.05)
    return (1 - w) * nll(z) + w * np.exp(-z)


# Settings, and the loss of pairs as a function of log p, log p_ref and the length of each answer.
LOSSES = {
    "dpo": ({}, lambda c, r, cr, rr, m, n: nll(0.1 * ((c - cr) - (r - rr)))),
    "dpo, smoothed": (
        {"label_smoothing": 0.2, "beta": 0.5},
        lambda c, r, cr, rr, m, n: nll(0.5 * ((c - cr) - (r - rr)), 0.2),
    ),
    "dpo, per token": ({"per_token": True}, lambda c, r, cr, rr, m, n: nll(0.1 * ((c - cr) / m - (r - rr) / n))),
    "dpo, reference free": ({"reference_free": True}, lambda c, r, cr, rr, m, n: nll(0.1 * (c - r))),
    "dpo, forward KL": (
        {"divergence": "alpha"},
        lambda c, r, cr, rr, m, n: nll(0.1 * (np.exp(rr - r) - np.exp(cr - c))),
    ),
    "dpo, alpha": (
        {"divergence": "alpha", "alpha": 0.25},
        lambda c, r, cr, rr, m, n: nll(0.1 * 4 * (np.exp((rr - r) / 4) - np.exp((cr - c) / 4))),
    ),
    "dpo, alpha 0 is the reverse KL": (
        {"divergence": "alpha", "alpha": 0.0},
        lambda c, r, cr, rr, m, n: nll(0.1 * ((c - cr) - (r - rr))),
    ),
    "dpo, Jensen-Shannon": (
        {"divergence": "jensen_shannon"},
        lambda c, r, cr, rr, m, n: nll(0.1 * np.log(sigmoid(c - cr) / sigmoid(r - rr))),
    ),
    "robust": (
        {"label_smoothing": 0.2},
        lambda c, r, cr, rr, m, n: (
            (0.8 * nll(0.1 * ((c - cr) - (r - rr))) - 0.2 * nll(-0.1 * ((c - cr) - (r - rr)))) / 0.6
        ),
    ),
    "hinge": ({}, lambda c, r, cr, rr, m, n: np.maximum(0, 1 - 0.1 * ((c - cr) - (r - rr)))),
    "ipo": ({}, lambda c, r, cr, rr, m, n: ((c - cr) - (r - rr) - 5) ** 2),
    "ipo, per token": ({"per_token": True}, lambda c, r, cr, rr, m, n: ((c - cr) / m - (r - rr) / n - 5) ** 2),
    "exo": ({"label_smoothing": 0.2}, lambda c, r, cr, rr, m, n: exo(0.1 * ((c - cr) - (r - rr)))),
    "discopop": ({}, lambda c, r, cr, rr, m, n: discopop(0.1 * ((c - cr) - (r - rr)))),
    "nca": (
        {},
        lambda c, r, cr, rr, m, n: nll(0.1 * (c - cr)) + 0.5 * nll(-0.1 * (c - cr)) + 0.5 * nll(-0.1 * (r - rr)),
    ),
    "bco": ({}, lambda c, r, cr, rr, m, n: nll(0.1 * (c - cr)) + nll(-0.1 * (r - rr))),
    "sppo": ({}, lambda c, r, cr, rr, m, n: (c - cr - 5) ** 2 + (r - rr + 5) ** 2),
    "apo": ({}, lambda c, r, cr, rr, m, n: 1 - sigmoid(0.1 * (c - cr)) + sigmoid(0.1 * (r - rr))),
    "apo, worse": (
        {"chosen": "worse"},
        lambda c, r, cr, rr, m, n: sigmoid(0.1 * (c - cr)) + 1 - sigmoid(0.1 * ((c - cr) - (r - rr))),
    ),
    "simpo": ({}, lambda c, r, cr, rr, m, n: nll(2 * (c / m - r / n) - 1)),
    "cpo": ({}, lambda c, r, cr, rr, m, n: nll(0.1 * (c - r))),
    "orpo": ({}, lambda c, r, cr, rr, m, n: 0.1 * nll(log_odds(c / m) - log_odds(r / n))),
}


def loss_of(name, settings):
    return TypeAdapter(AnyPairLoss).validate_python({"kind": name.partition(",")[0], **settings})


@pytest.fixture(scope="module")
def pairs():
    """log p and log p_ref of chosen and rejected answers, and their lengths; answers differ in length."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 9, (2, PAIRS)).astype(np.float64)
    log_p = -lengths * random.uniform(0.3, 2.0, (2, PAIRS))
    return [np.float64(np.float32(x)) for x in (*log_p, *(log_p + random.normal(0, 3, (2, PAIRS))), *lengths)]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, pairs):
    settings, reference = LOSSES[name]
    loss = loss_of(name, settings)
    chosen, rejected, *rest = pairs
    chosen_reference, rejected_reference, chosen_length, rejected_length = (jnp.float32(x) for x in rest)
    if not loss.needs_reference:
        chosen_reference, rejected_reference = 0.0, 0.0

    def ours(chosen, rejected):
        return loss(
            Answers(chosen, chosen_reference, chosen_length), Answers(rejected, rejected_reference, rejected_length), {}
        )

    np.testing.assert_allclose(
        ours(jnp.float32(chosen), jnp.float32(rejected)), reference(*pairs), rtol=2e-6, atol=2e-6
    )
    gradients = jax.grad(lambda *x: jnp.sum(ours(*x)), argnums=(0, 1))(jnp.float32(chosen), jnp.float32(rejected))
    for argument, gradient in enumerate(gradients):
        moved = [[x + sign * DELTA * (index == argument) for index, x in enumerate(pairs)] for sign in (1, -1)]
        expected = (reference(*moved[0]) - reference(*moved[1])) / (2 * DELTA)
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_finite_far_from_the_reference(name):
    loss = loss_of(name, LOSSES[name][0])
    far, zero = jnp.array([-300.0, 0.0, -1e-3]), jnp.zeros(3)
    reference = far[::-1] if loss.needs_reference else 0.0

    def total(chosen):
        return jnp.sum(loss(Answers(chosen, reference, zero + 3), Answers(far[::-1], reference, zero), {}))

    value, gradient = jax.value_and_grad(total)(far)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("paired", [True, False])
def test_optimal_transport_compares_sorted_values_of_the_whole_batch(paired, pairs):
    """The loss of sorted values, and its gradient; padding has no part in it."""
    loss = loss_of("aot", {"paired": paired, "label_smoothing": 0.1})
    chosen, rejected, chosen_reference, rejected_reference, _, _ = (jnp.float32(x) for x in pairs)
    real_B = jnp.float32([1, 1, 0, 1, 1, 1])
    kept = np.flatnonzero(real_B)

    def answers(chosen, rejected):
        return Answers(chosen, chosen_reference, 1.0), Answers(rejected, rejected_reference, 1.0)

    matched = loss.match(*answers(chosen, rejected), real_B)
    assert sorted(matched) == sorted(loss.names_of_matches)

    def ours(chosen, rejected):
        return jnp.sum(real_B * loss(*answers(chosen, rejected), matched))

    def expected(chosen, rejected):
        gains = chosen - chosen_reference, rejected - rejected_reference
        both = (chosen - rejected, chosen_reference - rejected_reference) if paired else gains
        left, right = (jnp.sort(x[kept]) for x in both)
        return jnp.sum(dpo_loss(left - right, beta=0.1, label_smoothing=0.1))

    values = [jax.value_and_grad(function, argnums=(0, 1))(chosen, rejected) for function in (ours, expected)]
    for left, right in zip(*(jax.tree.leaves(value) for value in values)):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


def test_kto(pairs):
    log_p, _, reference, *_ = pairs
    good = np.array([1, 0, 0, 1, 1, 0], np.float64)
    baseline = np.float64(np.float32(0.7))

    def expected(log_p):
        gain = log_p - reference
        return np.where(good > 0, 1 - sigmoid(0.3 * (gain - baseline)), 1 - sigmoid(0.3 * (baseline - gain)))

    def ours(log_p):
        return kto_loss(log_p - jnp.float32(reference), jnp.float32(good), jnp.float32(baseline), beta=0.3)

    np.testing.assert_allclose(ours(jnp.float32(log_p)), expected(log_p), rtol=2e-6)
    gradient = jax.grad(lambda x: jnp.sum(ours(x)))(jnp.float32(log_p))
    np.testing.assert_allclose(gradient, (expected(log_p + DELTA) - expected(log_p - DELTA)) / (2 * DELTA), rtol=2e-5)
