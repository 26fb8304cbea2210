"""Scaled dot-product attention: one signature, several implementations, and a reference.

`implementation=None` takes the best available one; a named one works or raises:

| name         | description                                                                       |
| ------------ | --------------------------------------------------------------------------------- |
| `pallas_tpu` | flash attention in Pallas, for TPUs                                               |
| `cudnn`      | cuDNN's flash attention, for NVIDIA GPUs: 16-bit operands, no soft cap            |
| `xla`        | blockwise in plain XLA, any device: skips masked blocks, recomputes in backward   |
| `reference`  | the definition, in float32, any device                                            |

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.core.hardware import traced_platform
from maxlm.errors import ConfigError
from maxlm.ops import flash_tpu, flash_xla
from maxlm.ops.attention_rule import MASKED_LOGIT, AttentionRule

IMPLEMENTATIONS = ("pallas_tpu", "cudnn", "xla", "reference")

# For less than one block of lanes, padding costs more than the kernel saves.
_SHORTEST_FOR_PALLAS = 128

_NEEDS_TPU = "needs a TPU, not {}; choose 'xla' or None"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    matmul_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """softmax(mask(soft_cap(query . key * scale))) . value, with the softmax in float32.

    Query head h uses key-value head h // (N / K). A query with all keys masked, as in padding rows, returns exact
    zeros and has zero gradients. Positions of queries and keys both start at 0.

    The kernels compute one device's own rows and heads: under a mesh call this inside
    `jax.shard_map(..., check_vma=False)`; `xla` and `reference` also accept sharded arrays.

    Args:
      query: [batch, length, num_heads, head_dim].
      key, value: [batch, kv_length, num_kv_heads, head_dim].
      segment_ids: int [batch, length]; tokens attend only to their own segment, and 0 is padding.
      kv_segment_ids: int [batch, kv_length]; by default `segment_ids`.
      causal: token i attends to j only if j <= i.
      window: token i attends to j only if i - j < window; without `causal`, |i - j| < window.
      soft_cap: a logit x becomes soft_cap * tanh(x / soft_cap).
      scale: factor on the dot products; by default head_dim ** -0.5.
      implementation: one of `IMPLEMENTATIONS`, or None for the best available.
      matmul_dtype: dtype of the operands of matrix products, which accumulate in float32; by default the query's
        dtype. `reference` always computes in float32.

    Returns:
      [batch, length, num_heads, head_dim] in the query's dtype.

    Raises:
      ConfigError: the implementation is unknown, or not available here.
      ValueError: shapes or arguments are inconsistent.
    """
    _check_arguments(query, key, value, segment_ids, kv_segment_ids, window, soft_cap)
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    matmul_dtype = jnp.dtype(query.dtype if matmul_dtype is None else matmul_dtype)
    rule = AttentionRule(causal, window, soft_cap, query.shape[-1] ** -0.5 if scale is None else scale)

    if implementation is None:
        implementation = _best_implementation(query, key.shape[1], rule, matmul_dtype)
    elif implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(IMPLEMENTATIONS)
        raise ConfigError([f"attention implementation {implementation!r} is unknown; allowed are {allowed}"])
    elif obstacle := _obstacle(implementation, query, key.shape[1], rule, matmul_dtype):
        raise ConfigError([f"attention implementation {implementation!r} {obstacle}"])

    match implementation:
        case "reference":
            return reference_attention(rule, query, key, value, segment_ids, kv_segment_ids)
        case "xla":
            return flash_xla.flash_attention(rule, matmul_dtype, query, key, value, segment_ids, kv_segment_ids)
    operands = (x.astype(matmul_dtype) for x in (query, key, value))
    kernel: Any = flash_tpu.flash_attention if implementation == "pallas_tpu" else _cudnn_attention
    return kernel(rule, *operands, segment_ids, kv_segment_ids).astype(query.dtype)


def reference_attention(rule: AttentionRule, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS) -> jax.Array:
    """The definition of attention, in float32, with the whole [length, kv_length] matrix in memory."""
    batch, length, num_heads, head_dim = query_BTNH.shape
    num_kv_heads = key_BSKH.shape[2]
    query, key, value = (x.astype(jnp.float32) for x in (query_BTNH, key_BSKH, value_BSKH))
    query = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits_BKGTS = rule.logits(jnp.einsum("btkgh,bskh->bkgts", query, key, precision="highest"))
    visible_B11TS = _visible(rule, length, key_BSKH.shape[1], segments_BT, segments_BS)[:, None]
    probabilities_BKGTS = jax.nn.softmax(jnp.where(visible_B11TS, logits_BKGTS, MASKED_LOGIT), axis=-1)
    # Zero where all keys are masked: softmax would be uniform over them.
    probabilities_BKGTS = jnp.where(visible_B11TS, probabilities_BKGTS, 0.0)
    output_BTKGH = jnp.einsum("bkgts,bskh->btkgh", probabilities_BKGTS, value, precision="highest")
    return output_BTKGH.reshape(query_BTNH.shape).astype(query_BTNH.dtype)


def _visible(rule: AttentionRule, length: int, kv_length: int, segments_BT, segments_BS) -> jax.Array:
    """The attention mask, bool [B or 1, 1, T, S]: True where a query may attend to a key."""
    visible = rule.sees(jnp.arange(length)[:, None], jnp.arange(kv_length)[None, :])
    visible = jnp.broadcast_to(visible, (1, 1, length, kv_length))
    if segments_BT is not None:
        query_segment, key_segment = segments_BT[:, None, :, None], segments_BS[:, None, None, :]
        visible = visible & (query_segment == key_segment) & (query_segment != 0)
    return visible


def _cudnn_attention(rule: AttentionRule, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS) -> jax.Array:
    """cuDNN's flash attention.

    Segments, windows and keys beyond the queries are passed as a mask, the only form that cuDNN applies exactly;
    only causality stays a flag, so that the kernel can skip masked blocks.
    """
    length, kv_length = query_BTNH.shape[1], key_BSKH.shape[1]
    masked = segments_BT is not None or rule.window is not None
    visible = _visible(rule, length, kv_length, segments_BT, segments_BS) if masked else None
    output_BTNH = jax.nn.dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKH,
        mask=visible,
        is_causal=rule.causal,
        scale=rule.scale,
        implementation="cudnn",
    )
    if visible is None:
        return output_BTNH
    # cuDNN's masked logits are finite: a query with all keys masked would average over all of them.
    sees_any_BT11 = jnp.any(visible, axis=-1).swapaxes(1, 2)[..., None]
    return jnp.where(sees_any_BT11, output_BTNH, 0)


def _best_implementation(query, kv_length: int, rule: AttentionRule, matmul_dtype) -> str:
    platform = traced_platform()
    if platform == "tpu" and query.shape[1] >= _SHORTEST_FOR_PALLAS:
        return "pallas_tpu"
    if platform == "cuda" and not _obstacle("cudnn", query, kv_length, rule, matmul_dtype):
        return "cudnn"
    return "xla"


def in_pieces(implementation: str | None, query_length: int, matmul_dtype: jnp.dtype):
    """The `forward` and `backward` of attention over part of the keys, for merging parts.

    Raises:
      ConfigError: the implementation does not support parts, or is not available here.
    """
    platform = traced_platform()
    if implementation is None:
        implementation = "pallas_tpu" if platform == "tpu" and query_length >= _SHORTEST_FOR_PALLAS else "xla"
    match implementation:
        case "xla":
            return flash_xla.Blockwise(matmul_dtype)
        case "pallas_tpu" if platform == "tpu":
            return flash_tpu.Kernels(matmul_dtype)
        case "pallas_tpu":
            raise ConfigError([f"attention implementation 'pallas_tpu' {_NEEDS_TPU.format(platform)}"])
    raise ConfigError(
        [
            f"attention implementation {implementation!r} does not support ring attention over mesh.context, which"
            " merges parts of a row; choose 'xla' or 'auto', or execution.context_attention: all_to_all"
        ]
    )


def _obstacle(implementation: str, query, kv_length: int, rule: AttentionRule, matmul_dtype) -> str | None:
    """Why the implementation is not available here, as the end of a sentence; None if it is."""
    platform = traced_platform()
    if implementation == "pallas_tpu" and platform != "tpu":
        return _NEEDS_TPU.format(platform)
    if implementation != "cudnn":
        return None
    if platform != "cuda":
        return f"needs an NVIDIA GPU, not {platform}; choose 'xla' or None"
    if rule.soft_cap is not None:
        return "does not support a soft cap; choose 'xla' or None"
    if matmul_dtype not in (jnp.bfloat16, jnp.float16):
        return f"multiplies 16-bit floats, not {matmul_dtype}; set matmul_dtype to bfloat16, or choose 'xla' or None"
    if query.shape[1] % 2 or kv_length % 2:
        return f"needs even lengths, not {query.shape[1]} and {kv_length}; choose 'xla' or None"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"needs a head_dim that is a multiple of 8 up to 128, not {query.shape[-1]}; choose 'xla' or None"
    return None


def _check_arguments(query, key, value, segment_ids, kv_segment_ids, window, soft_cap) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "attention takes query [batch, length, num_heads, head_dim] and key, value [batch, kv_length, num_kv_heads,"
            f" head_dim]; it got {query.shape}, {key.shape} and {value.shape}"
        )
    batch, length, num_heads, head_dim = query.shape
    if (batch, head_dim) != (key.shape[0], key.shape[3]):
        raise ValueError(f"query {query.shape} and key {key.shape} must agree in batch and head_dim")
    if num_heads % key.shape[2]:
        raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {key.shape[2]}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}; None means no window")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, not {soft_cap}; None means no cap")
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("kv_segment_ids needs segment_ids as well; pass ones for queries without padding")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [batch, length] {(batch, length)}, not {segment_ids.shape}")
    if segment_ids is not None:
        keys = segment_ids if kv_segment_ids is None else kv_segment_ids
        if keys.shape != key.shape[:2]:
            raise ValueError(f"kv_segment_ids must be [batch, kv_length] {key.shape[:2]}, not {keys.shape}")
