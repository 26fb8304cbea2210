"""Ring attention (arXiv:2310.01889): keys and values pass around the devices that a row is sharded over.

Each device merges the results of its queries for each block by their log-sum-exps. The backward pass goes around the
ring again, and the gradients of keys and values are sent with their block. A block is sent before it is computed with.

Each step is planned in advance, as pairs of chunks of the row. With a causal mask and rows in order, the
last device would compute all blocks and the first only its own. So a row of 2C chunks is a zigzag: device i of C
holds chunks i and 2C - 1 - i, and in every step except the first each device computes two whole pairs.

Shapes: B batch, T a device's tokens, N query heads, K key-value heads, H head dim; n chunks per device, c tokens per
chunk.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.ops.attention_rule import MASKED_LOGIT, AttentionRule, mean_gradient
from maxlm.ops.flash_tpu import Kernels
from maxlm.ops.flash_xla import Blockwise

# The mesh axis of the ring.
AXIS = "context"

# Assignment of the chunks of a row to devices.
RowOrder = Literal["plain", "zigzag"]


def held_chunks(order: RowOrder, size: int) -> list[tuple[int, ...]]:
    """The chunks of a row, counted from 0, on each of `size` devices."""
    return [(i, 2 * size - 1 - i) if order == "zigzag" else (i,) for i in range(size)]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A chunk of queries and a chunk of keys, by index on their devices, and the attention rule between them."""

    query: int
    key: int
    rule: AttentionRule


@dataclasses.dataclass(frozen=True)
class Step:
    """The computation while each device holds the keys of the device `shift` before it on the ring.

    slots: run in sequence; each assigns every device a pair of chunks, or nothing.
    """

    shift: int
    slots: tuple[tuple[Pair | None, ...], ...]

    @property
    def rules(self) -> tuple[tuple[AttentionRule | None, ...], ...]:
        """The distinct rules of the devices in each slot."""
        return tuple(tuple(dict.fromkeys(None if pair is None else pair.rule for pair in slot)) for slot in self.slots)


def plan_ring(rule: AttentionRule, order: RowOrder, size: int, chunk_length: int) -> tuple[Step, ...]:
    """The steps of a ring of `size` devices in which any query may attend to any key."""
    chunks, steps = held_chunks(order, size), []
    for shift in range(size):
        pairs = [
            _visible_pairs(rule, chunks[device], chunks[(device - shift) % size], chunk_length)
            for device in range(size)
        ]
        slots: list[Any] = []
        # Pairs with the same rule share a slot, so that most slots need no choice between rules.
        for across in (True, False):
            same = [[pair for pair in of_device if (pair.query != pair.key) == across] for of_device in pairs]
            slots += itertools.zip_longest(*same)
        if slots:
            steps.append(Step(shift, tuple(slots)))
    return tuple(steps)


def _visible_pairs(rule: AttentionRule, query_chunks, key_chunks, chunk_length: int) -> list[Pair]:
    pairs = []
    for (query, query_chunk), (key, key_chunk) in itertools.product(enumerate(query_chunks), enumerate(key_chunks)):
        chunk = (0, chunk_length)
        relative = dataclasses.replace(rule, offset=(query_chunk - key_chunk) * chunk_length)
        if relative.block_is_visible(*chunk, *chunk):
            relative = dataclasses.replace(rule, causal=False, window=None)
        if relative.block_has_visible(*chunk, *chunk):
            pairs.append(Pair(query, key, relative))
    return pairs


@dataclasses.dataclass(frozen=True)
class Ring:
    """Static parameters of ring attention.

    rule: of whole rows; pieces: computes one block; order: of the rows; size: of the ring.
    """

    rule: AttentionRule
    pieces: Blockwise | Kernels
    order: RowOrder
    size: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(ring: Ring, query_BTNH, key_BTKH, value_BTKH, segments_BT) -> jax.Array:
    """Attention of this device's queries to the keys of all devices along `context`, inside `jax.shard_map`.

    As `maxlm.ops.attention.attention` defines it for the whole row. Keys and values are sent in the dtype of the matrix
    products.
    """
    return _forward(ring, query_BTNH, key_BTKH, value_BTKH, segments_BT)[0]


