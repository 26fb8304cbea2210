"""Scaled dot-product attention: one signature, several implementations.

`implementation=None` takes the best available one; a named one works or raises:

| name         | description                                                                       |
| ------------ | --------------------------------------------------------------------------------- |
| `pallas_tpu` | flash attention in Pallas, for TPUs: no array of biases                           |
| `cudnn`      | cuDNN's flash attention, for NVIDIA GPUs: 16-bit operands, masks of any form      |
| `xla`        | blockwise in plain XLA, any device: skips masked blocks, recomputes in backward   |
| `reference`  | the definition, in float32, any device                                            |

`definition.cached_attention` is the same for new queries and a cache of keys and values.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, H head dim, V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maxlm.core.hardware import traced_platform
from maxlm.errors import ConfigError
from maxlm.ops.attention.definition import reference_attention
from maxlm.ops.attention.flash import Blocks, flash_attention
from maxlm.ops.attention.flash_cudnn import cudnn_attention, cudnn_obstacle
from maxlm.ops.attention.flash_tpu import Kernels
from maxlm.ops.attention.flash_xla import Blockwise
from maxlm.ops.attention.operands import NO_OPERANDS, AttentionOperands, check_operands
from maxlm.ops.attention.rule import AttentionRule

IMPLEMENTATIONS = ("pallas_tpu", "cudnn", "xla", "reference")

# For less than one block of lanes, padding costs more than the kernel saves.
_SHORTEST_FOR_PALLAS = 128

_NEEDS_TPU = "needs a TPU, not {}; choose 'xla' or None"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rule: AttentionRule,
    operands: AttentionOperands = NO_OPERANDS,
    *,
    implementation: str | None = None,
    matmul_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """softmax(mask(soft_cap(query . key * scale) + biases)) . value, with the softmax in float32.

    Query head h uses key-value head h // (N / K). A query with all keys masked, as in padding rows, returns exact
    zeros and has zero gradients. Positions of keys start at 0, those of queries at `rule.offset`. `query`, `key`,
    `value` and the float arrays of `operands` have gradients.

    The kernels compute one device's own rows and heads: under a mesh call this inside
    `jax.shard_map(..., check_vma=False)`; `xla` and `reference` also accept sharded arrays.

    Args:
      query: [batch, length, num_heads, head_dim].
      key: [batch, kv_length, num_kv_heads, head_dim].
      value: [batch, kv_length, num_kv_heads, value_dim].
      rule: scale, soft cap, and which positions attend to which.
      operands: segments, prefixes, biases, sinks, virtual tokens and masks.
      implementation: one of `IMPLEMENTATIONS`, or None for the best available.
      matmul_dtype: dtype of the operands of matrix products, which accumulate in float32; by default the query's
        dtype. `reference` always computes in float32.

    Returns:
      [batch, length, num_heads, value_dim] in the query's dtype.

    Raises:
      ConfigError: the implementation is unknown, or not available here.
      ValueError: shapes are inconsistent.
    """
    _check_shapes(query, key, value)
    check_operands(operands, query.shape, key.shape, value.shape)
    if not rule.causal:
        operands = dataclasses.replace(operands, prefix=None)
    matmul_dtype = jnp.dtype(query.dtype if matmul_dtype is None else matmul_dtype)

    if implementation is None:
        implementation = _best_implementation(query, value, rule, operands, matmul_dtype)
    elif implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(IMPLEMENTATIONS)
        raise ConfigError([f"attention implementation {implementation!r} is unknown; allowed are {allowed}"])
    elif obstacle := _obstacle(implementation, query, value, rule, operands, matmul_dtype):
        raise ConfigError([f"attention implementation {implementation!r} {obstacle}"])

    if implementation == "reference":
        return reference_attention(rule, query, key, value, operands)
    by_distance = operands.by_distance(rule.offset, query.shape[1], key.shape[1])
    if implementation == "xla":
        return flash_attention(Blockwise(matmul_dtype), rule, query, key, value, by_distance)
    dtype = query.dtype
    query, key, value = (x.astype(matmul_dtype) for x in (query, key, value))
    if implementation == "cudnn":
        return cudnn_attention(rule, query, key, value, operands).astype(dtype)
    # Sinks and virtual tokens scale the output once more: rounded twice in 16 bits, it would be less exact.
    is_final = operands.sinks_N is None and operands.virtual is None
    kernels = Kernels(matmul_dtype, matmul_dtype if is_final else jnp.dtype(jnp.float32))
    return flash_attention(kernels, rule, query, key, value, by_distance).astype(dtype)


def in_pieces(implementation: str | None, query_length: int, matmul_dtype: jnp.dtype) -> Blocks:
    """Attention over part of the keys, in float32, for merging parts.

    Raises:
      ConfigError: the implementation does not support parts, or is not available here.
    """
    platform = traced_platform()
    if implementation is None:
        implementation = "pallas_tpu" if platform == "tpu" and query_length >= _SHORTEST_FOR_PALLAS else "xla"
    match implementation:
        case "xla":
            return Blockwise(matmul_dtype)
        case "pallas_tpu" if platform == "tpu":
            return Kernels(matmul_dtype, jnp.dtype(jnp.float32))
        case "pallas_tpu":
            raise ConfigError([f"attention implementation 'pallas_tpu' {_NEEDS_TPU.format(platform)}"])
    raise ConfigError(
        [
            f"attention implementation {implementation!r} does not support ring attention over mesh.context, which"
            " merges parts of a row; choose 'xla' or 'auto', or execution.context_attention: all_to_all"
        ]
    )


def _best_implementation(query, value, rule: AttentionRule, operands: AttentionOperands, matmul_dtype) -> str:
    def works(implementation: str) -> bool:
        return _obstacle(implementation, query, value, rule, operands, matmul_dtype) is None

    if query.shape[1] >= _SHORTEST_FOR_PALLAS and works("pallas_tpu"):
        return "pallas_tpu"
    return "cudnn" if works("cudnn") else "xla"


def _obstacle(
    implementation: str, query, value, rule: AttentionRule, operands: AttentionOperands, matmul_dtype
) -> str | None:
    """Why the implementation is not available here, as the end of a sentence; None if it is."""
    match implementation:
        case "pallas_tpu":
            return _pallas_obstacle(operands)
        case "cudnn":
            return cudnn_obstacle(query, value, rule, operands, matmul_dtype)
    return None


def _pallas_obstacle(operands: AttentionOperands) -> str | None:
    if (platform := traced_platform()) != "tpu":
        return _NEEDS_TPU.format(platform)
    if operands.bias_BNTS is not None:
        return "does not support an array of biases; choose 'xla' or None, or a position_bias"
    return None


def _check_shapes(query, key, value) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "attention takes query [batch, length, num_heads, head_dim], key [batch, kv_length, num_kv_heads, head_dim]"
            f" and value [batch, kv_length, num_kv_heads, value_dim]; it got {query.shape}, {key.shape} and"
            f" {value.shape}"
        )
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"query {query.shape} and key {key.shape} must agree in batch and head_dim")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"num_heads {query.shape[2]} must be a multiple of num_kv_heads {key.shape[2]}")
