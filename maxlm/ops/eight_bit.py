"""8-bit matrix products for training: operands are quantized on the fly, with a scale for each row and column.

| kind   | forward operands | operands of the gradient of the activations | accumulated in |
| ------ | ---------------- | ------------------------------------------- | -------------- |
| `int8` | int8, int8       | int8, int8                                  | int32, exactly |
| `fp8`  | e4m3, e4m3       | e5m2 (the cotangent), e4m3                  | float32        |

Gradients ignore the rounding (straight-through estimator, arXiv:1308.3432). The gradient of the weights is
not an 8-bit product: its rounding errors would accumulate over a run.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

KINDS = ("int8", "fp8")


@dataclass(frozen=True)
class Scaled:
    """values * scales, with 1 for the reduced axis in the shape of scales."""

    values: jax.Array
    scales: jax.Array


def activation_dtype(kind: str) -> jnp.dtype:
    """8-bit dtype of weights and activations."""
    return jnp.dtype(jnp.int8 if kind == "int8" else jnp.float8_e4m3fn)


def cotangent_dtype(kind: str) -> jnp.dtype:
    """8-bit dtype of cotangents, which need range more than precision."""
    return jnp.dtype(jnp.int8 if kind == "int8" else jnp.float8_e5m2)


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Accumulator dtype of products of two 8-bit operands."""
    return jnp.dtype(jnp.int32 if dtype == jnp.int8 else jnp.float32)


def scale_to(x: jax.Array, axis: int, dtype: jnp.dtype) -> Scaled:
    """Quantize x to 8 bits, one scale along `axis`: max |x| / largest value of the dtype; 1 if all are zero."""
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scales = jnp.where(peak > 0, peak / largest, 1.0)
    # Clipped because a subnormal scale is so coarse that x / scale may exceed the range of the dtype.
    values = jnp.clip(x / scales, -largest, largest)
    return Scaled((jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scales)
