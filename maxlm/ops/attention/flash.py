"""Flash attention: what its implementations in blocks share, the backward pass, virtual tokens and sinks.

An implementation computes attention over all or some of the keys of a query, and the gradients of that. Its arrays have
heads before tokens, as its products need them: a loop over parts of the keys transposes nothing.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, H head dim, V value dim, P virtual
tokens.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from maxlm.core.remat import saved
from maxlm.ops.attention.flash_xla import Blockwise
from maxlm.ops.attention.operands import NO_OPERANDS, AttentionOperands
from maxlm.ops.attention.rule import AttentionRule, mean_gradient


class Blocks(Protocol):
    """Attention without sinks and virtual tokens, in blocks. `position_bias` of the operands is a `DistanceBias`."""

    @property
    def matmul_dtype(self) -> jnp.dtype: ...

    def forward(
        self, rule: AttentionRule, query_BNTH, key_BKSH, value_BKSV, operands: AttentionOperands
    ) -> tuple[Any, Any]:
        """The output [B, N, T, V], and the log-sum-exp of the logits [B, N, T] in float32.

        For a fully masked query they are 0 and +1e30, which makes its probabilities in `backward` exact zeros.
        """
        ...

    def backward(
        self,
        rule: AttentionRule,
        query_BNTH,
        key_BKSH,
        value_BKSV,
        operands: AttentionOperands,
        log_sum_BNT,
        mean_BNT,
        gradient_BNTV,
    ) -> tuple[Any, Any, Any, AttentionOperands]:
        """Gradients of query, key, value and the biases of the operands; the sums and means are over all keys."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash_attention(blocks: Blocks, rule: AttentionRule, query_BTNH, key_BSKH, value_BSKV, operands: AttentionOperands):
    """Attention as `dispatch.attention` defines it, in the dtype of the query."""
    return _forward(blocks, rule, query_BTNH, key_BSKH, value_BSKV, operands)[0]


def _forward(blocks: Blocks, rule: AttentionRule, query_BTNH, key_BSKH, value_BSKV, operands: AttentionOperands):
    query_BNTH, key_BKSH, value_BKSV = heads_first(query_BTNH, key_BSKH, value_BSKV)
    output_BNTV, log_sum_BNT = blocks.forward(rule, query_BNTH, key_BKSH, value_BKSV, operands)
    output_BNTV, log_sum_BNT = add_virtual(
        blocks.matmul_dtype, rule, query_BNTH, output_BNTV, log_sum_BNT, operands.virtual
    )
    output_BNTV, log_sum_BNT = add_sinks(output_BNTV, log_sum_BNT, operands.sinks_N)
    output_BTNV, log_sum_BNT = saved(output_BNTV.swapaxes(1, 2).astype(query_BTNH.dtype)), saved(log_sum_BNT)
    return output_BTNV, (query_BTNH, key_BSKH, value_BSKV, operands, output_BTNV, log_sum_BNT)


def _backward(blocks: Blocks, rule: AttentionRule, residuals, gradient_BTNV):
    query_BTNH, key_BSKH, value_BSKV, operands, output_BTNV, log_sum_BNT = residuals
    mean_BNT = mean_gradient(output_BTNV, gradient_BTNV).swapaxes(1, 2)
    query_BNTH, key_BKSH, value_BKSV, gradient_BNTV = heads_first(query_BTNH, key_BSKH, value_BSKV, gradient_BTNV)
    *gradients, bias_gradients = blocks.backward(
        rule, query_BNTH, key_BKSH, value_BKSV, operands, log_sum_BNT, mean_BNT, gradient_BNTV
    )
    from_virtual_BNTH, virtual_gradient = virtual_gradients(
        blocks.matmul_dtype, rule, query_BNTH, operands.virtual, log_sum_BNT, mean_BNT, gradient_BNTV
    )
    gradients[0] = gradients[0] + from_virtual_BNTH
    sinks_gradient_N = sinks_gradient(operands.sinks_N, log_sum_BNT, mean_BNT)
    return (
        *(gradient.swapaxes(1, 2).astype(x.dtype) for gradient, x in zip(gradients, residuals)),
        dataclasses.replace(bias_gradients, sinks_N=sinks_gradient_N, virtual=virtual_gradient),
    )


