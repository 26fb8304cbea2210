"""Multi-head latent attention of DeepSeek-V2 (arXiv:2405.04434, section 2.1): keys and values from one short vector.

A token's latent and its rotary key, which all heads share, are all that is cached. In training, keys and values of each
head are made of the latent. With a cache, the matrices that make them are absorbed instead: the query is multiplied by
that of the keys, so that it attends to latents directly, and the sum of latents by that of the values.

Dimensions: B batch, L length, D embed, H heads, C content channels of a query or key, R rotary channels, V channels of
a value, Z channels of the latent, S slots of the cache.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.layers import LatentAttentionConfig
from maxlm.config.model import ModelConfig, NormConfig
from maxlm.core.sharding import on_each_device, shard, specs_of
from maxlm.layers.attend import attend, merge_heads, reshape, split_heads
from maxlm.layers.cache import Cache, put_row
from maxlm.layers.context import TokenContext
from maxlm.layers.norm import Norm
from maxlm.layers.weights import bias, multiply, residual_scale, weight
from maxlm.ops.attention.definition import cached_attention
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.linear import operand_dtype, whole
from maxlm.ops.rope import apply_rope


@partial(jax.tree_util.register_dataclass, data_fields=["latents_BSX"], meta_fields=[])
@dataclass(frozen=True)
class LatentCache(Cache):
    """The latent and the rotary key of each token, X = Z + R; the slot of a token is its position."""

    axes: ClassVar[tuple[str | None, ...]] = ("batch", None, None)

    latents_BSX: jax.Array

    def extend(self, latents_BLX: jax.Array, positions_BL: jax.Array) -> Self:
        """The cache with new tokens."""
        batch, num_slots, _ = self.latents_BSX.shape
        slots_BL = jnp.where(positions_BL >= 0, positions_BL, num_slots)
        new_BLX = latents_BLX.astype(self.latents_BSX.dtype)
        return type(self)(self.latents_BSX.at[jnp.arange(batch)[:, None], slots_BL].set(new_BLX, mode="drop"))

    def write_row(self, other: Self, row: jax.Array) -> Self:
        return type(self)(put_row(self.latents_BSX, other.latents_BSX, row, 3))


class LatentAttention(nnx.Module):
    """Causal self-attention, whose keys and values are compressed."""

    def __init__(self, model: ModelConfig, config: LatentAttentionConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        declare = partial(weight, execution)
        heads = lambda channels: (config.num_heads * channels, "heads")  # noqa: E731
        norm = NormConfig(epsilon=config.norm_epsilon)
        embed, latent = (model.embed_dim, "embed"), (config.latent_dim, "embed")
        query_input = embed
        if config.query_rank is not None:
            query_input = (config.query_rank, "embed")
            self.query_down = declare(embed, (config.query_rank, "latent"))
            self.query_norm = Norm(norm, config.query_rank)
        self.query = declare(query_input, heads(config.content_dim + config.rope_dim))
        self.latent = declare(embed, (config.latent_dim, "latent"))
        self.rope_key = declare(embed, (config.rope_dim, "latent"))
        self.latent_norm = Norm(norm, config.latent_dim)
        self.key = declare(latent, heads(config.content_dim))
        self.value = declare(latent, heads(config.value_dim))
        self.out = declare(heads(config.value_dim), embed, residual_scale(model.num_layers))
        if config.bias:
            if config.query_rank is not None:
                self.query_down_bias = bias((config.query_rank, None))
            self.latent_bias, self.rope_key_bias = bias((config.latent_dim, None)), bias((config.rope_dim, None))
            self.out_bias = bias((model.embed_dim, None))

    def __call__(
        self, x_BLD: jax.Array, context: TokenContext, cache: LatentCache | None = None
    ) -> tuple[jax.Array, LatentCache | None]:
        times = partial(multiply, self.execution)
        content_BLHC, rotary_BLHR = self._queries(x_BLD, context)
        latent_BLZ, rotary_key_BLR = self._latents(x_BLD, context)
        if cache is None:
            mixed_BLHV = self._attend(content_BLHC, rotary_BLHR, latent_BLZ, rotary_key_BLR, context)
        else:
            new_BLX = jnp.concatenate([latent_BLZ, rotary_key_BLR], axis=-1)
            cache, mixed_BLHV = self._attend_to_latents(content_BLHC, rotary_BLHR, new_BLX, cache, context)
        y_BLD = times(merge_heads(mixed_BLHV), self.out, context.residual_axes)
        return self._with_bias(y_BLD, "out_bias"), cache

    def create_cache(self, batch_size: int, max_length: int, dtype: Any) -> LatentCache:
        """An empty cache."""
        return LatentCache(jnp.zeros((batch_size, max_length, self.config.latent_dim + self.config.rope_dim), dtype))

    def _queries(self, x_BLD, context: TokenContext) -> tuple[jax.Array, jax.Array]:
        """What a query looks for in the content of keys, [B, L, H, C], and in their positions, [B, L, H, R]."""
        config, times = self.config, partial(multiply, self.execution)
        if config.query_rank is not None:
            x_BLD = self.query_norm(self._with_bias(times(x_BLD, self.query_down), "query_down_bias"))
        query_BLHE = split_heads(times(x_BLD, self.query), config.num_heads, "heads")
        content_BLHC, rotary_BLHR = jnp.split(query_BLHE, [config.content_dim], axis=-1)
        return content_BLHC, apply_rope(rotary_BLHR, context.angles_of(config.rope, config.rope_dim))

    def _latents(self, x_BLD, context: TokenContext) -> tuple[jax.Array, jax.Array]:
        """The latents, [B, L, Z], and the rotary keys, [B, L, R]."""
        config, times = self.config, partial(multiply, self.execution)
        latent_BLZ = self.latent_norm(self._with_bias(times(x_BLD, self.latent), "latent_bias"))
        rotary_BLR = self._with_bias(times(x_BLD, self.rope_key), "rope_key_bias")
        angles = context.angles_of(config.rope, config.rope_dim)
        return latent_BLZ, apply_rope(rotary_BLR[:, :, None], angles)[:, :, 0]

    def _attend(self, content_BLHC, rotary_BLHR, latent_BLZ, rotary_key_BLR, context: TokenContext) -> jax.Array:
        config, times = self.config, partial(multiply, self.execution)
        key_BLHC = split_heads(times(latent_BLZ, self.key), config.num_heads, "heads")
        value_BLHV = split_heads(times(latent_BLZ, self.value), config.num_heads, "heads")
        rotary_key_BLHR = shard(
            jnp.broadcast_to(rotary_key_BLR[:, :, None], rotary_BLHR.shape), "batch", "length", "heads", None
        )
        query_BLHE = jnp.concatenate([content_BLHC, rotary_BLHR], axis=-1)
        key_BLHE = jnp.concatenate([key_BLHC, rotary_key_BLHR], axis=-1)
        return attend(self.execution, query_BLHE, key_BLHE, value_BLHV, self._rule, context, kv_axis="heads")

    def _attend_to_latents(
        self, content_BLHC, rotary_BLHR, new_BLX, cache: LatentCache, context: TokenContext
    ) -> tuple[LatentCache, jax.Array]:
        """The cache with new tokens, and the values of its latents as the queries weight them, [B, L, H, V]."""
        config = self.config
        dtype = operand_dtype(self.execution.matmul_dtype)

        def product(equation: str, x: jax.Array, matrix: Any) -> jax.Array:
            matrix_ZX = whole(matrix)
            shape = (config.latent_dim, config.num_heads, matrix_ZX.shape[1] // config.num_heads)
            matrix_ZHE = reshape(matrix_ZX, shape, (None, "heads", None))
            y = jnp.einsum(equation, x.astype(dtype), matrix_ZHE.astype(dtype), preferred_element_type=jnp.float32)
            return y.astype(x.dtype)

        query_BLHX = jnp.concatenate([product("blhc,zhc->blhz", content_BLHC, self.key), rotary_BLHR], axis=-1)

        def local(cache: LatentCache, query_BLHX, new_BLX, context: TokenContext):
            cache = cache.extend(new_BLX, context.positions_BL)
            keys_B1SX = cache.latents_BSX[:, None]
            positions_1S = jnp.arange(keys_B1SX.shape[2])[None]
            return cache, cached_attention(
                query_BLHX,
                keys_B1SX,
                keys_B1SX[..., : config.latent_dim],
                context.positions_BL,
                positions_1S,
                self._rule,
                AttentionOperands(prefix=context.prefix_in_cache(positions_1S)),
            )

        out_specs = specs_of((cache, query_BLHX))
        cache, mixed_BLHZ = on_each_device(local, cache, query_BLHX, new_BLX, context.of_tokens, out_specs=out_specs)
        return cache, product("blhz,zhv->blhv", mixed_BLHZ, self.value)

    def _with_bias(self, x: jax.Array, name: str) -> jax.Array:
        return x + getattr(self, name).astype(x.dtype) if hasattr(self, name) else x

    @property
    def _rule(self) -> AttentionRule:
        config = self.config
        return AttentionRule(scale=config.scale or 1 / math.sqrt(config.content_dim + config.rope_dim))
