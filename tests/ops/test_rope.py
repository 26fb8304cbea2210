"""RoPE against rotations of complex numbers, and its properties as a position embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config.rope import RopeConfig
from maxlm.ops import rope
from maxlm.ops.rope import apply_rope, rope_angles


def rotate(x, positions, theta=10_000.0):
    return np.asarray(
        apply_rope(jnp.asarray(x, "float32"), rope_angles(jnp.asarray(positions), RopeConfig(theta=theta), x.shape[-1]))
    )


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_channel_pairs_rotate_like_complex_numbers(theta):
    random = np.random.default_rng(0)
    x, positions = random.standard_normal((2, 5, 3, 8)), random.integers(0, 300, (2, 5))
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * theta ** (-2.0 * np.arange(4) / 8))
    np.testing.assert_allclose(rotate(x, positions, theta), np.concatenate([z.real, z.imag], -1), rtol=1e-4, atol=1e-4)


def test_dot_products_depend_only_on_distance():
    random = np.random.default_rng(0)
    query, key = random.standard_normal((2, 1, 1, 1, 16))
    products = [(rotate(query, [[40 + shift]]) * rotate(key, [[33 + shift]])).sum() for shift in (0, 5, 1000)]
    np.testing.assert_allclose(products, products[0], rtol=2e-3)
    assert abs((rotate(query, [[40]]) * rotate(key, [[34]])).sum() - products[0]) > 0.01


def test_large_positions_keep_precision():
    """Angles are float32 for any dtype of the activations."""
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 8))
    angles = rope_angles(jnp.asarray([[4001]]), RopeConfig(), 8)
    got = apply_rope(jnp.asarray(x, "bfloat16"), angles)
    assert got.dtype == jnp.bfloat16
    assert angles[0].dtype == jnp.float32
    np.testing.assert_allclose(np.float32(got), rotate(x, [[4001]]), atol=0.03)


def test_gradient_is_rotated_back():
    random = np.random.default_rng(0)
    x, grad = random.standard_normal((2, 1, 6, 2, 8))
    positions = np.arange(6)[None]
    _, pull = jax.vjp(lambda x: apply_rope(x, rope_angles(positions, RopeConfig(), 8)), jnp.float32(x)[None])
    np.testing.assert_allclose(
        pull(jnp.float32(grad)[None])[0][0], rotate(grad[None], -positions)[0], rtol=1e-4, atol=1e-5
    )


def rotate_on_a_tpu(x, angles, monkeypatch):
    monkeypatch.setattr(rope, "traced_platform", lambda: "tpu")
    result = apply_rope(x, angles)
    monkeypatch.undo()
    return result


@pytest.mark.parametrize(("head_dim", "share"), [(8, 1.0), (64, 1.0), (128, 1.0), (64, 0.25)])
def test_product_of_a_tpu_has_the_same_bits(head_dim, share, monkeypatch):
    random = np.random.default_rng(0)
    x, grad = jnp.asarray(random.standard_normal((2, 3, 50, 4, head_dim)), "bfloat16")
    angles = rope_angles(jnp.asarray(random.integers(0, 9000, (3, 50))), RopeConfig(share=share), head_dim)
    # Without jit: a CPU's fused multiply-add would round the two formulas differently.
    plain, pull = jax.vjp(lambda x: apply_rope(x, angles), x)
    product, pull_product = jax.vjp(lambda x: rotate_on_a_tpu(x, angles, monkeypatch), x)
    np.testing.assert_array_equal(product, plain)
    np.testing.assert_array_equal(pull_product(grad)[0], pull(grad)[0])

    cos, sin = (np.asarray(part, np.float64) for part in angles)
    for value, got, sign in ((x, product, 1), (grad, pull_product(grad)[0], -1)):
        half = cos.shape[-1]
        first, second, rest = np.split(np.asarray(value, np.float64), (half, 2 * half), axis=-1)
        exact = np.concatenate([first * cos - sign * second * sin, second * cos + sign * first * sin, rest], axis=-1)
        # Half a unit in the last place of bfloat16, and the rounding of the float32 sum.
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2.0**-8 * 1.001, atol=1e-6)