def _forward(ring: Ring, query_BTNH, key_BTKH, value_BTKH, segments_BT):
    query_BncNH, query_segments_Bnc = _chunks(ring, query_BTNH), _chunks(ring, segments_BT)

    def attend(rule, query, key, blocks, totals):
        operands = _operands(query_BncNH, query_segments_Bnc, blocks, query, key)
        output_BcNH, log_sum_BcN = ring.pieces.forward(rule, *operands)
        merged = _merge(*(_at(total, query) for total in totals), output_BcNH, log_sum_BcN)
        return tuple(_put(total, new, query) for total, new in zip(totals, merged))

    def step(steps: "_SameSteps", carry, choices):
        blocks, totals = carry
        sent = _send(ring, blocks, steps.leave)
        for rules, choice in zip(steps.rules, choices):
            totals = _apply(rules, attend, choice, blocks, totals)
        return sent, totals

    totals = (jnp.zeros(query_BncNH.shape, jnp.float32), jnp.full(query_BncNH.shape[:-1], MASKED_LOGIT))
    carry = _circulating(ring, key_BTKH, value_BTKH, segments_BT), totals
    _, (output_BncNH, log_sum_BncN) = _go_around(ring, query_BTNH.shape[1], step, carry)
    output_BTNH = output_BncNH.reshape(query_BTNH.shape).astype(query_BTNH.dtype)
    # For a fully masked query, +1e30 makes every probability of the backward pass an exact zero.
    log_sum_BncN = jnp.where(log_sum_BncN > MASKED_LOGIT / 2, log_sum_BncN, -MASKED_LOGIT)
    return output_BTNH, (query_BTNH, key_BTKH, value_BTKH, segments_BT, output_BTNH, log_sum_BncN)


def _backward(ring: Ring, residuals, gradient_BTNH):
    query_BTNH, key_BTKH, value_BTKH, segments_BT, output_BTNH, log_sum_BncN = residuals
    mean_BTN = mean_gradient(output_BTNH, gradient_BTNH)
    query_BncNH, query_segments_Bnc, mean_BncN, gradient_BncNH = (
        _chunks(ring, x) for x in (query_BTNH, segments_BT, mean_BTN, gradient_BTNH)
    )

    def attend(rule, query, key, blocks, totals):
        operands = _operands(query_BncNH, query_segments_Bnc, blocks, query, key)
        statistics = (_at(x, query) for x in (log_sum_BncN, mean_BncN))
        new = ring.pieces.backward(rule, *operands, *statistics, _at(gradient_BncNH, query))
        return tuple(
            _put(total, _at(total, place) + part, place) for total, part, place in zip(totals, new, (query, key, key))
        )

    def step(steps: "_SameSteps", carry, choices):
        blocks, query_total, circulating = carry
        sent = _send(ring, blocks, steps.leave)
        # The partial sums for this block are in transit while this device computes its own part.
        arriving = _send(ring, circulating, steps.arrive)
        totals = (query_total, *(jnp.zeros_like(x) for x in circulating))
        for rules, choice in zip(steps.rules, choices):
            totals = _apply(rules, attend, choice, blocks, totals)
        query_total, *own = totals
        return sent, query_total, tuple(x + y for x, y in zip(arriving, own))

    blocks = _circulating(ring, key_BTKH, value_BTKH, segments_BT)
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (query_BncNH, *blocks[:2])]
    length = query_BTNH.shape[1]
    _, query_total, circulated = _go_around(ring, length, step, (blocks, zeros[0], tuple(zeros[1:])))
    home = _send(ring, circulated, -_plan(ring, length)[-1].shift % ring.size)
    return (
        *(x.reshape(like.shape).astype(like.dtype) for x, like in zip((query_total, *home), residuals)),
        None,
    )


ring_attention.defvjp(_forward, _backward)


def _operands(query_BncNH, query_segments_Bnc, blocks, query, key):
    """Operands of a pair of chunks, at indices `query` and `key`: query, key, value and the segments of both."""
    key_BncKH, value_BncKH, key_segments_Bnc = blocks
    return (
        _at(query_BncNH, query),
        _at(key_BncKH, key),
        _at(value_BncKH, key),
        _at(query_segments_Bnc, query),
        _at(key_segments_Bnc, key),
    )


