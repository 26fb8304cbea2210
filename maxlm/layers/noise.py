"""Randomness of layers in training: dropout and stochastic depth.

Dimensions: B batch, L length, D channels.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax

from maxlm.config.regularization import RegularizationConfig
from maxlm.ops.dropout import drop, hashed

# What a mask is for: two masks of one token in one layer must differ.
_EMBEDDING, _MIXER, _MLP, _DEPTH = range(4)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["row_seeds_B", "columns_BL", "layer"],
    meta_fields=["rates", "num_layers"],
)
@dataclass(frozen=True)
class Noise:
    """Seeds, and how much is dropped.

    row_seeds_B: uint32, from (seed, step, row).
    columns_BL: the place of each token in its row, in the layout of the stream; a model adds it.
    layer: number of the layer that is computed; the embedding has none.
    """

    row_seeds_B: jax.Array
    rates: RegularizationConfig
    columns_BL: jax.Array | None = None
    num_layers: int = 0
    layer: jax.Array | None = None

    def in_model(self, columns_BL: jax.Array, num_layers: int) -> Self:
        return replace(self, columns_BL=columns_BL, num_layers=num_layers)

    def at_layer(self, number: jax.Array) -> Self:
        return replace(self, layer=number)

    def embedding(self, x_BLD: jax.Array) -> jax.Array:
        """Dropout of the embeddings."""
        return self._drop(x_BLD, self.rates.embedding_dropout, _EMBEDDING)

    def mixer_output(self, x_BLD: jax.Array) -> jax.Array:
        return self._branch(x_BLD, _MIXER)

    def mlp_output(self, x_BLD: jax.Array) -> jax.Array:
        return self._branch(x_BLD, _MLP)

    def _branch(self, x_BLD: jax.Array, site: int) -> jax.Array:
        """Dropout of what a layer adds to the stream, and stochastic depth (arXiv:1603.09382): a row skips a layer with
        a probability that grows linearly with depth, to `stochastic_depth` in the last one."""
        x_BLD = self._drop(x_BLD, self.rates.residual_dropout, site)
        if self.rates.stochastic_depth:
            rate = self.rates.stochastic_depth * (self.layer + 1) / self.num_layers
            x_BLD = drop(x_BLD, rate, self._seeds(_DEPTH)[:, None, None])
        return x_BLD

    def _drop(self, x_BLD: jax.Array, rate: float, site: int) -> jax.Array:
        if not rate:
            return x_BLD
        tokens_BL = hashed(self._seeds(site)[:, None], self.columns_BL)
        channels_D = jax.numpy.arange(x_BLD.shape[-1])
        return drop(x_BLD, rate, hashed(tokens_BL[..., None], channels_D))

    def _seeds(self, site: int) -> jax.Array:
        seeds_B = hashed(self.row_seeds_B, site)
        return seeds_B if self.layer is None else hashed(seeds_B, self.layer)
