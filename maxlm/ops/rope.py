"""Rotary position embedding (arXiv:2104.09864), in the half-split layout: channel i rotates with channel i + R/2.

R channels of a head rotate: the first ones.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from maxlm.core.hardware import traced_platform


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per token of each pair of rotated channels, float64 [R / 2], and the factor on rotated queries and keys.

    theta^(-2i / R) for pair i of R rotated channels, then the scaling.
    """
    channels = rope.rotated_channels(head_dim)
    frequencies = rope.theta ** (-np.arange(0, channels, 2) / channels)
    match rope.scaling:
        case None if rope.half_frequencies:
            return frequencies.astype(np.float32).astype(np.float16).astype(np.float64), 1.0
        case None:
            return frequencies, 1.0
        case LinearScaling(factor=factor):
            return frequencies / factor, 1.0
        case Llama3Scaling() as scaling:
            turns = scaling.original_length * frequencies / (2 * np.pi)
            slowed = 1 - _ramp(turns, scaling.low_frequency_factor, scaling.high_frequency_factor)
            return frequencies * (1 - slowed + slowed / scaling.factor), 1.0
        case YarnScaling(factor=factor) as scaling:
            slowed = _ramp(np.arange(channels // 2), *_yarn_limits(scaling, rope.theta, channels))
            larger = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
            return frequencies * (1 - slowed + slowed / factor), scaling.attention_factor or larger
    raise AssertionError(rope.scaling)


def _frequencies_of_lengths(lengths: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, float]:
    """`rope_frequencies` of documents of these lengths: [..., 1] -> [..., R / 2]."""
    channels = rope.rotated_channels(head_dim)
    exponents = np.arange(0, channels, 2) / channels
    match rope.scaling:
        case DynamicScaling(factor=factor, original_length=original):
            stretch = factor * jnp.maximum(lengths, original).astype(jnp.float32) / original - (factor - 1)
            # theta * stretch^(R / (R - 2)) to the power of -2i / R.
            power = jnp.asarray(exponents * channels / (channels - 2), jnp.float32)
            return jnp.asarray(rope.theta**-exponents, jnp.float32) * stretch**-power, 1.0
        case LongRopeScaling() as scaling:
            plain = rope.theta**-exponents
            short, long = (
                jnp.asarray(plain / np.array(factors), jnp.float32)
                for factors in (scaling.short_factors, scaling.long_factors)
            )
            return jnp.where(lengths > scaling.original_length, long, short), scaling.attention_factor
    raise AssertionError(rope.scaling)


def _yarn_limits(scaling: YarnScaling, theta: float, channels: int) -> tuple[float, float]:
    """The pairs of channels that make `beta_fast` and `beta_slow` turns within the original length."""

    def pair(turns: float) -> float:
        return channels * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, channels - 1)


def _ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 up to `low`, 1 from `high`, and linear between."""
    return np.clip((x - low) / max(high - low, 0.001), 0, 1)


def rope_angles(
    positions_BL: jax.Array,
    rope: RopeConfig,
    head_dim: int,
    lengths_BL: jax.Array | None = None,
    prefix_lengths_BL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles by which pairs of channels rotate, each float32 [batch, length, 1, R / 2].

    Both are multiplied by the factor on rotated queries and keys. If they are two-dimensional, the first R / 4 pairs
    rotate by the first position, the others by the second.

    Args:
      lengths_BL: of the document of each token, for settings that depend on it.
      prefix_lengths_BL: of the document of each token, for two-dimensional positions; None: there are no prefixes.
    """
    if rope.two_dimensional:
        flat = rope.model_copy(update={"two_dimensional": False, "share": rope.share / 2})
        prefix_BL = jnp.zeros_like(positions_BL) if prefix_lengths_BL is None else prefix_lengths_BL
        within_BL = jnp.minimum(positions_BL, jnp.maximum(prefix_BL - 1, 0))
        after_BL = jnp.maximum(positions_BL - prefix_BL + 1, 0)
        halves = (rope_angles(each_BL, flat, head_dim) for each_BL in (within_BL, after_BL))
        cos, sin = (jnp.concatenate(pair, axis=-1) for pair in zip(*halves))
        return cos, sin
    if rope.depends_on_length:
        frequencies, factor = _frequencies_of_lengths(lengths_BL[..., None, None], rope, head_dim)
    else:
        constant, factor = rope_frequencies(rope, head_dim)
        frequencies = jnp.asarray(constant, jnp.float32)
    angles = positions_BL.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1 else (factor * cos, factor * sin)


def apply_rope(x_BLHD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair of the first channels of each head by its position's angle; others are unchanged."""
    cos, sin = angles
    if traced_platform() == "tpu" and x_BLHD.dtype == jnp.bfloat16:
        return _rotate_by_product(x_BLHD, cos, sin, 1)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BLHD.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x_BLHD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate_by_product(x_BLHD, cos, sin, direction):
    """The same bits for bfloat16, without splitting the lanes of a TPU's registers.

    The partner of each channel, with its sign, is a product with a matrix of 0, 1 and -1, which is exact. Half a head
    is 64 of 128 lanes: to split and join halves takes longer than this product. The gradient is the rotation by the
    opposite angle: `direction` is 1 or -1.
    """
    half, head_dim = cos.shape[-1], x_BLHD.shape[-1]
    partners = np.zeros((head_dim, head_dim), np.float32)
    partners[np.arange(half) + half, np.arange(half)] = -direction
    partners[np.arange(half), np.arange(half) + half] = direction
    partner_BLHD = jax.lax.dot_general(
        x_BLHD,
        jnp.asarray(partners, x_BLHD.dtype),
        (((x_BLHD.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    # Channels that do not rotate: by an angle of 0.
    rest = [(0, 0)] * (cos.ndim - 1) + [(0, head_dim - 2 * half)]
    whole_cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), rest, constant_values=1)
    whole_sin = jnp.pad(jnp.concatenate([sin, sin], axis=-1), rest)
    return (x_BLHD.astype(jnp.float32) * whole_cos + partner_BLHD * whole_sin).astype(x_BLHD.dtype)


def _forward(x_BLHD, cos, sin, direction):
    return _rotate_by_product(x_BLHD, cos, sin, direction), (cos, sin)


def _backward(direction, angles, grad_BLHD):
    return _rotate_by_product(grad_BLHD, *angles, -direction), None, None


_rotate_by_product.defvjp(_forward, _backward)
