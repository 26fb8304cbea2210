"""Dropout whose masks depend on what is computed, and not on how: the same on every mesh, and when a run is resumed.

A mask is a hash of coordinates: the row's seed, the layer, the place in the row, the channel. Hashing is elementwise,
so a device hashes its own part, and the backward pass hashes again instead of keeping masks.

Dimensions: B rows, L tokens, D channels.
"""

import jax
import jax.numpy as jnp


def row_seeds(key: jax.Array, num_rows: int) -> jax.Array:
    """A seed for each row of a batch, uint32 [B]."""
    return jax.random.bits(key, (num_rows,), jnp.uint32)


def hashed(seeds: jax.Array, coordinates: jax.Array | int) -> jax.Array:
    """uint32 of the broadcast shape, uniform over its range and as good as independent: two rounds of the finalizer of
    MurmurHash3 on the seed and a coordinate."""
    coordinates = jnp.asarray(coordinates).astype(jnp.uint32)
    return _mixed(_mixed(seeds ^ (coordinates * jnp.uint32(0x9E3779B9))) + coordinates)


def drop(x: jax.Array, rate: float | jax.Array, bits: jax.Array) -> jax.Array:
    """x / (1 - rate) where kept and 0 elsewhere, each with the probability `rate`.

    Args:
      bits: uint32, uniform; broadcast to x.
    """
    keep = bits.astype(jnp.float32) * 2.0**-32 >= rate
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
