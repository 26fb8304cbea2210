"""A checksum of arrays on devices: the same for every sharding, computed where they are."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import is_explicit, spec_of
from maxlm.core.tree import path_of

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint(tree: Any) -> jax.Array:
    """uint32: a sum modulo 2^32 over the bits of all numbers, each mixed with its place and its array's path.

    Sums of integers do not depend on their order, so it has the same bits on every mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [_sum(x) * jnp.uint32(zlib.crc32(path_of(path).encode()) | 1) for path, x in leaves]
    return sum(sums, jnp.uint32(0))


def _sum(x: jax.Array) -> jax.Array:
    mixed = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    for axis in reversed(range(x.ndim)):
        # Sharded before it is broadcast, so that the place of each number is never in memory.
        place = jnp.arange(x.shape[axis], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
        if is_explicit():
            place = jax.reshard(place, P(spec_of(x)[axis]))
        mixed = mixed ^ jnp.expand_dims(place, [other for other in range(x.ndim) if other != axis])
        # Half of the finalizer of MurmurHash3 (public domain): bits affect those above and below.
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
        mixed = mixed ^ (mixed >> 13)
    return jnp.sum(mixed, dtype=jnp.uint32)
