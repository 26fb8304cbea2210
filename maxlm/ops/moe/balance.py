"""Load balancing of experts: a loss over documents, and a bias whose gradient is the load error.

Both are sums over tokens, so they do not depend on how a batch is split, packed or sharded.

Dimensions: B batch, L length, E experts, K experts per token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import is_explicit, logical_to_spec, names_of


def choices(experts_BLK: jax.Array, real_BL: jax.Array, num_experts: int) -> jax.Array:
    """float32 [B, L, E]: 1 where a token, other than padding, is routed to an expert."""
    chosen_BLE = jnp.any(experts_BLK[..., None] == jnp.arange(num_experts), axis=-2)
    return (chosen_BLE & real_BL[..., None]).astype(jnp.float32)


def document_balance(scores_BLE: jax.Array, experts_BLK: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Balance loss: sum over documents of their number of tokens times E / K * sum_e f_e P_e.

    f_e is the fraction of a document's tokens routed to expert e, and P_e the mean of its normalized scores: the
    sequence-wise loss of DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20), where a sequence is a document. It is
    lowest, 1 per token, when both are equal over experts. No gradient flows through f.

    Args:
      scores_BLE: router scores, not negative.
      segment_ids_BL: documents of a row, numbered from 1 to at most L; 0 is padding.
    """
    num_experts, num_per_token = scores_BLE.shape[-1], experts_BLK.shape[-1]
    shares_BLE = document_shares(experts_BLK, segment_ids_BL, num_experts)
    probabilities_BLE = scores_BLE / (jnp.sum(scores_BLE, axis=-1, keepdims=True) + 1e-20)
    # Tokens * f_e * P_e summed over a document is the sum over its tokens of f_e * p_e: one product for each token.
    real_BL1 = (segment_ids_BL != 0)[..., None]
    return num_experts / num_per_token * jnp.sum(jnp.where(real_BL1, shares_BLE * probabilities_BLE, 0.0))


def document_shares(experts_BLK: jax.Array, segment_ids_BL: jax.Array, num_experts: int) -> jax.Array:
    """float32 [B, L, E]: for each token, the fraction of its document's tokens routed to each expert; no gradient."""
    if not is_explicit():
        return _local_shares(experts_BLK, segment_ids_BL, num_experts=num_experts, length_axes=())
    tokens = logical_to_spec(("batch", "length", None))
    rows = P(*tokens[:2])
    local = partial(_local_shares, num_experts=num_experts, length_axes=names_of(tokens[1]))
    return jax.shard_map(local, in_specs=(tokens, rows), out_specs=tokens, check_vma=False)(experts_BLK, segment_ids_BL)


def _local_shares(experts_BLK, segment_ids_BL, *, num_experts: int, length_axes: tuple[str, ...]):
    all_experts, all_segments = experts_BLK, segment_ids_BL
    if length_axes:
        # A document may continue on the next device: choices are small enough to gather.
        all_experts, all_segments = (
            jax.lax.all_gather(x, length_axes, axis=1, tiled=True) for x in (experts_BLK, segment_ids_BL)
        )
    batch, length = all_segments.shape
    row_B1 = jnp.arange(batch)[:, None]
    chosen_BLE = choices(all_experts, all_segments != 0, num_experts)
    counts = jnp.zeros((batch, length + 1, num_experts), jnp.float32).at[row_B1, all_segments].add(chosen_BLE)
    tokens = jnp.zeros((batch, length + 1), jnp.float32).at[row_B1, all_segments].add(1.0)
    shares = counts / jnp.maximum(tokens, 1.0)[..., None]
    return jax.lax.stop_gradient(shares[row_B1, segment_ids_BL])


def bias_pull(bias_E: jax.Array, load_E: jax.Array) -> jax.Array:
    """Zero, with a custom gradient for the bias that no function has: load minus its mean over experts.

    So the bias's gradient, summed over microbatches and devices like all gradients, tells the optimizer whether
    an expert has too many tokens; it then lowers the bias by a fixed step.
    """
    error_E = jax.lax.stop_gradient(load_E - jnp.mean(load_E))
    return jnp.sum(error_E * (bias_E - jax.lax.stop_gradient(bias_E)))
