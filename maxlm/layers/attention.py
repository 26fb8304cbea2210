"""Self-attention, in training and with a cache of earlier keys and values.

Dimensions: B batch, L length, D embed, H query heads, K key-value heads, E head_dim, T cached tokens, P virtual
tokens.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.layers import AttentionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import Normal, Parameter, zeros
from maxlm.core.sharding import on_each_device, shard, specs_of
from maxlm.layers.attend import attend, merge_heads, reshape, split_heads
from maxlm.layers.cache import KeyValueCache, RingCache
from maxlm.layers.context import TokenContext
from maxlm.layers.norm import Norm
from maxlm.layers.weights import bias, multiply, residual_scale, weight
from maxlm.ops.attention.definition import cached_attention
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.position_bias import Alibi, PositionBias
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.rope import apply_rope


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, model: ModelConfig, config: AttentionConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        embed = (model.embed_dim, "embed")
        heads = (config.num_heads * config.head_dim, "heads")
        kv_heads = (config.num_kv_heads * config.head_dim, "kv_heads")
        self.query = weight(execution, embed, heads)
        self.key = weight(execution, embed, kv_heads)
        self.value = weight(execution, embed, kv_heads)
        self.out = weight(execution, heads, embed, residual_scale(model.num_layers))
        if config.bias:
            self.query_bias, self.key_bias, self.value_bias = bias(heads), bias(kv_heads), bias(kv_heads)
        if config.out_bias:
            self.out_bias = bias((model.embed_dim, None))
        if config.sinks:
            self.sinks: Any = nnx.data(Parameter((config.num_heads,), ("heads",), zeros, role="vector"))
        if config.virtual_tokens is not None:
            shape, axes = (config.virtual_tokens, kv_heads[0]), (None, kv_heads[1])
            virtual = Parameter(shape, axes, Normal(0.02), role="virtual")
            self.virtual_key: Any = nnx.data(virtual)
            self.virtual_value: Any = nnx.data(virtual)
        if config.qk_norm:
            is_by_head = config.qk_norm_over == "head"
            self.query_norm = Norm(model.norm, config.head_dim if is_by_head else heads[0])
            self.key_norm = Norm(model.norm, config.head_dim if is_by_head else kv_heads[0])

    def __call__(
        self, x_BLD: jax.Array, context: TokenContext, cache: KeyValueCache | RingCache | None = None
    ) -> tuple[jax.Array, KeyValueCache | RingCache | None]:
        query_BLHE, key_BLKE, value_BLKE = self._project(x_BLD, context)
        operands = self._operands(context)
        if cache is None:
            mixed_BLHE = attend(self.execution, query_BLHE, key_BLKE, value_BLKE, self._rule, context, operands)
        else:
            arguments = (cache, query_BLHE, key_BLKE, value_BLKE, context.of_tokens, operands)
            cache, mixed_BLHE = on_each_device(
                self._attend_to_cache, *arguments, out_specs=specs_of((cache, query_BLHE))
            )
        y_BLD = multiply(self.execution, merge_heads(mixed_BLHE), self.out, context.residual_axes)
        return y_BLD + self.out_bias.astype(y_BLD.dtype) if self.config.out_bias else y_BLD, cache

    def create_cache(self, batch_size: int, max_length: int, dtype) -> KeyValueCache | RingCache:
        """An empty cache: of the window's length, where that is shorter than the longest sequence."""
        config = self.config
        if config.window is not None and config.window < max_length:
            return RingCache.create(batch_size, config.num_kv_heads, config.window, config.head_dim, dtype)
        return KeyValueCache.create(batch_size, config.num_kv_heads, max_length, config.head_dim, dtype)

    def _attend_to_cache(self, cache, query_BLHE, key_BLKE, value_BLKE, context: TokenContext, operands):
        """The cache with new tokens, and what the queries read from it."""
        cache, seen = cache.extend(key_BLKE, value_BLKE, context.positions_BL)
        operands = dataclasses.replace(operands, prefix=context.prefix_in_cache(seen.positions_BT))
        keys_BKTE, values_BKTE, positions_BT = seen
        return cache, cached_attention(
            query_BLHE, keys_BKTE, values_BKTE, context.positions_BL, positions_BT, self._rule, operands
        )

    def _project(self, x_BLD, context: TokenContext):
        config, times = self.config, partial(multiply, self.execution)
        query_BLX, key_BLX, value_BLX = times(x_BLD, self.query), times(x_BLD, self.key), times(x_BLD, self.value)
        if config.bias:
            query_BLX, key_BLX, value_BLX = (
                y_BLX + bias_X.astype(y_BLX.dtype)
                for y_BLX, bias_X in zip(
                    (query_BLX, key_BLX, value_BLX), (self.query_bias, self.key_bias, self.value_bias)
                )
            )
        if config.qk_norm and config.qk_norm_over == "all_heads":
            query_BLX, key_BLX = self.query_norm(query_BLX), self.key_norm(key_BLX)
        query_BLHE = split_heads(query_BLX, config.num_heads, "heads")
        key_BLKE = split_heads(key_BLX, config.num_kv_heads, "kv_heads")
        value_BLKE = split_heads(value_BLX, config.num_kv_heads, "kv_heads")
        if config.qk_norm and config.qk_norm_over == "head":
            query_BLHE, key_BLKE = self.query_norm(query_BLHE), self.key_norm(key_BLKE)
        if config.rope is not None:
            angles = context.angles_of(config.rope, config.head_dim)
            query_BLHE, key_BLKE = apply_rope(query_BLHE, angles), apply_rope(key_BLKE, angles)
        return query_BLHE, key_BLKE, value_BLKE

    @property
    def _rule(self) -> AttentionRule:
        config = self.config
        scale = config.scale or 1 / math.sqrt(config.head_dim)
        return AttentionRule(scale=scale, window=config.window, soft_cap=config.soft_cap)

    def _operands(self, context: TokenContext) -> AttentionOperands:
        config = self.config
        bias: PositionBias | None = context.relative_bias if config.relative_bias is not None else None
        if config.alibi:
            bias = Alibi(shard(jnp.asarray(config.alibi_scale * alibi_slopes(config.num_heads)), "heads"))
        return AttentionOperands(
            position_bias=bias, sinks_N=self.sinks if config.sinks else None, virtual=self._virtual_tokens()
        )

    def _virtual_tokens(self) -> tuple[jax.Array, jax.Array] | None:
        """Their keys and values, [P, K, E]."""
        config = self.config
        if config.virtual_tokens is None:
            return None
        shape = (config.virtual_tokens, config.num_kv_heads, config.head_dim)
        axes = (None, "kv_heads", None)
        return reshape(self.virtual_key, shape, axes), reshape(self.virtual_value, shape, axes)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slope of each head: a geometric series from 2^(-8 / n) to 2^-8 for a power of two n (arXiv:2108.12409).

    For other numbers, the series of the next smaller power of two, and then every other slope of the next larger one.
    """
    series = lambda count: 2.0 ** (-8.0 * np.arange(1, count + 1) / count)  # noqa: E731
    power = 1 << (num_heads.bit_length() - 1)
    return np.concatenate([series(power), series(2 * power)[::2][: num_heads - power]]).astype(np.float32)
