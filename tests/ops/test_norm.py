"""RMSNorm against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops.norm import rms_norm


def reference(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_values_and_gradients(epsilon):
    random = np.random.default_rng(0)
    x, scale, weights = random.standard_normal((3, 4, 8)), random.uniform(0.5, 2, 8), random.standard_normal((3, 4, 8))
    x[0, 0] = 0
    np.testing.assert_allclose(
        rms_norm(jnp.float32(x), jnp.float32(scale), epsilon), reference(x, scale, epsilon), rtol=2e-6, atol=1e-6
    )
    got = jax.grad(lambda x, s: jnp.sum(weights * rms_norm(x, s, epsilon)), argnums=(0, 1))(
        jnp.float32(x), jnp.float32(scale)
    )
    inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    grad_x = inverse * weights * scale - x * inverse**3 * (weights * scale * x).mean(-1, keepdims=True)
    np.testing.assert_allclose(got[0], grad_x, rtol=1e-4, atol=1e-4 if epsilon < 1e-3 else 1e-6)
    np.testing.assert_allclose(got[1], (weights * x * inverse).sum((0, 1)), rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_in_float32_and_keeps_dtype():
    """Squares of these values exceed the precision of 16 bits."""
    x = np.random.default_rng(0).standard_normal((2, 512)) * 100
    got = rms_norm(jnp.asarray(x, "bfloat16"), jnp.ones(512), 1e-6)
    assert got.dtype == jnp.bfloat16
    exact = reference(np.float64(jnp.asarray(x, "bfloat16")), np.ones(512), 1e-6)
    np.testing.assert_allclose(np.float64(got), exact, rtol=2**-8)
