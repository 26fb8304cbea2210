"""Dropout whose masks depend on what is computed, and not on how: the same on every mesh, and when a run is resumed.

A mask is a hash of coordinates: the row's seed, the layer, the place in the row, the channel. Hashing is elementwise,
so a device hashes its own part, and the backward pass hashes again instead of keeping masks.

Dimensions: B rows, L tokens, D channels; T queries, S keys, N query heads, K key-value heads, G = N / K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import is_explicit, spec_of


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


@partial(jax.tree_util.register_dataclass, data_fields=["seeds_B", "columns_BL"], meta_fields=["rate"])
@dataclass(frozen=True)
class InputDropout:
    """Dropout of the channels of each token before a product.

    seeds_B: uint32, a hash of the row, the layer and the product. columns_BL: the place of each token in its row.
    """

    seeds_B: jax.Array
    columns_BL: jax.Array
    rate: float

    def apply(self, x_BLD: jax.Array) -> jax.Array:
        """x after dropout, sharded as it is."""
        columns_BL, channels_D = self.columns_BL, jnp.arange(x_BLD.shape[-1])
        if is_explicit():
            *tokens, channels = spec_of(x_BLD)
            columns_BL, channels_D = jax.reshard(columns_BL, P(*tokens)), jax.reshard(channels_D, P(channels))
        tokens_BL = hashed(self.seeds_B[:, None], columns_BL)
        return drop(x_BLD, self.rate, hashed(tokens_BL[..., None], channels_D))


@partial(jax.tree_util.register_dataclass, data_fields=["query_seeds_BTN", "key_seeds_BS"], meta_fields=["rate"])
@dataclass(frozen=True)
class WeightDropout:
    """Dropout of attention weights, after the softmax (arXiv:1907.11065): a query of a head loses some of its keys.

    The mask of a query and a key is a hash of two seeds, so a block of it needs the seeds of its queries and keys only.

    query_seeds_BTN: uint32, a hash of all that identifies a query of a head: row, layer, place in the row, head.
    key_seeds_BS: uint32, a hash of the place of each key in its row.
    rate: share of the weights that are dropped, in [0, 1).
    """

    query_seeds_BTN: jax.Array
    key_seeds_BS: jax.Array
    rate: float

    def apply(self, weights_BKGTS: jax.Array) -> jax.Array:
        """Weights, or what is proportional to them, after dropout."""
        batch, num_kv_heads, group, length, _ = weights_BKGTS.shape
        seeds_BTKG = self.query_seeds_BTN.reshape(batch, length, num_kv_heads, group)
        seeds_BKGT1 = seeds_BTKG.transpose(0, 2, 3, 1)[..., None]
        return weight_dropout(self.rate, seeds_BKGT1, self.key_seeds_BS[:, None, None, None])(weights_BKGTS)

    def block(self, queries: slice, keys: slice) -> "WeightDropout":
        """The same for some of the queries and keys."""
        return WeightDropout(self.query_seeds_BTN[:, queries], self.key_seeds_BS[:, keys], self.rate)


def weight_dropout(rate: float, query_seeds: jax.Array, key_seeds: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The function from weights, or what is proportional to them, to weights / (1 - rate) where kept and 0 elsewhere.

    Seeds are broadcast to weights. Of the finalizer, only the middle is left: its first step maps seeds to seeds, which
    are hashes already, and its last one changes low bits, which decide next to nothing. The comparison is one of
    integers, so that kernels compute the same mask as everything else.
    """
    x = (query_seeds ^ key_seeds) * jnp.uint32(0x85EBCA6B)
    keep = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35) >= jnp.uint32(int(rate * 2**32))
    return lambda weights: jnp.where(keep, weights * (1 / (1 - rate)), 0.0)


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
