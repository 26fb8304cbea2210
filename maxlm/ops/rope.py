"""Rotary position embedding (arXiv:2104.09864), in the half-split layout: channel i rotates with channel i + D/2."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.hardware import traced_platform


def rope_angles(positions_BL: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each float32 [batch, length, 1, head_dim / 2], of position * theta^(-2i / head_dim)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BL.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BLHD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair of channels of each head by its position's angle."""
    cos, sin = angles
    if traced_platform() == "tpu" and x_BLHD.dtype == jnp.bfloat16:
        return _rotate_by_product(x_BLHD, cos, sin, 1)
    first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate_by_product(x_BLHD, cos, sin, direction):
    """The same bits for bfloat16, without splitting the lanes of a TPU's registers.

    The partner of each channel, with its sign, is a product with a matrix of 0, 1 and -1, which is exact. Half a head
    is 64 of 128 lanes: to split and join halves takes longer than this product. The gradient is the rotation by the
    opposite angle: `direction` is 1 or -1.
    """
    half = x_BLHD.shape[-1] // 2
    partners = np.zeros((2 * half, 2 * half), np.float32)
    partners[np.arange(half) + half, np.arange(half)] = -direction
    partners[np.arange(half), np.arange(half) + half] = direction
    partner_BLHD = jax.lax.dot_general(
        x_BLHD,
        jnp.asarray(partners, x_BLHD.dtype),
        (((x_BLHD.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    whole_cos, whole_sin = (jnp.concatenate([part, part], axis=-1) for part in (cos, sin))
    return (x_BLHD.astype(jnp.float32) * whole_cos + partner_BLHD * whole_sin).astype(x_BLHD.dtype)


def _forward(x_BLHD, cos, sin, direction):
    return _rotate_by_product(x_BLHD, cos, sin, direction), (cos, sin)


def _backward(direction, angles, grad_BLHD):
    return _rotate_by_product(grad_BLHD, *angles, -direction), None, None


_rotate_by_product.defvjp(_forward, _backward)
