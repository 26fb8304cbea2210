"""Checksums of arrays, to verify that restored arrays equal the saved ones."""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.core.dispatch import fetched
from maxlm.core.tree import flatten

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of each leaf that depends on every bit and its position, but not on the mesh."""
    leaves = flatten(tree)
    return {path: int(value) for path, value in zip(leaves, fetched(map(checksum, leaves.values())), strict=True)}


# One program per shape, shared by weights and their moments, compiles faster than one for the whole tree.
@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """One uint32: reduce one axis after the other by summing hashes of each value and its position.

    A sum of integers does not depend on the order in which devices add it up. Hashing the result of the previous axes
    detects swapped values, which products with a factor per position would not: those of two axes agree if a matrix is
    transposed, and opposite numbers cancel.
    """
    total = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    while total.ndim:
        places = jnp.arange(total.shape[0], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
        total = jnp.sum(_hash(total + jnp.expand_dims(places, range(1, total.ndim))), axis=0, dtype=jnp.uint32)
    return total


def _hash(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer: a bijection of uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
