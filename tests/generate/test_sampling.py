"""Sampling against an independent sort-based reference and against frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.generate.sampling import log_probabilities_of, sample, scale, truncate


def reference_distribution(logits, temperature, top_k, top_p):
    """float64, by sorting: temperature, top-k, then top-p over the rest."""
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or len(order)]
    probabilities = np.exp(scaled[kept] - scaled[kept].max())
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    count = len(kept) if top_p >= 1 else max(1, int(np.sum(before < top_p)))
    result = np.zeros(len(scaled))
    result[kept[:count]] = probabilities[:count] / probabilities[:count].sum()
    return result


SETTINGS = [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (2.0, 5, 1.0),
    (1.0, 1, 1.0),
    (1.0, 0, 0.5),
    (0.7, 0, 0.9),
    (1.3, 10, 0.8),
    (1.0, 1000, 0.3),
    (1.0, 0, 1e-12),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("vocab_size", [7, 257])
def test_truncated_distribution_matches_the_sorted_reference(temperature, top_k, top_p, vocab_size):
    logits = np.random.default_rng(vocab_size).normal(0, 3, (4, vocab_size)).astype(np.float32)
    rows = len(logits)
    kept = truncate(
        scale(jnp.asarray(logits), jnp.full(rows, temperature)),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
    )
    expected = np.stack([reference_distribution(row, temperature, top_k, top_p) for row in logits])
    np.testing.assert_allclose(jax.nn.softmax(kept), expected, atol=1e-6)
    np.testing.assert_array_equal(np.isfinite(kept), expected > 0)


def test_rows_of_a_batch_have_their_own_settings():
    logits = np.random.default_rng(3).normal(0, 2, (len(SETTINGS), 50)).astype(np.float32)
    temperature, top_k, top_p = (np.asarray(column) for column in zip(*SETTINGS))
    kept = truncate(
        scale(jnp.asarray(logits), jnp.asarray(temperature, jnp.float32)),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
    )
    expected = np.stack([reference_distribution(row, *setting) for row, setting in zip(logits, SETTINGS)])
    np.testing.assert_allclose(jax.nn.softmax(kept), expected, atol=1e-6)


def test_ties_with_the_last_token_kept_are_kept():
    kept = truncate(jnp.asarray([[1.0, 0.0, 0.0, -1.0]]), jnp.asarray([2]), jnp.asarray([1.0]))
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, True, False]])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.8), (1.5, 3, 1.0)])
def test_frequencies_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square over 20,000 draws; the bound is the 99.99% quantile for at most 7 degrees of freedom."""
    logits = np.asarray([1.2, 0.3, -0.5, 2.0, 0.0, -3.0, 1.9, 0.1], np.float32)
    draws = 20_000
    tokens = sample(
        jnp.broadcast_to(jnp.asarray(logits), (draws, 8)),
        jax.random.split(jax.random.key(11), draws),
        temperature_B=jnp.full(draws, temperature),
        top_k_B=jnp.full(draws, top_k, jnp.int32),
        top_p_B=jnp.full(draws, top_p),
    )
    expected = draws * reference_distribution(logits, temperature, top_k, top_p)
    observed = np.bincount(np.asarray(tokens), minlength=8)
    assert np.all(observed[expected == 0] == 0)
    allowed = expected > 0
    assert np.sum((observed[allowed] - expected[allowed]) ** 2 / expected[allowed]) < 29.9


def test_zero_temperature_or_top_p_is_greedy_next_to_sampled_rows():
    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    logits[2, [7, 9]] = 5  # the first of two ties
    temperature = jnp.asarray([0, 1, 5, 5, 0, 5], jnp.float32)
    tokens = sample(
        jnp.asarray(logits),
        jax.random.split(jax.random.key(0), 6),
        temperature_B=temperature,
        top_k_B=jnp.zeros(6, jnp.int32),
        top_p_B=jnp.asarray([1, 1, 0, 1, 0, 1], jnp.float32),
    )
    np.testing.assert_array_equal(np.asarray(tokens)[::2], logits.argmax(-1)[::2])


def test_rows_are_independent():
    """The same logits, key and settings give the same token alone and next to rows without truncation."""
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(8, 300)).astype(np.float32))
    keys = jax.random.split(jax.random.key(2), 8)
    settings = {
        "temperature_B": jnp.asarray([0.0, 1.0, 0.8, 1.0, 2.0, 0.0, 1.0, 0.5]),
        "top_k_B": jnp.asarray([0, 0, 20, 3, 0, 0, 0, 7], jnp.int32),
        "top_p_B": jnp.asarray([1.0, 1.0, 0.9, 1.0, 0.5, 1.0, 0.7, 1.0]),
    }
    together = sample(logits, keys, **settings)
    for row in range(8):
        alone = sample(
            logits[row : row + 1], keys[row : row + 1], **{name: a[row : row + 1] for name, a in settings.items()}
        )
        assert int(alone[0]) == int(together[row])


@pytest.mark.parametrize("temperature", [1e-40, 1e-12, 1e-3])
def test_tiny_temperature_stays_finite(temperature):
    logits = jnp.asarray([[100.0, 101.0, -50.0]])
    tokens = sample(
        logits,
        jax.random.key(0)[None],
        temperature_B=jnp.asarray([temperature]),
        top_k_B=jnp.asarray([0]),
        top_p_B=jnp.asarray([0.5]),
    )
    assert int(tokens[0]) == 1


def test_token_log_probabilities_match_log_softmax():
    logits = np.random.default_rng(1).normal(0, 4, (5, 30))
    tokens = np.asarray([0, 29, 3, 7, 7])
    expected = logits[np.arange(5), tokens] - np.log(np.exp(logits).sum(-1))
    result = log_probabilities_of(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens))
    np.testing.assert_allclose(result, expected, atol=1e-5)