flash_attention.defvjp(_forward, _backward)


def heads_first(*arrays_BTNH):
    return tuple(x_BTNH.swapaxes(1, 2) for x_BTNH in arrays_BTNH)


def add_virtual(matmul_dtype: jnp.dtype, rule: AttentionRule, query_BNTH, output_BNTV, log_sum_BNT, virtual):
    """Output and log-sum-exp with virtual tokens, which are one more piece of the keys.

    A fully masked query keeps its zeros: beside its log-sum of +1e30, the virtual tokens weigh nothing.
    """
    if virtual is None:
        return output_BNTV, log_sum_BNT
    key_BKPH, value_BKPV = _of_rows(virtual, query_BNTH.shape[0])
    new_BNTV, new_log_sum_BNT = Blockwise(matmul_dtype).forward(
        _unmasked(rule), query_BNTH, key_BKPH, value_BKPV, NO_OPERANDS
    )
    total_BNT = jnp.logaddexp(log_sum_BNT, new_log_sum_BNT)
    share_BNT1, new_share_BNT1 = (jnp.exp(part - total_BNT)[..., None] for part in (log_sum_BNT, new_log_sum_BNT))
    return output_BNTV * share_BNT1 + new_BNTV * new_share_BNT1, total_BNT


def virtual_gradients(
    matmul_dtype: jnp.dtype, rule: AttentionRule, query_BNTH, virtual, log_sum_BNT, mean_BNT, gradient_BNTV
) -> tuple[Any, tuple[jax.Array, jax.Array] | None]:
    """What virtual tokens add to the gradient of the query, and the gradients of their keys and values.

    Log-sums and means are over all keys, virtual tokens and sinks.
    """
    if virtual is None:
        return 0.0, None
    key_BKPH, value_BKPV = _of_rows(virtual, query_BNTH.shape[0])
    query_gradient_BNTH, *of_rows, _ = Blockwise(matmul_dtype).backward(
        _unmasked(rule),
        query_BNTH,
        key_BKPH,
        value_BKPV,
        NO_OPERANDS,
        log_sum_BNT,
        mean_BNT,
        gradient_BNTV,
    )
    key_PKH, value_PKV = (
        jnp.sum(x, axis=0).swapaxes(0, 1).astype(like.dtype) for x, like in zip(of_rows, virtual, strict=True)
    )
    return query_gradient_BNTH, (key_PKH, value_PKV)


def _of_rows(virtual: tuple[jax.Array, jax.Array], batch: int) -> tuple[jax.Array, jax.Array]:
    """Keys [B, K, P, H] and values [B, K, P, V]: the same for all rows."""
    key_KPH, value_KPV = (x.swapaxes(0, 1) for x in virtual)
    return jnp.broadcast_to(key_KPH, (batch, *key_KPH.shape)), jnp.broadcast_to(value_KPV, (batch, *value_KPV.shape))


def _unmasked(rule: AttentionRule) -> AttentionRule:
    return dataclasses.replace(rule, causal=False, window=None, offset=0)


def add_sinks(output_BNTV, log_sum_BNT, sinks_N):
    """Output and log-sum-exp with one more logit per head in the denominator, whose value is zero."""
    if sinks_N is None:
        return output_BNTV, log_sum_BNT
    total_BNT = jnp.logaddexp(log_sum_BNT, sinks_N.astype(jnp.float32)[:, None])
    return output_BNTV * jnp.exp(log_sum_BNT - total_BNT)[..., None], total_BNT


def sinks_gradient(sinks_N, log_sum_BNT, mean_BNT):
    """The gradient of the sinks, from the log-sum-exp that includes them: their value is zero, so P (0 - mean)."""
    if sinks_N is None:
        return None
    probabilities_BNT = jnp.exp(sinks_N.astype(jnp.float32)[:, None] - log_sum_BNT)
    return -jnp.sum(probabilities_BNT * mean_BNT, axis=(0, 2)).astype(sinks_N.dtype)
