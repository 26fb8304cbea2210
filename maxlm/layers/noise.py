"""Randomness of layers in training: dropout and stochastic depth.

Dimensions: B batch, L length, D channels, H query heads.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from maxlm.config.regularization import RegularizationConfig
from maxlm.core.sharding import shard
from maxlm.ops.dropout import InputDropout, WeightDropout, drop, hashed
from maxlm.ops.linear import AdaptedWeight

# What a mask is for: two masks of one token in one layer must differ.
_EMBEDDING, _MIXER, _MLP, _DEPTH, _QUERIES, _KEYS, _NEFTUNE, _ADAPTER = range(8)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["row_seeds_B", "columns_BL", "lengths_BL", "layer"],
    meta_fields=["rates", "num_layers", "residual_axes"],
)
@dataclass(frozen=True)
class Noise:
    """Seeds, and how much is dropped.

    row_seeds_B: uint32, from (seed, step, row).
    columns_BL: the place of each token in its row, in the layout of a mixer's input; a model adds it.
    lengths_BL: length of each token's document in its row, in the same layout; None if nothing depends on it.
    residual_axes: sharding of the stream between layers.
    layer: number of the layer that is computed; the embedding has none.
    """

    row_seeds_B: jax.Array
    rates: RegularizationConfig
    columns_BL: jax.Array | None = None
    lengths_BL: jax.Array | None = None
    residual_axes: tuple[str | None, ...] = ()
    num_layers: int = 0
    layer: int | jax.Array | None = None

    def in_model(
        self,
        columns_BL: jax.Array,
        lengths_BL: jax.Array | None,
        residual_axes: tuple[str | None, ...],
        num_layers: int,
    ) -> Self:
        return replace(
            self, columns_BL=columns_BL, lengths_BL=lengths_BL, residual_axes=residual_axes, num_layers=num_layers
        )

    def at_layer(self, number: int | jax.Array) -> Self:
        return replace(self, layer=number)

    def embedding(self, x_BLD: jax.Array) -> jax.Array:
        """Embeddings with the uniform noise of NEFTune (arXiv:2310.05914), at most alpha / sqrt(L * D) in a document of
        length L, and dropout."""
        if self.rates.neftune_alpha:
            lengths_BL = jnp.maximum(shard(self.lengths_BL, *self.residual_axes[:2]), 1)
            bound_BL = self.rates.neftune_alpha * jax.lax.rsqrt(lengths_BL * float(x_BLD.shape[-1]))
            # From -1 to 1: 24 bits, which float32 holds exactly.
            uniform_BLD = (self._bits(x_BLD, _NEFTUNE) >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
            x_BLD = (x_BLD + bound_BL[..., None] * uniform_BLD).astype(x_BLD.dtype)
        return self._drop(x_BLD, self.rates.embedding_dropout, _EMBEDDING)

    def mixer_output(self, x_BLD: jax.Array) -> jax.Array:
        return self._branch(x_BLD, _MIXER)

    def mlp_output(self, x_BLD: jax.Array) -> jax.Array:
        return self._branch(x_BLD, _MLP)

    def attention_weights(self, num_heads: int) -> WeightDropout | None:
        """Dropout of the weights of a layer's attention; None if nothing is dropped."""
        if not self.rates.attention_dropout:
            return None
        tokens_BL = hashed(self._seeds(_QUERIES)[:, None], self.columns_BL)
        query_seeds_BLH = hashed(tokens_BL[..., None], shard(jnp.arange(num_heads), "heads"))
        key_seeds_BL = hashed(jnp.uint32(_KEYS), self.columns_BL)
        return WeightDropout(query_seeds_BLH, key_seeds_BL, self.rates.attention_dropout)

    def on_adapters(self, layer: Any) -> Any:
        """A layer whose low-rank updates drop channels of their inputs, each its own."""
        if not self.rates.adapter_dropout:
            return layer
        leaves, structure = jax.tree.flatten(layer, is_leaf=lambda node: isinstance(node, AdaptedWeight))
        adapted = [number for number, leaf in enumerate(leaves) if isinstance(leaf, AdaptedWeight)]
        for site, number in enumerate(adapted):
            seeds_B = hashed(self._seeds(_ADAPTER), site)
            dropout = InputDropout(seeds_B, self.columns_BL, self.rates.adapter_dropout)
            leaves[number] = replace(leaves[number], dropout=dropout)
        return jax.tree.unflatten(structure, leaves)

    def _branch(self, x_BLD: jax.Array, site: int) -> jax.Array:
        """Dropout of what a layer adds to the stream, and stochastic depth (arXiv:1603.09382): a row skips a layer with
        a probability that grows linearly with depth, to `stochastic_depth` in the last one."""
        x_BLD = self._drop(x_BLD, self.rates.residual_dropout, site)
        if self.rates.stochastic_depth:
            rate = self.rates.stochastic_depth * (self.layer + 1) / self.num_layers
            x_BLD = drop(x_BLD, rate, self._seeds(_DEPTH)[:, None, None])
        return x_BLD

    def _drop(self, x_BLD: jax.Array, rate: float, site: int) -> jax.Array:
        return drop(x_BLD, rate, self._bits(x_BLD, site)) if rate else x_BLD

    def _bits(self, x_BLD: jax.Array, site: int) -> jax.Array:
        """uint32 of the shape of x, uniform."""
        columns_BL = shard(self.columns_BL, *self.residual_axes[:2])
        tokens_BL = hashed(self._seeds(site)[:, None], columns_BL)
        channels_D = jnp.arange(x_BLD.shape[-1])
        return hashed(tokens_BL[..., None], channels_D)

    def _seeds(self, site: int) -> jax.Array:
        seeds_B = hashed(self.row_seeds_B, site)
        return seeds_B if self.layer is None else hashed(seeds_B, self.layer)
