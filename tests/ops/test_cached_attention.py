"""Attention to a cache, against float64 loops over whole rows: slots in any order, ring buffers, and no copy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import BATCH, Case, definition

from maxlm.ops.attention.definition import cached_attention
from maxlm.ops.attention.operands import NO_OPERANDS
from maxlm.ops.attention.rule import AttentionRule

CASES = [
    Case("causal", 40, num_heads=4),
    Case("one key-value head, values of another size", 40, num_heads=3, num_kv_heads=1, value_dim=24),
    Case("window, soft cap", 40, window=9, soft_cap=1.5, scale=0.6),
    Case("segments", 40, segments=True),
    Case("prefix, segments", 40, prefix=True, segments=True),
    Case("bidirectional", 40, causal=False, segments=True),
    Case("ALiBi, sinks", 40, num_heads=4, bias="alibi", sinks=True),
    Case("relative buckets", 40, bias="t5", segments=True),
    Case(
        "virtual tokens, window, ALiBi, sinks",
        40,
        num_heads=4,
        virtual=3,
        window=9,
        bias="alibi",
        sinks=True,
        value_dim=24,
    ),
    Case("relative buckets, bidirectional", 40, bias="t5", causal=False),
    Case("mask, array of biases", 40, num_heads=4, bias="array", mask=4),
]


def from_cache(case: Case, query_positions, slots, dtype=jnp.float32):
    """Output of the queries at some positions [queries] of the rows, with keys of positions [slots] in the slots.

    Position -1 is a padding query, or an empty slot with garbage.
    """
    arrays, _ = case.inputs()
    operands = case.operands(arrays)
    query_positions, slots = np.asarray(query_positions), np.asarray(slots)

    def at(x, positions):
        return np.where((positions < 0).reshape(-1, *[1] * (x.ndim - 2)), x.dtype.type(7), x[:, positions])

    def ids(pair):
        return None if pair is None else (at(pair[0], query_positions), at(pair[1], slots))

    def matrix(x):
        return None if x is None else x[:, :, query_positions][..., slots]

    operands = dataclasses.replace(
        operands,
        segments=ids(operands.segments),
        prefix=ids(operands.prefix),
        mask_BNTS=matrix(operands.mask_BNTS),
        bias_BNTS=matrix(operands.bias_BNTS),
    )
    key, value = (jnp.asarray(at(arrays[x], slots).swapaxes(1, 2), dtype) for x in ("key", "value"))
    positions = (np.broadcast_to(x, (BATCH, x.size)) for x in (query_positions, slots))
    query = at(arrays["query"], query_positions)
    return np.asarray(jax.jit(cached_attention, static_argnums=5)(query, key, value, *positions, case.rule, operands))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_order_of_slots_gives_the_rows_of_whole_attention(case):
    queries = [20, 21, -1, 22, 39, 0]
    slots = np.concatenate([np.random.default_rng(1).permutation(case.length), [-1, -1, -1]])
    got = from_cache(case, queries, slots)
    np.testing.assert_allclose(got, definition(case)["output"][:, queries] * _exists(queries), atol=1e-5, rtol=1e-4)
    assert not got[:, 2].any()


def _exists(positions):
    return (np.asarray(positions) >= 0)[None, :, None, None]


@pytest.mark.parametrize("first", [3, 17, 36])
def test_a_ring_buffer_needs_only_a_window_and_the_new_tokens(first):
    case = Case("ring buffer", 40, window=8, segments=True)
    chunk, size = 4, 8 + 4 - 1
    held = np.full(size, -1)
    for position in range(first + chunk):
        held[position % size] = position
    queries = np.arange(first, first + chunk)
    want = definition(case)["output"][:, queries]
    np.testing.assert_allclose(from_cache(case, queries, held), want, atol=1e-5, rtol=1e-4)


def test_cache_in_bfloat16_loses_no_more_than_its_rounding():
    case = Case("bfloat16", 40, num_heads=4)
    got = from_cache(case, [30, 31], np.arange(40), jnp.bfloat16)
    np.testing.assert_allclose(got, definition(case)["output"][:, [30, 31]], atol=0.02, rtol=0.02)


def test_positions_of_slots_may_be_the_same_for_all_rows():
    query, key = jnp.ones((3, 1, 4, 8)), jax.random.normal(jax.random.key(0), (3, 2, 16, 8))
    position, rule = jnp.array([[4], [9], [0]]), AttentionRule(0.3)
    slots = jnp.arange(16)[None]
    by_row = cached_attention(query, key, key, position, jnp.tile(slots, (3, 1)), rule)
    np.testing.assert_array_equal(cached_attention(query, key, key, position, slots, rule, NO_OPERANDS), by_row)
    np.testing.assert_allclose(by_row[2, 0, 0], key[2, 0, 0], rtol=1e-6)
