"""int8 weights: symmetric, one scale for each output channel; activations are quantised on the fly, one scale a token."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclass(frozen=True)
class QTensor:
    """values [..., O, I] int8 and scales [..., O] float32; the weight is values * scales, laid out output-first."""

    values: jax.Array
    scales: jax.Array

    def dequantize(self) -> jax.Array:
        """The float32 weight, [..., O, I]."""
        return self.values.astype(jnp.float32) * self.scales[..., None]

    def rows(self, index: jax.Array) -> jax.Array:
        """Rows of an embedding table [vocab, embed]: float32 [..., embed]."""
        return self.values[index].astype(jnp.float32) * self.scales[index][..., None]

    def multiply(self, x: jax.Array) -> jax.Array:
        """x [..., I] times the weight, [..., O]: int8 operands, int32 sums (W8A8, dynamic per token)."""
        quantized = quantize(x)
        sums = jax.lax.dot_general(
            quantized.values,
            self.values,
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        return (sums.astype(jnp.float32) * quantized.scales[..., None] * self.scales).astype(x.dtype)


def quantize(x: jax.Array) -> QTensor:
    """Symmetric int8 along the last axis: scale = max |x| / 127, values = round(x / scale)."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127.0
    safe = jnp.where(scales > 0, scales, 1.0)
    return QTensor(jnp.round(x / safe[..., None]).astype(jnp.int8), scales)
