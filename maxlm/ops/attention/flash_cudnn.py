"""cuDNN's flash attention, for NVIDIA GPUs, and what it does not support.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, H head dim.
"""

import jax
import jax.numpy as jnp

from maxlm.core.hardware import traced_platform
from maxlm.ops.attention.operands import NO_OPERANDS, AttentionOperands
from maxlm.ops.attention.rule import AttentionRule


def cudnn_attention(
    rule: AttentionRule, query_BTNH, key_BSKH, value_BSKH, operands: AttentionOperands = NO_OPERANDS
) -> jax.Array:
    """Attention as `dispatch.attention` defines it, where `cudnn_obstacle` is None.

    Segments, windows, prefixes and keys beyond the queries are passed as a mask, the only form that cuDNN applies
    exactly; only causality stays a flag, so that the kernel can skip masked blocks.
    """
    plainly_causal = rule.causal and operands.prefix is None and rule.offset == 0
    visible_BNTS = None
    if rule.window is not None or operands.has_mask or rule.causal != plainly_causal:
        positions = jnp.arange(query_BTNH.shape[1]), jnp.arange(key_BSKH.shape[1])
        visible_BNTS = operands.visible(rule, *positions)
    output_BTNH = jax.nn.dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKH,
        mask=visible_BNTS,
        is_causal=plainly_causal,
        scale=rule.scale,
        implementation="cudnn",
    )
    if visible_BNTS is None:
        return output_BTNH
    # cuDNN's masked logits are finite: a query with all keys masked would average over all of them.
    sees_any_BTN1 = jnp.any(visible_BNTS, axis=-1).swapaxes(1, 2)[..., None]
    return jnp.where(sees_any_BTN1, output_BTNH, 0)


def cudnn_obstacle(
    query_BTNH, value_BSKV, rule: AttentionRule, operands: AttentionOperands, matmul_dtype: jnp.dtype
) -> str | None:
    """Why cuDNN cannot compute this here, as the end of a sentence; None if it can."""
    if (platform := traced_platform()) != "cuda":
        return f"needs an NVIDIA GPU, not {platform}; choose 'xla' or None"
    length, head_dim = query_BTNH.shape[1], query_BTNH.shape[-1]
    kv_length, value_dim = value_BSKV.shape[1], value_BSKV.shape[-1]
    unsupported = {
        "a soft cap": rule.soft_cap is not None,
        "sinks": operands.sinks_N is not None,
        "virtual tokens": operands.virtual is not None,
        # JAX returns the gradient of a bias only for some of its shapes, and zeros for the others.
        "a position_bias": operands.position_bias is not None,
        "an array of biases": operands.bias_BNTS is not None,
        "dropout of weights": operands.dropout is not None,
        f"a value_dim of {value_dim} with a head_dim of {head_dim}": value_dim != head_dim,
    }
    for name, given in unsupported.items():
        if given:
            return f"does not support {name}; choose 'xla' or None"
    if matmul_dtype not in (jnp.bfloat16, jnp.float16):
        return f"multiplies 16-bit floats, not {matmul_dtype}; set matmul_dtype to bfloat16, or choose 'xla' or None"
    if length % 2 or kv_length % 2:
        return f"needs even lengths, not {length} and {kv_length}; choose 'xla' or None"
    if head_dim % 8 or head_dim > 128:
        return f"needs a head_dim that is a multiple of 8 up to 128, not {head_dim}; choose 'xla' or None"
    return None
