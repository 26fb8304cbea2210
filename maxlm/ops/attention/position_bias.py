"""Biases of attention logits by the distance between a query and a key, and by head.

Shapes: N query heads, U buckets, D distances, q and s the lengths of a block of queries and of its keys.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["slopes_N"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Alibi:
    """A bias of -slope |i - j| for each head (arXiv:2108.12409). slopes_N: by query head."""

    slopes_N: jax.Array

    @property
    def num_heads(self) -> int:
        return self.slopes_N.shape[0]

    def at(self, distance) -> jax.Array:
        """The bias of keys that are `distance` before their query, float32 [N, *distance.shape]."""
        distance = jnp.abs(distance).astype(jnp.float32)
        return -jnp.multiply.outer(self.slopes_N.astype(jnp.float32), distance)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["table_UN"], meta_fields=["max_distance", "bidirectional"]
)
@dataclasses.dataclass(frozen=True)
class RelativeBuckets:
    """A learned bias for each bucket of distances and each head (T5, arXiv:1910.10683, section 2.1).

    The first half of the buckets holds one distance each, the others grow as a geometric series up to `max_distance`;
    the last one also holds everything beyond. If `bidirectional`, the first half of the table is for keys up to the
    query's position and the second half for later ones; otherwise later keys share bucket 0.
    """

    table_UN: jax.Array
    max_distance: int
    bidirectional: bool

    @property
    def num_heads(self) -> int:
        return self.table_UN.shape[1]

    def at(self, distance) -> jax.Array:
        """The bias of keys that are `distance` before their query, float32 [N, *distance.shape]."""
        return jnp.moveaxis(self.table_UN.astype(jnp.float32)[self._bucket(distance)], -1, 0)

    def _bucket(self, distance):
        buckets = self.table_UN.shape[0] // (2 if self.bidirectional else 1)
        exact = buckets // 2
        ratio = self.max_distance / exact
        # The first distance of each bucket but the first; what is an integer must not be rounded up.
        growing = [math.ceil(exact * ratio ** (k / (buckets - exact)) - 1e-6) for k in range(1, buckets - exact)]
        starts = np.asarray([*range(1, exact + 1), *growing])
        behind = jnp.abs(distance) if self.bidirectional else jnp.maximum(distance, 0)
        bucket = jnp.searchsorted(starts, behind, side="right", method="compare_all")
        return jnp.where(distance < 0, bucket + buckets, bucket) if self.bidirectional else bucket


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values_ND"], meta_fields=["first"])
@dataclasses.dataclass(frozen=True)
class DistanceBias:
    """A bias for each head and each distance `first`, `first` + 1, ... of a key before its query."""

    values_ND: jax.Array
    first: int

    @property
    def num_heads(self) -> int:
        return self.values_ND.shape[0]

    def at(self, distance) -> jax.Array:
        """The bias of keys that are `distance` before their query, float32 [N, *distance.shape]."""
        return self.values_ND.astype(jnp.float32)[:, distance - self.first]

    def block(self, queries: slice, keys: slice) -> jax.Array:
        """The biases [N, q, s] of a block, without an index for each of its elements."""
        num_queries = queries.stop - queries.start
        smallest, largest = queries.start - (keys.stop - 1), queries.stop - 1 - keys.start
        # The W = q + s - 1 distances of the block, in the order of the keys.
        row_NW = jnp.flip(self.values_ND[:, smallest - self.first : largest - self.first + 1], axis=1)
        num_heads, width = row_NW.shape
        # Copies of W + 1 numbers, read in steps of W: each row starts one number earlier than the row before.
        copies = jnp.broadcast_to(jnp.pad(row_NW, ((0, 0), (0, 1)))[:, None], (num_heads, num_queries, width + 1))
        skewed = copies.reshape(num_heads, -1)[:, : num_queries * width].reshape(num_heads, num_queries, width)
        return skewed[:, :, num_queries - 1 :]


PositionBias = Alibi | RelativeBuckets | DistanceBias
