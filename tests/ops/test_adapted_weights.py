"""Products with adapted weights, and their gradients, against the equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops.linear import AdaptedWeight, ScaledWeight, linear, whole

ROWS, INPUTS, OUTPUTS, RANK, SCALE = 5, 12, 9, 3, 1.7


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


X, W = draw(ROWS, INPUTS, seed=0), draw(INPUTS, OUTPUTS, seed=1)
DOWN, UP = draw(INPUTS, RANK, seed=2), 0.3 * draw(RANK, OUTPUTS, seed=3)
LENGTHS, OF_OUTPUTS, OF_INPUTS = draw(OUTPUTS, seed=4), draw(OUTPUTS, seed=5), draw(INPUTS, seed=6)
COTANGENT = draw(ROWS, OUTPUTS, seed=7)


def product_and_gradients(weight):
    """The product with X, the matrix as a whole, and the gradients for COTANGENT with respect to X and the weight."""
    weight = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weight)
    x, cotangent = jnp.asarray(X, jnp.float32), jnp.asarray(COTANGENT, jnp.float32)
    y, pull_back = jax.vjp(lambda x, weight: linear(x, weight, "float32"), x, weight)
    return y, whole(weight), pull_back(cotangent)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("magnitude", [None, LENGTHS], ids=["lora", "dora"])
def test_low_rank_updates(magnitude):
    merged = W + SCALE * DOWN @ UP
    # The length of the weights of each output is a constant in the gradient.
    ratio = np.ones(OUTPUTS) if magnitude is None else magnitude / np.sqrt((merged**2).sum(axis=0))
    y, matrix, (grad_x, grads) = product_and_gradients(AdaptedWeight(W, DOWN, UP, SCALE, magnitude))
    assert_close(y, X @ merged * ratio)
    assert_close(matrix, merged * ratio)
    scaled = COTANGENT * ratio
    assert_close(grad_x, scaled @ merged.T)
    assert_close(grads.down, SCALE * X.T @ scaled @ UP.T)
    assert_close(grads.up, SCALE * (X @ DOWN).T @ scaled)
    if magnitude is not None:
        assert_close(grads.magnitude, (COTANGENT * (X @ merged)).sum(axis=0) * ratio / magnitude)


def test_factors_of_outputs():
    y, matrix, (grad_x, grads) = product_and_gradients(ScaledWeight(W, OF_OUTPUTS, "output"))
    assert_close(y, X @ W * OF_OUTPUTS)
    assert_close(matrix, W * OF_OUTPUTS)
    assert_close(grad_x, (COTANGENT * OF_OUTPUTS) @ W.T)
    assert_close(grads.factor, (COTANGENT * (X @ W)).sum(axis=0))


def test_factors_of_inputs():
    y, matrix, (grad_x, grads) = product_and_gradients(ScaledWeight(W, OF_INPUTS, "input"))
    assert_close(y, X * OF_INPUTS @ W)
    assert_close(matrix, OF_INPUTS[:, None] * W)
    assert_close(grad_x, COTANGENT @ W.T * OF_INPUTS)
    assert_close(grads.factor, (X * (COTANGENT @ W.T)).sum(axis=0))
