"""Flash attention: what its implementations in blocks share, the backward pass and the sinks.

An implementation computes attention over all or some of the keys of a query, and the gradients of that.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, H head dim, V value dim.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from maxlm.core.remat import saved
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.rule import AttentionRule, mean_gradient


class Blocks(Protocol):
    """Attention without sinks, in blocks. `position_bias` of the operands is a `DistanceBias`."""

    @property
    def matmul_dtype(self) -> jnp.dtype: ...

    def forward(
        self, rule: AttentionRule, query_BTNH, key_BSKH, value_BSKV, operands: AttentionOperands
    ) -> tuple[Any, Any]:
        """The output [B, T, N, V], and the log-sum-exp of the logits [B, T, N] in float32.

        For a fully masked query they are 0 and +1e30, which makes its probabilities in `backward` exact zeros.
        """
        ...

    def backward(
        self,
        rule: AttentionRule,
        query_BTNH,
        key_BSKH,
        value_BSKV,
        operands: AttentionOperands,
        log_sum_BTN,
        mean_BTN,
        gradient_BTNV,
    ) -> tuple[Any, Any, Any, AttentionOperands]:
        """Gradients of query, key, value and the biases of the operands; the sums and means are over all keys."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash_attention(blocks: Blocks, rule: AttentionRule, query_BTNH, key_BSKH, value_BSKV, operands: AttentionOperands):
    """Attention as `dispatch.attention` defines it, in the dtype of the query."""
    return _forward(blocks, rule, query_BTNH, key_BSKH, value_BSKV, operands)[0]


def _forward(blocks: Blocks, rule: AttentionRule, query_BTNH, key_BSKH, value_BSKV, operands: AttentionOperands):
    output_BTNV, log_sum_BTN = blocks.forward(rule, query_BTNH, key_BSKH, value_BSKV, operands)
    output_BTNV, log_sum_BTN = add_sinks(output_BTNV, log_sum_BTN, operands.sinks_N)
    output_BTNV, log_sum_BTN = saved(output_BTNV.astype(query_BTNH.dtype)), saved(log_sum_BTN)
    return output_BTNV, (query_BTNH, key_BSKH, value_BSKV, operands, output_BTNV, log_sum_BTN)


def _backward(blocks: Blocks, rule: AttentionRule, residuals, gradient_BTNV):
    query_BTNH, key_BSKH, value_BSKV, operands, output_BTNV, log_sum_BTN = residuals
    mean_BTN = mean_gradient(output_BTNV, gradient_BTNV)
    *gradients, bias_gradients = blocks.backward(
        rule, query_BTNH, key_BSKH, value_BSKV, operands, log_sum_BTN, mean_BTN, gradient_BTNV
    )
    sinks_gradient_N = sinks_gradient(operands.sinks_N, log_sum_BTN, mean_BTN)
    return (
        *(gradient.astype(x.dtype) for gradient, x in zip(gradients, residuals)),
        dataclasses.replace(bias_gradients, sinks_N=sinks_gradient_N),
    )


flash_attention.defvjp(_forward, _backward)


def add_sinks(output_BTNV, log_sum_BTN, sinks_N):
    """Output and log-sum-exp with one more logit per head in the denominator, whose value is zero."""
    if sinks_N is None:
        return output_BTNV, log_sum_BTN
    total_BTN = jnp.logaddexp(log_sum_BTN, sinks_N.astype(jnp.float32))
    return output_BTNV * jnp.exp(log_sum_BTN - total_BTN)[..., None], total_BTN


def sinks_gradient(sinks_N, log_sum_BTN, mean_BTN):
    """The gradient of the sinks, from the log-sum-exp that includes them: their value is zero, so P (0 - mean)."""
    if sinks_N is None:
        return None
    probabilities_BTN = jnp.exp(sinks_N.astype(jnp.float32) - log_sum_BTN)
    return -jnp.sum(probabilities_BTN * mean_BTN, axis=(0, 1)).astype(sinks_N.dtype)
