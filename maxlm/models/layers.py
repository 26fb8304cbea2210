"""The layers of a decoder: attention and gated MLP, each behind an RMSNorm.

Dimensions: B batch, L length, D embed, H query heads, K key-value heads, E head_dim, F mlp, T cache slots.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import Normal, Parameter, ones
from maxlm.core.sharding import is_explicit, logical_to_spec, shard
from maxlm.core.term import LossOutput
from maxlm.models.cache import KVCache
from maxlm.ops.attention import attention
from maxlm.ops.attention_definition import cached_attention
from maxlm.ops.attention_operands import AttentionOperands
from maxlm.ops.attention_rule import AttentionRule
from maxlm.ops.context import context_attention
from maxlm.ops.linear import linear, operand_dtype
from maxlm.ops.norm import rms_norm
from maxlm.ops.ring import RowOrder
from maxlm.ops.rope import apply_rope

# Layout of the residual stream as input of attention and MLP.
TOKEN_AXES = ("batch", "length", None)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["angles", "segment_ids_BL"],
    meta_fields=["residual_axes", "row_order"],
)
@dataclass(frozen=True)
class TokenContext:
    """Token metadata for all layers; the first axis of each array is the batch.

    angles: cosines and sines of the rotary positions; segment_ids_BL: 0 is padding; residual_axes: sharding of the
    stream between layers; row_order: order of tokens in rows that are sharded along `context`.
    """

    angles: tuple[jax.Array, jax.Array]
    segment_ids_BL: jax.Array
    residual_axes: tuple[str | None, ...]
    row_order: RowOrder = "plain"


def weight(execution: ExecutionConfig, inputs: tuple[int, str], outputs: tuple[int, str], scale: float = 1.0) -> Any:
    """A matrix [in, out], each side given as (size, logical axis), drawn with variance scale^2 / in."""
    (in_size, in_axis), (out_size, out_axis) = inputs, outputs
    initializer = Normal(scale / math.sqrt(in_size))
    dtype = jnp.dtype(execution.parameter_dtype)
    return nnx.data(Parameter((in_size, out_size), (in_axis, out_axis), initializer, dtype, role="matrix"))


def norm_scale(size: int) -> Any:
    return nnx.data(Parameter((size,), ("norm",), ones, role="norm"))


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads and rotary positions."""

    def __init__(self, config: ModelConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        embed = (config.embed_dim, "embed")
        heads = (config.num_heads * config.head_dim, "heads")
        kv_heads = (config.num_kv_heads * config.head_dim, "kv_heads")
        self.query = weight(execution, embed, heads)
        self.key = weight(execution, embed, kv_heads)
        self.value = weight(execution, embed, kv_heads)
        self.out = weight(execution, heads, embed, scale=1 / math.sqrt(2 * config.num_layers))
        if config.qk_norm:
            self.query_norm = norm_scale(config.head_dim)
            self.key_norm = norm_scale(config.head_dim)

    def __call__(self, x_BLD, context: TokenContext, window: int | None):
        query_BLHE, key_BLKE, value_BLKE = self._project(x_BLD, context.angles)
        mixed_BLHE = _sharded_attention(self.config, self.execution, query_BLHE, key_BLKE, value_BLKE, context, window)
        return self._merge(mixed_BLHE, context.residual_axes)

    def decode(self, x_BLD, angles, positions_BL, cache: KVCache, layer, window: int | None):
        """Write the keys and values of x to the cache, then attend to it."""
        query_BLHE, key_BLKE, value_BLKE = self._project(x_BLD, angles)
        cache = cache.write(layer, key_BLKE, value_BLKE, positions_BL)
        mixed_BLHE = cached_attention(
            query_BLHE,
            jax.lax.dynamic_index_in_dim(cache.keys, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(cache.values, layer, keepdims=False),
            positions_BL,
            # The slot of a token is its position.
            jnp.arange(cache.max_length)[None],
            _rule(self.config, window),
        )
        return self._merge(mixed_BLHE, None), cache

    def _project(self, x_BLD, angles):
        config, times = self.config, partial(_times, self.execution)
        query_BLHE = _split_heads(times(x_BLD, self.query), config.num_heads, "heads")
        key_BLKE = _split_heads(times(x_BLD, self.key), config.num_kv_heads, "kv_heads")
        value_BLKE = _split_heads(times(x_BLD, self.value), config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            query_BLHE = rms_norm(query_BLHE, self.query_norm, config.norm_epsilon)
            key_BLKE = rms_norm(key_BLKE, self.key_norm, config.norm_epsilon)
        return apply_rope(query_BLHE, angles), apply_rope(key_BLKE, angles), value_BLKE

    def _merge(self, mixed_BLHE, output_axes):
        batch, length, heads, head_dim = mixed_BLHE.shape
        merged = _reshape(mixed_BLHE, (batch, length, heads * head_dim), ("batch", "length", "heads"))
        return _times(self.execution, merged, self.out, output_axes)


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, execution: ExecutionConfig, mlp_dim: int):
        self.config, self.execution = config, execution
        embed, mlp = (config.embed_dim, "embed"), (mlp_dim, "mlp")
        self.gate = weight(execution, embed, mlp)
        self.up = weight(execution, embed, mlp)
        self.down = weight(execution, mlp, embed, scale=1 / math.sqrt(2 * config.num_layers))

    def __call__(self, x_BLD, output_axes: tuple[str | None, ...] | None = None):
        times = partial(_times, self.execution)
        hidden_BLF = jax.nn.silu(times(x_BLD, self.gate)) * times(x_BLD, self.up)
        return times(hidden_BLF, self.down, output_axes)


class DecoderLayer(nnx.Module):
    """Pre-norm residual block.

    Between the blocks tokens are also sharded along the tensor axis (sequence parallelism), so norms and sums are not
    repeated on its devices (arXiv:2205.05198): a block all-gathers them, and reduce-scatters its last product.
    """

    def __init__(self, config: ModelConfig, execution: ExecutionConfig, mlp: Any):
        """`mlp`: an `Mlp`, or a mixture of experts if the configuration has one."""
        self.config = config
        self.attention_norm = norm_scale(config.embed_dim)
        self.attention = Attention(config, execution)
        self.mlp_norm = norm_scale(config.embed_dim)
        self.mlp = mlp

    def __call__(self, x_BLD, context: TokenContext, window: int | None):
        """The stream after this layer, and the layer's auxiliary losses."""
        epsilon = self.config.norm_epsilon
        normed_BLD = shard(rms_norm(x_BLD, self.attention_norm, epsilon), *TOKEN_AXES)
        x_BLD = x_BLD + self.attention(normed_BLD, context, window)
        normed_BLD = shard(rms_norm(x_BLD, self.mlp_norm, epsilon), *TOKEN_AXES)
        if self.config.moe is None:
            return x_BLD + self.mlp(normed_BLD, context.residual_axes), LossOutput({}, {})
        mixed_BLD, auxiliary = self.mlp(normed_BLD, context.segment_ids_BL, context.residual_axes)
        return x_BLD + mixed_BLD, auxiliary

    def decode(self, x_BLD, angles, positions_BL, cache, layer, window: int | None):
        epsilon = self.config.norm_epsilon
        mixed_BLD, cache = self.attention.decode(
            rms_norm(x_BLD, self.attention_norm, epsilon), angles, positions_BL, cache, layer, window
        )
        x_BLD = x_BLD + mixed_BLD
        normed_BLD = rms_norm(x_BLD, self.mlp_norm, epsilon)
        mixed_BLD = self.mlp(normed_BLD) if self.config.moe is None else self.mlp.decode(normed_BLD, positions_BL)
        return x_BLD + mixed_BLD, cache


def _times(execution: ExecutionConfig, x, weight, output_axes: tuple[str | None, ...] | None = None):
    """The product with a weight of the layers."""
    return linear(x, weight, execution.layer_matmul_dtype, output_axes, gradient_sum=execution.gradient_sum_dtype)


def _split_heads(x_BLX, num_heads: int, axis: str):
    batch, length, features = x_BLX.shape
    return _reshape(x_BLX, (batch, length, num_heads, features // num_heads), ("batch", "length", axis, None))


def _reshape(x, shape: tuple[int, ...], axes: tuple[str | None, ...]):
    """Reshape with a named sharding: otherwise a head axis of size 1 would lose its mesh axis."""
    return jax.lax.reshape(x, shape, out_sharding=logical_to_spec(axes)) if is_explicit() else x.reshape(shape)


def _sharded_attention(
    config: ModelConfig, execution: ExecutionConfig, query_BLHE, key_BLKE, value_BLKE, context: TokenContext, window
):
    """Attention on each device's own rows and heads, and across the devices that share a row, if sharded."""
    rule = _rule(config, window)
    operands = AttentionOperands(segments=(context.segment_ids_BL, context.segment_ids_BL))
    implementation = None if execution.attention == "auto" else execution.attention
    settings: dict[str, Any] = {
        "implementation": implementation,
        "matmul_dtype": jnp.dtype(operand_dtype(execution.matmul_dtype)),
    }
    if not is_explicit():
        return attention(query_BLHE, key_BLKE, value_BLKE, rule, operands, **settings)
    heads = logical_to_spec(("batch", "length", "heads", None))
    kv_heads = logical_to_spec(("batch", "length", "kv_heads", None))

    def local(query_BLHE, key_BLKE, value_BLKE, operands):
        method, order = execution.context_attention, context.row_order
        return context_attention(
            query_BLHE, key_BLKE, value_BLKE, rule, operands, method=method, order=order, **settings
        )

    return jax.shard_map(local, in_specs=(heads, kv_heads, kv_heads, P(*heads[:2])), out_specs=heads, check_vma=False)(
        query_BLHE, key_BLKE, value_BLKE, operands
    )


def _rule(config: ModelConfig, window: int | None) -> AttentionRule:
    return AttentionRule(scale=1 / math.sqrt(config.head_dim), window=window, soft_cap=config.attention_soft_cap)
