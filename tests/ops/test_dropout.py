"""Dropout: rates, independence, and masks that are a function of their coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops.dropout import drop, hashed, row_seeds


def bits(rows=64, columns=64, channels=32, seed=0):
    seeds_B = row_seeds(jax.random.key(seed), rows)
    tokens_BL = hashed(seeds_B[:, None], jnp.arange(columns))
    return hashed(tokens_BL[..., None], jnp.arange(channels))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_of_zeros_is_the_rate_and_the_mean_is_kept(rate):
    x = jnp.ones((64, 64, 32))
    dropped = np.asarray(drop(x, rate, bits()))
    # Six standard deviations of a share of 131,072 draws.
    assert abs((dropped == 0).mean() - rate) < 6 * np.sqrt(rate * (1 - rate) / dropped.size)
    np.testing.assert_allclose(dropped[dropped > 0], 1 / (1 - rate), rtol=1e-6)


def test_bits_look_independent_along_every_axis():
    """Correlation of neighbors, and of each bit with the parity of its coordinates."""
    x = np.asarray(bits()).astype(np.float64) / 2**32 - 0.5
    for axis in range(3):
        left, right = np.delete(x, -1, axis), np.delete(x, 0, axis)
        assert abs((left * right).mean() / x.var()) < 6 / np.sqrt(left.size)
    raw = np.asarray(bits())
    for bit in range(32):
        share = ((raw >> bit) & 1).mean()
        assert abs(share - 0.5) < 6 * 0.5 / np.sqrt(raw.size), bit


def test_means_over_each_axis_spread_like_independent_draws():
    """The chi-squared of each axis's means is within six standard deviations of that of independent draws."""
    x = (np.asarray(bits()).astype(np.float64) / 2**32 - 0.5) * np.sqrt(12)
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        means = x.mean(axis=others)
        scaled = means**2 * (x.size / x.shape[axis])
        assert abs(scaled.mean() - 1) < 6 * np.sqrt(2 / len(means))


def test_seeds_differ_between_rows_and_keys():
    first, second = (np.asarray(row_seeds(jax.random.key(seed), 1000)) for seed in (0, 1))
    assert len(np.unique(first)) == 1000
    assert not np.intersect1d(first, second).size


def test_gradient_is_the_mask():
    x = jnp.ones((8, 8, 4))
    gradient = jax.grad(lambda x: jnp.sum(drop(x, 0.5, bits(8, 8, 4))))(x)
    np.testing.assert_array_equal(gradient, drop(x, 0.5, bits(8, 8, 4)))
