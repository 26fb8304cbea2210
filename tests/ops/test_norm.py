"""RMSNorm against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops.norm import rms_norm, with_unit_rows
from maxlm.ops.qtensor import QTensor, quantize


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


def test_rows_of_a_table_get_unit_norms():
    """Also quantized ones, by their scales; rows of zeros stay zeros, and have finite gradients."""
    table = np.random.default_rng(0).standard_normal((5, 8)).astype("float32")
    table[2] = 0
    expected = table / np.maximum(np.linalg.norm(table.astype("float64"), axis=-1, keepdims=True), 1e-9)
    np.testing.assert_allclose(with_unit_rows(jnp.asarray(table)), expected, rtol=1e-6)
    quantized = with_unit_rows(quantize(jnp.asarray(table)))
    assert isinstance(quantized, QTensor)
    np.testing.assert_allclose(quantized.dequantize(), expected, atol=0.01)
    cotangent = np.random.default_rng(1).standard_normal((5, 8)).astype("float32")
    gradient = jax.grad(lambda table: jnp.sum(cotangent * with_unit_rows(table)))(jnp.asarray(table))
    assert np.isfinite(gradient).all()
    # Moving a row along itself changes nothing.
    np.testing.assert_allclose(np.sum(gradient * table, axis=-1), 0, atol=1e-5)
