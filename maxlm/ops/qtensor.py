"""int8 weights: symmetric, one scale per output channel; activations are split into two int8 digits on the fly.

Dimensions: I input features, O output features; `...` leading batch dimensions.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

# Symmetric: -128 is unused, so that the negative of every value exists.
MAX_VALUE = 127
# Low-digit steps per high-digit step. A power of two, by which division is exact: the result does not
# depend on how a compiler fuses products and sums.
BASE = 256


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclass(frozen=True)
class QTensor:
    """values [..., O, I] int8 and scales [..., O] float32; the weight is values * scales, output-first.

    For inference only: the rounding of activations has no useful gradient.
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

        W8A16: both digits of x are rows of one int8 product, with exact sums in int32 (for up to 130,000
        features). They are combined and scaled in float32.
        """
        digits = split(x)
        # [2, ..., O]. One token makes two rows: XLA's CPU backend may turn a product with a single row into a
        # matrix-vector loop that is up to ten times slower.
        contracted = (((digits.values.ndim - 1,), (self.values.ndim - 1,)), ((), ()))
        sums = jax.lax.dot_general(digits.values, self.values, contracted, preferred_element_type=jnp.int32)
        high, low = sums.astype(jnp.float32)
        return ((high + low / BASE) * digits.scales[..., None] * self.scales).astype(x.dtype)


@dataclass(frozen=True)
class Digits:
    """x [..., I] is (values[0] + values[1] / BASE) * scales: values int8 [2, ..., I], scales float32 [...]."""

    values: jax.Array
    scales: jax.Array


def quantize(x: jax.Array) -> QTensor:
    """Quantize to symmetric int8 along the last axis: scale = max |x| / 127, values = round(x / scale); 0 for zeros."""
    scaled, scales = _to_range(x)
    return QTensor(_to_int8(scaled), scales)


def split(x: jax.Array) -> Digits:
    """Split x into two digits: the first rounded as in `quantize`, the second its remainder.

    The error is at most half a low step, max |x| / 65,024; twice that if the remainder is half a high step, which is
    one low step more than int8 holds.
    """
    scaled, scales = _to_range(x)
    high = _to_int8(scaled)
    low = _to_int8((scaled - high.astype(jnp.float32)) * BASE)
    return Digits(jnp.stack([high, low]), scales)


def _to_range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x scaled so that the largest magnitude along the last axis is 127, and the scales."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / MAX_VALUE
    return x / jnp.where(scales > 0, scales, 1.0)[..., None], scales


def _to_int8(scaled: jax.Array) -> jax.Array:
    # Clipped because a subnormal scale is so coarse that x / scale may exceed the range of int8.
    return jnp.clip(jnp.round(scaled), -MAX_VALUE, MAX_VALUE).astype(jnp.int8)
