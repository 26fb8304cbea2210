"""The key-value cache: an explicit pytree, passed in and returned."""

from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp

from maxlm.config.model import ModelConfig


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """keys and values, each [layers, batch, num_kv_heads, max_length, head_dim].

    The slot of a token is its position. Slots beyond a sequence's newest position are never attended to, so a row can
    be reused for another sequence without clearing it.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, batch_size: int, max_length: int, dtype=jnp.float32) -> Self:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: jax.Array, keys_BLHD: jax.Array, values_BLHD: jax.Array, positions_BL: jax.Array) -> Self:
        """The cache with a layer's keys and values written at these positions; position -1 writes nothing."""
        rows = jnp.arange(positions_BL.shape[0])[:, None]
        slots = jnp.where(positions_BL >= 0, positions_BL, self.max_length)

        def put(old, new):
            return old.at[layer, rows, :, slots].set(new.astype(old.dtype), mode="drop")

        return type(self)(put(self.keys, keys_BLHD), put(self.values, values_BLHD))
