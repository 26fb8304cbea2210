"""Checksums of arrays, to tell whether what was read is what was saved."""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.core.tree import flatten

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit number for each leaf that depends on every bit of it and on where it stands, and on no mesh."""
    values = {path: checksum(leaf) for path, leaf in flatten(tree).items()}
    return {path: int(value) for path, value in jax.device_get(values).items()}


# A program for each shape, which weights and their moments share, takes less to compile than one for the whole tree.
@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """One uint32: along one axis after the other, the sum of hashes of each value and its place.

    A sum of integers is the same in whatever order the devices add it up. Hashes of what the axes before gave make it
    see values that have changed places, which products with a factor for each place would not: those of two axes agree
    where a matrix is transposed, and opposite numbers cancel.
    """
    total = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    while total.ndim:
        places = jnp.arange(total.shape[0], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
        total = jnp.sum(_hash(total + jnp.expand_dims(places, range(1, total.ndim))), axis=0, dtype=jnp.uint32)
    return total


def _hash(x: jax.Array) -> jax.Array:
    """uint32 to uint32, one to one: MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
