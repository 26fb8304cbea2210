"""int8 weights: symmetric, one scale for each output channel; activations are quantised on the fly, one scale a token.

Dimensions: I input features, O output features; `...` leading batch dimensions.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

# Symmetric: -128 is left out, so that a value and its negative are both there.
MAX_VALUE = 127


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclass(frozen=True)
class QTensor:
    """values [..., O, I] int8 and scales [..., O] float32; the weight is values * scales, laid out output-first.

    For inference: the rounding of activations has no useful gradient.
    """

    values: jax.Array
    scales: jax.Array

    def dequantize(self) -> jax.Array:
        """The float32 weight, [..., O, I]."""
        return self.values.astype(jnp.float32) * self.scales[..., None]

    def rows(self, index: jax.Array) -> jax.Array:
        """Rows of an embedding table [vocab, embed]: float32 [..., embed]."""
        return self.values[index].astype(jnp.float32) * self.scales[index][..., None]

    def multiply(self, x: jax.Array) -> jax.Array:
        """x [..., I] times the weight [O, I], as [..., O] in the dtype of x.

        W8A8: each token of x gets a scale of its own; products of int8 are summed exactly in int32 (which holds
        sums over more than 130,000 features) and scaled once, in float32.
        """
        quantized = quantize(x)
        sums = _integer_product(quantized.values, self.values)
        return (sums.astype(jnp.float32) * quantized.scales[..., None] * self.scales).astype(x.dtype)


def quantize(x: jax.Array) -> QTensor:
    """Symmetric int8 along the last axis: scale = max |x| / 127, values = round(x / scale); zeros have scale 0."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / MAX_VALUE
    divisors = jnp.where(scales > 0, scales, 1.0)[..., None]
    # Clipped because a subnormal scale is so coarse that x / scale may exceed what int8 holds.
    values = jnp.clip(jnp.round(x / divisors), -MAX_VALUE, MAX_VALUE)
    return QTensor(values.astype(jnp.int8), scales)


def _integer_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """int8 x [..., I] times int8 weight [O, I]: int32 [..., O]."""
    if x.size == x.shape[-1]:
        # XLA's CPU backend may turn a product with one row into a matrix-vector loop that is up to ten times slower.
        return _integer_product(jnp.concatenate([x.reshape(1, -1)] * 2), weight)[0].reshape(*x.shape[:-1], -1)
    contracted = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contracted, preferred_element_type=jnp.int32)