def _merge(output, log_sum, new_output, new_log_sum):
    """Merge the attention over two disjoint sets of keys; float32 [B, c, N, H] and [B, c, N]."""
    new_log_sum = jnp.where(new_log_sum < -MASKED_LOGIT / 2, new_log_sum, MASKED_LOGIT)
    total = jnp.logaddexp(log_sum, new_log_sum)
    share, new_share = (jnp.exp(part - total)[..., None] for part in (log_sum, new_log_sum))
    return output * share + new_output * new_share, total


# Around the ring


@dataclasses.dataclass(frozen=True)
class _SameSteps:
    """Consecutive steps that one loop can run.

    arrive, leave: distance in devices from the previous step, and to the next step; 0 at the ends.
    rules: for each slot, the rules that devices choose from.
    choices: for each slot int32 [steps, devices, 3]: the rule and the indices of both chunks.
    """

    arrive: int
    leave: int
    rules: tuple[tuple[AttentionRule | None, ...], ...]
    choices: tuple[np.ndarray, ...]


def _plan(ring: Ring, length: int) -> tuple[Step, ...]:
    """The plan for `length` tokens of a row per device."""
    return plan_ring(ring.rule, ring.order, ring.size, length // len(held_chunks(ring.order, ring.size)[0]))


def _runs(steps: tuple[Step, ...]) -> list[_SameSteps]:
    shifts = [step.shift for step in steps]
    arrive = [0, *(after - before for before, after in itertools.pairwise(shifts))]
    described = zip(arrive, [*arrive[1:], 0], (step.rules for step in steps), steps)
    runs = []
    for (arriving, leaving, rules), group in itertools.groupby(described, key=lambda parts: parts[:3]):
        members = [parts[-1] for parts in group]
        choices = [
            np.asarray([[_choice(rules[slot], pair) for pair in step.slots[slot]] for step in members], np.int32)
            for slot in range(len(rules))
        ]
        runs.append(_SameSteps(arriving, leaving, rules, tuple(choices)))
    return runs


def _choice(rules, pair: Pair | None) -> tuple[int, int, int]:
    return (rules.index(None), 0, 0) if pair is None else (rules.index(pair.rule), pair.query, pair.key)


def _go_around(ring: Ring, length: int, step, carry):
    """Run `step(steps, carry, choices of this device by slot)` for all steps of the ring."""
    device = jax.lax.axis_index(AXIS)
    for steps in _runs(_plan(ring, length)):
        mine = [jnp.asarray(choices)[:, device] for choices in steps.choices]
        if len(mine[0]) == 1:
            carry = step(steps, carry, [choices[0] for choices in mine])
        else:
            # One body for all: a long ring compiles no slower than a short one.
            def body(carry, choices, steps=steps):
                return step(steps, carry, choices), None

            carry, _ = jax.lax.scan(body, carry, mine)
    return carry


def _apply(rules, attend, choice, blocks, totals):
    """Run `attend` with the chosen rule; a device without work keeps its totals."""
    branch, query, key = choice

    def by(rule):
        return lambda totals: totals if rule is None else attend(rule, query, key, blocks, totals)

    return by(rules[0])(totals) if len(rules) == 1 else jax.lax.switch(branch, [by(rule) for rule in rules], totals)


def _send(ring: Ring, arrays, distance: int):
    """Send each device's arrays to the device `distance` after it."""
    if distance == 0:
        return arrays
    route = [(device, (device + distance) % ring.size) for device in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, route), arrays)


def _circulating(ring: Ring, key_BTKH, value_BTKH, segments_BT):
    dtype = ring.pieces.matmul_dtype
    return tuple(_chunks(ring, x) for x in (key_BTKH.astype(dtype), value_BTKH.astype(dtype), segments_BT))


def _chunks(ring: Ring, x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] as [B, n, c, ...]."""
    chunks = len(held_chunks(ring.order, ring.size)[0])
    return x_BT.reshape(x_BT.shape[0], chunks, -1, *x_BT.shape[2:])


def _at(x_Bnc, place):
    return jax.lax.dynamic_index_in_dim(x_Bnc, place, axis=1, keepdims=False)


def _put(x_Bnc, new_Bc, place):
    return jax.lax.dynamic_update_index_in_dim(x_Bnc, new_Bc, place, axis=1)
