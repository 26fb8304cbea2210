"""Normalization."""

import jax
import jax.numpy as jnp

from maxlm.ops.qtensor import QTensor

# Of the squares of a row: below it, the row is taken for zeros.
_LEAST_SQUARE = 1e-24


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32, as the dtype of x (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """(x - mean(x)) / std(x) * scale + bias over the last axis, in float32, as the dtype of x (arXiv:1607.06450)."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + epsilon)
    y = centered * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def with_unit_rows(table: jax.Array | QTensor) -> jax.Array | QTensor:
    """A table [rows, channels] with each row divided by its L2 norm, in float32; rows of zeros stay zeros."""
    if isinstance(table, QTensor):
        # The scale of a row cancels.
        return QTensor(table.values, _inverse_norms(table.values.astype(jnp.float32)))
    table = table.astype(jnp.float32)
    return table * _inverse_norms(table)[:, None]


def _inverse_norms(table: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(table), axis=-1), _LEAST_SQUARE))
