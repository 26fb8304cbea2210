"""What kinds of attention have in common: heads, and attention over devices.

Dimensions: B batch, L length, X features, H query heads, K key-value heads, E head_dim, V channels of a value.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.config.execution import ExecutionConfig
from maxlm.core.sharding import is_explicit, logical_to_spec
from maxlm.layers.context import TokenContext
from maxlm.ops.attention.context import context_attention
from maxlm.ops.attention.dispatch import attention
from maxlm.ops.attention.operands import NO_OPERANDS, AttentionOperands
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.dropout import WeightDropout
from maxlm.ops.linear import operand_dtype


def attend(
    execution: ExecutionConfig,
    query_BLHE: jax.Array,
    key_BLKE: jax.Array,
    value_BLKV: jax.Array,
    rule: AttentionRule,
    context: TokenContext,
    by_head: AttentionOperands = NO_OPERANDS,
    *,
    kv_axis: str = "kv_heads",
) -> jax.Array:
    """[B, L, H, V]: attention on each device's own rows and heads, and across the devices that share a row, if sharded.

    Args:
      by_head: `position_bias` and `sinks_N`, of the query heads; `virtual`, of those of keys and values.
      kv_axis: the logical axis of the heads of keys and values.
    """
    dropout = None if context.noise is None else context.noise.attention_weights(query_BLHE.shape[2])
    operands = dataclasses.replace(
        by_head,
        segments=(context.segment_ids_BL, context.segment_ids_BL),
        prefix=context.prefix,
        dropout=dropout,
    )
    settings: dict[str, Any] = {
        "implementation": None if execution.attention == "auto" else execution.attention,
        "matmul_dtype": jnp.dtype(operand_dtype(execution.matmul_dtype)),
    }
    if not is_explicit():
        return attention(query_BLHE, key_BLKE, value_BLKV, rule, operands, **settings)

    def local(query_BLHE, key_BLKE, value_BLKV, operands):
        settings_of_rows = {"method": execution.context_attention, "order": context.row_order, **settings}
        return context_attention(query_BLHE, key_BLKE, value_BLKV, rule, operands, **settings_of_rows)

    heads = logical_to_spec(("batch", "length", "heads", None))
    kv_heads = logical_to_spec(("batch", "length", kv_axis, None))
    tokens, vector = P(*heads[:2]), logical_to_spec(("heads",))
    specs: Any = AttentionOperands(
        segments=cast(Any, (tokens, tokens)),
        prefix=operands.prefix and cast(Any, (tokens, tokens)),
        # The last axis of a vector or a table is over heads.
        position_bias=jax.tree.map(lambda x: P(*[None] * (x.ndim - 1), *vector), operands.position_bias),
        sinks_N=None if operands.sinks_N is None else cast(Any, vector),
        virtual=operands.virtual and (cast(Any, P(None, *kv_heads[2:])),) * 2,
        dropout=dropout and WeightDropout(cast(Any, P(*heads[:3])), cast(Any, tokens), dropout.rate),
    )
    return jax.shard_map(local, in_specs=(heads, kv_heads, kv_heads, specs), out_specs=heads, check_vma=False)(
        query_BLHE, key_BLKE, value_BLKV, operands
    )


def split_heads(x_BLX: jax.Array, num_heads: int, axis: str) -> jax.Array:
    """[B, L, heads, features of a head]."""
    batch, length, features = x_BLX.shape
    return reshape(x_BLX, (batch, length, num_heads, features // num_heads), ("batch", "length", axis, None))


def merge_heads(x_BLHV: jax.Array) -> jax.Array:
    """[B, L, H * V]."""
    batch, length, heads, channels = x_BLHV.shape
    return reshape(x_BLHV, (batch, length, heads * channels), ("batch", "length", "heads"))


def reshape(x: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """Reshape with a named sharding: otherwise a head axis of size 1 would lose its mesh axis."""
    return jax.lax.reshape(x, shape, out_sharding=logical_to_spec(axes)) if is_explicit() else x.reshape(shape)
