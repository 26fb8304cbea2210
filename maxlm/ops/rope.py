"""Rotary position embedding (arXiv:2104.09864), in the half-split layout: channel i rotates with channel i + D/2."""

import jax
import jax.numpy as jnp


def rope_angles(positions_BL: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each float32 [batch, length, 1, head_dim / 2], of position * theta^(-2i / head_dim)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BL.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BLHD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair of channels of each head by its position's angle."""
    cos, sin = angles
    first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHD.dtype)
