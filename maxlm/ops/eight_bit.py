"""Matrix products of 8-bit operands for training: rounded on the fly, each row and column with a scale of its own.

| kind   | forward operands | operands of the gradient of the activations | accumulated in |
| ------ | ---------------- | ------------------------------------------- | -------------- |
| `int8` | int8, int8       | int8, int8                                  | int32, exactly |
| `fp8`  | e4m3, e4m3       | e5m2 (the cotangent), e4m3                  | float32        |

Gradients pass the rounding as if it were not there (straight-through, arXiv:1308.3432). The gradient of the weights is
not a product of 8-bit operands: its rounding errors would add up over a whole run.
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
    """Of weights and activations."""
    return jnp.dtype(jnp.int8 if kind == "int8" else jnp.float8_e4m3fn)


def cotangent_dtype(kind: str) -> jnp.dtype:
    """Of cotangents, which need range more than precision."""
    return jnp.dtype(jnp.int8 if kind == "int8" else jnp.float8_e5m2)


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What products of two 8-bit operands are summed in."""
    return jnp.dtype(jnp.int32 if dtype == jnp.int8 else jnp.float32)


def scale_to(x: jax.Array, axis: int, dtype: jnp.dtype) -> Scaled:
    """x in 8 bits, one scale along `axis`: scale = max |x| / largest value of the dtype; zeros keep scale 1."""
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scales = jnp.where(peak > 0, peak / largest, 1.0)
    # Clipped because a subnormal scale is so coarse that x / scale may exceed what the dtype holds.
    values = jnp.clip(x / scales, -largest, largest)
    return Scaled((jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scales)
