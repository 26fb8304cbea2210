"""What a mixer remembers of the tokens before: an explicit pytree, passed in and returned.

Every cache has `create`, `write_row`, which copies the one row of another cache, and `take`, which selects rows. The
tokens of a row are added in order; a token at position 0 begins a new sequence, so that a row can be reused without
clearing it, and one at position -1 is padding, which changes nothing. Stacked caches of equal layers have leading axes.

Dimensions: B batch, L new tokens, K key-value heads, S slots, T cached tokens, E head_dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp


class Cache:
    """Base class of all caches. `axes`: the logical axes of its arrays, without those over layers."""

    axes: ClassVar[tuple[str | None, ...]]

    def take(self, rows: jax.Array) -> Self:
        """The cache with these of its rows, in this order."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=leaf.ndim - len(self.axes)), self)


class KeyValues(NamedTuple):
    """Keys and values that new tokens may attend to, and their positions, [batch or 1, T]: -1 is no token."""

    keys_BKTE: jax.Array
    values_BKTE: jax.Array
    positions_BT: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["keys_BKSE", "values_BKSE"], meta_fields=[])
@dataclass(frozen=True)
class KeyValueCache(Cache):
    """Keys and values of all tokens. The slot of a token is its position.

    Slots beyond a sequence's newest position hold what the row had before, and are after every query.
    """

    axes: ClassVar[tuple[str | None, ...]] = ("batch", "kv_heads", None, None)

    keys_BKSE: jax.Array
    values_BKSE: jax.Array

    @classmethod
    def create(cls, batch_size: int, num_heads: int, num_slots: int, head_dim: int, dtype: Any) -> Self:
        shape = (batch_size, num_heads, num_slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def extend(self, keys_BLKE, values_BLKE, positions_BL) -> tuple[Self, KeyValues]:
        """The cache with new tokens, and what they attend to."""
        num_slots = self.keys_BKSE.shape[2]
        cache = self._put(keys_BLKE, values_BLKE, jnp.where(positions_BL >= 0, positions_BL, num_slots))
        return cache, KeyValues(cache.keys_BKSE, cache.values_BKSE, jnp.arange(num_slots)[None])

    def write_row(self, other: "KeyValueCache", row: jax.Array) -> Self:
        """The cache with the row of another one, which may have fewer slots, and then no ring."""
        pairs = (self.keys_BKSE, other.keys_BKSE), (self.values_BKSE, other.values_BKSE)
        return type(self)(*(put_row(whole, part, row, 4) for whole, part in pairs))

    def _put(self, keys_BLKE, values_BLKE, slots_BL) -> Self:
        """The cache with keys and values in these slots; none in slots that do not exist."""
        batch_size, num_heads, _, _ = self.keys_BKSE.shape
        rows_B11, heads_K1 = jnp.arange(batch_size)[:, None, None], jnp.arange(num_heads)[:, None]

        def put(old_BKSE, new_BLKE):
            # An index for each head too: to write whole slices of heads, TPUs would move the heads behind the slots,
            # and copy the whole cache before and after.
            new_BKLE = jnp.swapaxes(new_BLKE, 1, 2).astype(old_BKSE.dtype)
            return old_BKSE.at[rows_B11, heads_K1, slots_BL[:, None]].set(new_BKLE, mode="drop")

        return type(self)(put(self.keys_BKSE, keys_BLKE), put(self.values_BKSE, values_BLKE))


@partial(jax.tree_util.register_dataclass, data_fields=["keys_BKSE", "values_BKSE"], meta_fields=[])
@dataclass(frozen=True)
class RingCache(KeyValueCache):
    """Keys and values of the last S tokens, for a window of S tokens. The slot of a token is its position modulo S."""

    def extend(self, keys_BLKE, values_BLKE, positions_BL) -> tuple[Self, KeyValues]:
        num_slots = self.keys_BKSE.shape[2]
        newest_B1 = jnp.max(positions_BL, axis=1, keepdims=True)
        # Of many new tokens, only the last S are kept.
        is_kept_BL = (positions_BL >= 0) & (positions_BL > newest_B1 - num_slots)
        cache = self._put(keys_BLKE, values_BLKE, jnp.where(is_kept_BL, positions_BL % num_slots, num_slots))
        if positions_BL.shape[1] == 1:
            # The slot that is overwritten is of the token that leaves the window.
            return cache, KeyValues(cache.keys_BKSE, cache.values_BKSE, _positions_in_ring(newest_B1, num_slots))
        # The first new tokens attend to tokens that the last ones overwrite.
        first_B1 = jnp.min(jnp.where(positions_BL >= 0, positions_BL, newest_B1), axis=1, keepdims=True)

        def with_new(old_BKSE, new_BLKE):
            return jnp.concatenate([old_BKSE, jnp.swapaxes(new_BLKE, 1, 2).astype(old_BKSE.dtype)], axis=2)

        return cache, KeyValues(
            with_new(self.keys_BKSE, keys_BLKE),
            with_new(self.values_BKSE, values_BLKE),
            jnp.concatenate([_positions_in_ring(first_B1 - 1, num_slots), positions_BL], axis=1),
        )


def _positions_in_ring(newest_B1: jax.Array, num_slots: int) -> jax.Array:
    """Positions of the tokens in the slots of a ring after the token `newest`; -1 where there is none: [B, S]."""
    return jnp.maximum(newest_B1 - (newest_B1 - jnp.arange(num_slots)) % num_slots, -1)


def put_row(whole: jax.Array, part: jax.Array, row: jax.Array, rank: int) -> jax.Array:
    """`part`, with a batch of one, written at a row; `rank` counts the axes from the batch on."""
    start: list[Any] = [0] * whole.ndim
    start[whole.ndim - rank] = row
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)
