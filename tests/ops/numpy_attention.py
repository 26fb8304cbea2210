"""Attention and its gradients in float64 numpy, one query and head at a time, written from the definition alone."""

import math
from typing import Any

import numpy as np


def numpy_attention(
    query,
    key,
    value,
    gradient,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    segments=None,
    prefix=None,
    bias=None,
    sinks=None,
    mask=None,
    kept=None,
    virtual=None,
) -> dict[str, Any]:
    """The output and the gradients of query, key, value, bias, sinks and virtual tokens, by name.

    Arrays as in `dispatch.attention`; segments and prefix are pairs of queries' and keys' ids; bias, mask
    and kept are whole matrices [batch, num_heads, length, kv_length]. kept: factors of weights, 0 or 1 / (1 - rate).
    virtual: keys and values [tokens, num_kv_heads, channels] that each query sees that sees any, without a bias.
    """
    query, key, value, gradient = (x.astype(np.float64) for x in (query, key, value, gradient))
    batch, length, num_heads, head_dim = query.shape
    kv_length, num_kv_heads = key.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    no_tokens = np.zeros((0, num_kv_heads, head_dim)), np.zeros((0, num_kv_heads, value.shape[-1]))
    virtual_key, virtual_value = (x.astype(np.float64) for x in virtual or no_tokens)
    count = len(virtual_key)
    results = {
        "output": np.zeros((batch, length, num_heads, value.shape[-1])),
        "query": np.zeros_like(query),
        "key": np.zeros_like(key),
        "value": np.zeros_like(value),
        "bias": np.zeros((batch, num_heads, length, kv_length)),
        "sinks": np.zeros(num_heads),
        "virtual_key": np.zeros_like(virtual_key),
        "virtual_value": np.zeros_like(virtual_value),
    }

    def sees(b: int, h: int, i: int, j: int) -> bool:
        same_prefix = prefix is not None and prefix[0][b, i] == prefix[1][b, j] != 0
        if causal and j > i and not same_prefix:
            return False
        if window is not None and abs(i - j) >= window:
            return False
        if segments is not None and not segments[0][b, i] == segments[1][b, j] != 0:
            return False
        return mask is None or bool(mask[b, h, i, j])

    for b, h, i in np.ndindex(batch, num_heads, length):
        seen = [j for j in range(kv_length) if sees(b, h, i, j)]
        if not seen:
            continue
        g = h // (num_heads // num_kv_heads)
        keys = np.concatenate([key[b, seen, g], virtual_key[:, g]])
        values = np.concatenate([value[b, seen, g], virtual_value[:, g]])
        logits, slope = keys @ query[b, i, h] * scale, 1.0
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
            slope = 1 - (logits / soft_cap) ** 2
        if bias is not None:
            logits = logits + np.append(bias[b, h, i, seen], np.zeros(count))
        sink = -np.inf if sinks is None else float(sinks[h])
        largest = max(logits.max(), sink)
        p, sink_p = np.exp(logits - largest), np.exp(sink - largest)
        p, sink_p = p / (p.sum() + sink_p), sink_p / (p.sum() + sink_p)
        factors = np.ones_like(p) if kept is None else np.append(kept[b, h, i, seen], np.ones(count))
        dropped = p * factors
        results["output"][b, i, h] = dropped @ values
        dp = values @ gradient[b, i, h] * factors
        d_logits = p * (dp - p @ dp)
        results["sinks"][h] -= sink_p * (p @ dp)
        tokens = len(seen)
        results["bias"][b, h, i, seen] = d_logits[:tokens]
        d_products = d_logits * slope * scale
        results["query"][b, i, h] = d_products @ keys
        d_keys, d_values = np.outer(d_products, query[b, i, h]), np.outer(dropped, gradient[b, i, h])
        results["key"][b, seen, g] += d_keys[:tokens]
        results["value"][b, seen, g] += d_values[:tokens]
        results["virtual_key"][:, g] += d_keys[tokens:]
        results["virtual_value"][:, g] += d_values[tokens:]
    return results


def numpy_kept(query_seeds, key_seeds, rate: float) -> np.ndarray:
    """Factors [batch, num_heads, length, kv_length] of weights, from seeds [batch, length, num_heads] and
    [batch, kv_length], in 64-bit integers."""
    x = query_seeds.astype(np.uint64).swapaxes(1, 2)[..., None] ^ key_seeds.astype(np.uint64)[:, None, None]
    x = x * 0x85EBCA6B % 2**32
    bits = (x ^ (x // 2**13)) * 0xC2B2AE35 % 2**32
    return np.where(bits / 2**32 < rate, 0.0, 1 / (1 - rate))


def numpy_bucket(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The bucket of a key `distance` before its query (T5, arXiv:1910.10683)."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance < 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    beyond = math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return first + min(exact + int(beyond + 1e-9), num_buckets - 1)
