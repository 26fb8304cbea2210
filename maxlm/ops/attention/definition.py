"""The definition of attention, and attention to a cache, which is the definition at given positions.

Shapes: B batch, T query length, S key length or cache slots, N query heads, K key-value heads, G = N / K, H head dim,
V value dim, P virtual tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maxlm.ops.attention.operands import NO_OPERANDS, AttentionOperands, group_heads
from maxlm.ops.attention.rule import MASKED_LOGIT, AttentionRule


def reference_attention(
    rule: AttentionRule, query_BTNH, key_BSKH, value_BSKV, operands: AttentionOperands = NO_OPERANDS
) -> jax.Array:
    """Attention as `dispatch.attention` defines it, in float32, with all logits in memory."""
    query, key, value = (
        x.astype(jnp.float32) for x in (query_BTNH, key_BSKH.swapaxes(1, 2), value_BSKV.swapaxes(1, 2))
    )
    positions = jnp.arange(query.shape[1]), jnp.arange(key.shape[2])
    return _attend(rule, query, key, value, *positions, operands, "highest").astype(query_BTNH.dtype)


def cached_attention(
    query_BTNH: jax.Array,
    key_BKSH: jax.Array,
    value_BKSV: jax.Array,
    query_position_BT: jax.Array,
    key_position_BS: jax.Array,
    rule: AttentionRule,
    operands: AttentionOperands = NO_OPERANDS,
) -> jax.Array:
    """Attention of new queries to a cache of keys and values, as `dispatch.attention` defines it.

    What a query sees depends on positions and operands only: slots may hold any positions in any order, as in a ring
    buffer. Products accumulate in float32; heads of the cache are not repeated, and it is not copied.

    Args:
      query_BTNH: new queries.
      key_BKSH, value_BKSV: the cache, heads before slots: the layout of the products on every device.
      query_position_BT: int; a query at -1 (padding) returns zeros.
      key_position_BS: int, the position in each slot, [batch or 1, slots]; a slot with -1 is empty.
      rule: scale, soft cap, and which positions attend to which.
      operands: as in `attention`; ids are of the queries [B, T] and of the slots [B, S].

    Returns:
      [B, T, N, V] in the query's dtype.
    """
    exists = (query_position_BT[:, None, :, None] >= 0) & (key_position_BS[:, None, None, :] >= 0)
    mask_BNTS = exists if operands.mask_BNTS is None else exists & operands.mask_BNTS
    operands = dataclasses.replace(operands, mask_BNTS=mask_BNTS)
    # CPUs lack some products of 16-bit operands with float32 sums. On TPUs the conversions are part of the products.
    query, value = query_BTNH.astype(jnp.float32), value_BKSV.astype(jnp.float32)
    output_BTNV = _attend(rule, query, key_BKSH, value, query_position_BT, key_position_BS, operands)
    return output_BTNV.astype(query_BTNH.dtype)


def _attend(
    rule: AttentionRule,
    query_BTNH,
    key_BKSH,
    value_BKSV,
    query_position,
    key_position,
    operands: AttentionOperands,
    precision: str | None = None,
) -> jax.Array:
    """float32 [B, T, N, V], for float32 queries and values; positions as in `AttentionOperands.visible`."""
    batch, length, num_heads, head_dim = query_BTNH.shape
    num_kv_heads = key_BKSH.shape[1]
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    query_BTKGH = query_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits_BKGTS = rule.logits(product("btkgh,bksh->bkgts", query_BTKGH, key_BKSH))
    if operands.position_bias is not None:
        distance_BTS = query_position[..., :, None] - key_position[..., None, :] + rule.offset
        bias_BNTS = jnp.moveaxis(operands.position_bias.at(distance_BTS), 0, -3)
        logits_BKGTS += group_heads(bias_BNTS.reshape(-1, *bias_BNTS.shape[-3:]), num_kv_heads)
    if operands.bias_BNTS is not None:
        logits_BKGTS += group_heads(operands.bias_BNTS.astype(jnp.float32), num_kv_heads)
    visible_BNTS = operands.visible(rule, query_position, key_position)
    visible_BKGTS = visible_BNTS if visible_BNTS is True else group_heads(visible_BNTS, num_kv_heads)
    if operands.virtual is not None:
        # Only logits are concatenated: a cache of keys would be copied.
        virtual_BKGTP = rule.logits(product("btkgh,pkh->bkgtp", query_BTKGH, operands.virtual[0]))
        visible_BKGTS = jnp.broadcast_to(visible_BKGTS, logits_BKGTS.shape)
        sees_any_BKGTP = jnp.broadcast_to(jnp.any(visible_BKGTS, axis=-1, keepdims=True), virtual_BKGTP.shape)
        logits_BKGTS = jnp.concatenate([logits_BKGTS, virtual_BKGTP], axis=-1)
        visible_BKGTS = jnp.concatenate([visible_BKGTS, sees_any_BKGTP], axis=-1)
    logits_BKGTS = jnp.where(visible_BKGTS, logits_BKGTS, MASKED_LOGIT)
    # Zero where all keys are masked: softmax would be uniform over them.
    probabilities_BKGTS = jnp.where(visible_BKGTS, _softmax(logits_BKGTS, operands.sinks_N), 0.0)
    of_virtual_BKGTP = probabilities_BKGTS[..., key_BKSH.shape[2] :]
    probabilities_BKGTS = probabilities_BKGTS[..., : key_BKSH.shape[2]]
    if operands.dropout is not None:
        probabilities_BKGTS = operands.dropout.apply(probabilities_BKGTS)
    # Heads first: for the layout of the result, CPUs would transpose the values instead.
    output_BKGTV = product("bkgts,bksh->bkgth", probabilities_BKGTS, value_BKSV)
    if operands.virtual is not None:
        output_BKGTV += product("bkgtp,pkh->bkgth", of_virtual_BKGTP, operands.virtual[1].astype(jnp.float32))
    return jnp.moveaxis(output_BKGTV, 3, 1).reshape(batch, length, num_heads, value_BKSV.shape[-1])


def _softmax(logits_BKGTS, sinks_N):
    """Softmax over the keys and, if there are sinks, over one more logit that is then dropped."""
    if sinks_N is None:
        return jax.nn.softmax(logits_BKGTS, axis=-1)
    sinks_KG11 = sinks_N.astype(jnp.float32).reshape(*logits_BKGTS.shape[1:3], 1, 1)
    sinks_BKGT1 = jnp.broadcast_to(sinks_KG11, (*logits_BKGTS.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([logits_BKGTS, sinks_BKGT1], axis=-1), axis=-1)[..., :-1]
