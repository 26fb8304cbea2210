"""Dropout: rates, independence, and masks that are a function of their coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config.regularization import RegularizationConfig
from maxlm.layers.noise import Noise
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


# Attention weights


def kept(rate: float) -> np.ndarray:
    """Whether each weight is kept: [layers, rows, heads, queries, keys], normalized to mean 0 and variance 1."""
    num_layers, rows, heads, length = 3, 4, 6, 160
    columns_BL = jnp.broadcast_to(jnp.arange(length), (rows, length))
    noise = Noise(row_seeds(jax.random.key(0), rows), RegularizationConfig(attention_dropout=rate))
    noise = noise.in_model(columns_BL, None, (), num_layers)

    @jax.jit
    def of_layer(number):
        weights_BKGTS = jnp.ones((rows, 2, heads // 2, length, length))
        return noise.at_layer(number).attention_weights(heads).apply(weights_BKGTS)

    weights = np.stack([np.asarray(of_layer(number)) for number in range(num_layers)])
    np.testing.assert_allclose(weights[weights > 0], 1 / (1 - rate), rtol=1e-6)
    mask = weights.reshape(num_layers, rows, heads, length, length) > 0
    return (mask - (1 - rate)) / np.sqrt(rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_weights_are_dropped_at_the_rate_and_independently_along_every_axis(rate):
    x = kept(rate)
    assert abs(x.mean()) < 6 / np.sqrt(x.size)
    for axis in range(x.ndim):
        left, right = np.delete(x, -1, axis), np.delete(x, 0, axis)
        assert abs((left * right).mean()) < 6 / np.sqrt(left.size), "neighbors are correlated"
        means = x.mean(axis=tuple(other for other in range(x.ndim) if other != axis))
        spread = (means**2).mean() * x.size / x.shape[axis]
        assert abs(spread - 1) < 6 * np.sqrt(2 / len(means)), "means spread unlike those of independent draws"


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("of", ["queries", "keys"])
def test_weights_of_any_two_queries_and_any_two_keys_are_dropped_independently(of, rate):
    """Correlations of all pairs have the mean and the variance of independent draws: masks are made from seeds of
    queries and seeds of keys, so what two of either have in common would show here."""
    x = kept(rate)
    x = x.reshape(-1, x.shape[-1]) if of == "keys" else x[0, 0].swapaxes(0, -1).reshape(x.shape[-1], -1)
    products = x.T @ x / np.sqrt(len(x))
    z = products[np.triu_indices(len(products), 1)]
    assert abs(z.mean()) < 6 / np.sqrt(z.size)
    # The variance of all draws is not exactly 1, and enters twice.
    assert abs(z.var() / x.var() ** 2 - 1) < 6 * np.sqrt(2 / z.size)
    assert np.abs(z).max() < 7


def test_any_rate_below_one_is_allowed():
    assert (kept(1 - 2**-40) < 0).all()
