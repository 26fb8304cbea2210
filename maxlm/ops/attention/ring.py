"""Ring attention (arXiv:2310.01889): keys and values pass around the devices that a row is sharded over.

Each device merges the results of its queries for each block by their log-sum-exps. The backward pass goes around the
ring again, and the gradients of keys and values are sent with their block. A block is sent before it is computed with.

Each step is planned in advance, as pairs of chunks of the row. With a causal mask and rows in order, the
last device would compute all blocks and the first only its own. So a row of 2C chunks is a zigzag: device i of C
holds chunks i and 2C - 1 - i, and in every step except the first each device computes two whole pairs.

Shapes: B batch, T a device's tokens, N query heads, K key-value heads, H head dim, V value dim; n chunks per device, c
tokens per chunk.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.remat import saved
from maxlm.ops.attention.flash import Blocks, add_sinks, sinks_gradient
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.position_bias import DistanceBias
from maxlm.ops.attention.rule import MASKED_LOGIT, AttentionRule, mean_gradient
from maxlm.ops.dropout import WeightDropout

# The mesh axis of the ring.
AXIS = "context"

# Assignment of the chunks of a row to devices.
RowOrder = Literal["plain", "zigzag"]


def held_chunks(order: RowOrder, size: int) -> list[tuple[int, ...]]:
    """The chunks of a row, counted from 0, on each of `size` devices."""
    return [(i, 2 * size - 1 - i) if order == "zigzag" else (i,) for i in range(size)]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A chunk of queries and a chunk of keys, by index on their devices, and the attention rule between them.

    distance: from the chunk of keys to that of queries, in chunks.
    """

    query: int
    key: int
    distance: int
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


def plan_ring(
    rule: AttentionRule, order: RowOrder, size: int, chunk_length: int, *, prefixes: bool = False
) -> tuple[Step, ...]:
    """The steps of a ring of `size` devices in which any query may attend to any key.

    prefixes: queries may also attend to later keys, if both are in the same prefix.
    """
    chunks, steps = held_chunks(order, size), []
    for shift in range(size):
        pairs = [
            _visible_pairs(rule, chunks[device], chunks[(device - shift) % size], chunk_length, prefixes)
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


def _visible_pairs(rule: AttentionRule, query_chunks, key_chunks, chunk_length: int, prefixes: bool) -> list[Pair]:
    pairs = []
    for (query, query_chunk), (key, key_chunk) in itertools.product(enumerate(query_chunks), enumerate(key_chunks)):
        chunk = (0, chunk_length)
        distance = query_chunk - key_chunk
        relative = dataclasses.replace(rule, offset=distance * chunk_length)
        if relative.block_is_visible(*chunk, *chunk):
            relative = dataclasses.replace(rule, causal=False, window=None)
        reach = relative.bidirectional if prefixes else relative
        if reach.block_has_visible(*chunk, *chunk):
            pairs.append(Pair(query, key, distance, relative))
    return pairs


@dataclasses.dataclass(frozen=True)
class Ring:
    """Static parameters of ring attention.

    rule: of whole rows; pieces: computes one block; order: of the rows; size: of the ring.
    """

    rule: AttentionRule
    pieces: Blocks
    order: RowOrder
    size: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(ring: Ring, query_BTNH, key_BTKH, value_BTKV, operands: AttentionOperands) -> jax.Array:
    """Attention of this device's queries to the keys of all devices along `context`, inside `jax.shard_map`.

    As `dispatch.attention` defines it for the whole row. Keys and values are sent in the dtype of the matrix
    products.

    Args:
      operands: this device's segments, prefixes, dropout and sinks, and a `DistanceBias` of the whole row; no masks
        and no other biases.
    """
    return _forward(ring, query_BTNH, key_BTKH, value_BTKV, operands)[0]


def _forward(ring: Ring, query_BTNH, key_BTKH, value_BTKV, operands: AttentionOperands):
    queries = _Queries.of(ring, query_BTNH, operands)

    def attend(rule, place: "_Place", blocks, totals):
        output_BcNV, log_sum_BcN = ring.pieces.forward(rule, *queries.with_keys(blocks, place))
        merged = _merge([_at(total, place.query) for total in totals], output_BcNV, log_sum_BcN)
        return tuple(_put(total, new, place.query) for total, new in zip(totals, merged))

    def step(steps: "_SameSteps", carry, choices):
        blocks, totals = carry
        sent = _send(ring, blocks, steps.leave)
        for rules, choice in zip(steps.rules, choices):
            totals = _apply(rules, attend, choice, blocks, totals)
        return sent, totals

    statistics_shape = queries.query_BncNH.shape[:-1]
    totals = (
        jnp.zeros((*statistics_shape, value_BTKV.shape[-1]), jnp.float32),
        jnp.full(statistics_shape, MASKED_LOGIT),
    )
    carry = _circulating(ring, key_BTKH, value_BTKV, operands), totals
    _, (output_BncNV, log_sum_BncN) = _go_around(ring, query_BTNH.shape[1], operands, step, carry)
    # For a fully masked query, +1e30 makes every probability of the backward pass an exact zero.
    log_sum_BncN = jnp.where(log_sum_BncN > MASKED_LOGIT / 2, log_sum_BncN, -MASKED_LOGIT)
    output_BncNV, log_sum_BncN = add_sinks(output_BncNV, log_sum_BncN, operands.sinks_N)
    output_BTNV = output_BncNV.reshape(*query_BTNH.shape[:-1], -1).astype(query_BTNH.dtype)
    output_BTNV, log_sum_BncN = saved(output_BTNV), saved(log_sum_BncN)
    return output_BTNV, (query_BTNH, key_BTKH, value_BTKV, operands, output_BTNV, log_sum_BncN)


def _backward(ring: Ring, residuals, gradient_BTNV):
    query_BTNH, key_BTKH, value_BTKV, operands, output_BTNV, log_sum_BncN = residuals
    mean_BTN = mean_gradient(output_BTNV, gradient_BTNV)
    queries = _Queries.of(ring, query_BTNH, operands)
    mean_BncN, gradient_BncNV = _chunks(ring, (mean_BTN, gradient_BTNV))

    def attend(rule, place: "_Place", blocks, totals):
        log_sum_BcN, mean_BcN, gradient_BcNV = (_at(x, place.query) for x in (log_sum_BncN, mean_BncN, gradient_BncNV))
        *new, of_biases = ring.pieces.backward(
            rule, *queries.with_keys(blocks, place), log_sum_BcN, mean_BcN, gradient_BcNV
        )
        *arrays, bias = totals
        arrays = [
            _put(total, _at(total, index) + part, index)
            for total, part, index in zip(arrays, new, (place.query, place.key, place.key))
        ]
        return *arrays, queries.add_to_bias(bias, of_biases.position_bias, place)

    def step(steps: "_SameSteps", carry, choices):
        blocks, query_total, circulating, bias_total = carry
        sent = _send(ring, blocks, steps.leave)
        # The partial sums for this block are in transit while this device computes its own part.
        arriving = _send(ring, circulating, steps.arrive)
        totals = (query_total, *(jnp.zeros_like(x) for x in circulating), bias_total)
        for rules, choice in zip(steps.rules, choices):
            totals = _apply(rules, attend, choice, blocks, totals)
        query_total, *own, bias_total = totals
        return sent, query_total, tuple(x + y for x, y in zip(arriving, own)), bias_total

    blocks = _circulating(ring, key_BTKH, value_BTKV, operands)
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (queries.query_BncNH, *blocks[:2])]
    length = query_BTNH.shape[1]
    carry = blocks, zeros[0], tuple(zeros[1:]), jax.tree.map(jnp.zeros_like, operands.position_bias)
    _, query_total, circulated, bias_total = _go_around(ring, length, operands, step, carry)
    home = _send(ring, circulated, -_plan(ring, length, operands)[-1].shift % ring.size)
    sinks_gradient_N = sinks_gradient(operands.sinks_N, log_sum_BncN.reshape(mean_BTN.shape), mean_BTN)
    return (
        *(x.reshape(like.shape).astype(like.dtype) for x, like in zip((query_total, *home), residuals)),
        AttentionOperands(position_bias=bias_total, sinks_N=sinks_gradient_N),
    )


ring_attention.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a pair of chunks is: its indices on this device, and how many chunks the keys are before the queries."""

    query: Any
    key: Any
    distance: Any = None


@dataclasses.dataclass(frozen=True)
class _Queries:
    """This device's queries in chunks, their segments, prefixes and seeds, the biases of the row, and the rate of
    dropout."""

    query_BncNH: jax.Array
    ids_Bnc: tuple[Any, Any, Any]
    bias: Any
    dropout_rate: float

    @classmethod
    def of(cls, ring: Ring, query_BTNH, operands: AttentionOperands) -> "_Queries":
        query_BncNH, ids_Bnc = _chunks(ring, (query_BTNH, _ids(operands, 0)))
        rate = 0.0 if operands.dropout is None else operands.dropout.rate
        return cls(query_BncNH, ids_Bnc, operands.position_bias, rate)

    def with_keys(self, blocks, place: _Place) -> tuple[Any, Any, Any, AttentionOperands]:
        """Query, key, value and the operands of a pair of chunks."""
        key_BncKH, value_BncKV, key_ids = blocks
        segments, prefix, dropout = (
            None if of_query is None else (_at(of_query, place.query), _at(of_key, place.key))
            for of_query, of_key in zip(self.ids_Bnc, key_ids)
        )
        operands = AttentionOperands(
            segments,
            prefix,
            position_bias=self._bias_at(place),
            dropout=None if dropout is None else WeightDropout(*dropout, self.dropout_rate),
        )
        return _at(self.query_BncNH, place.query), _at(key_BncKH, place.key), _at(value_BncKV, place.key), operands

    def _bias_at(self, place: _Place) -> DistanceBias | None:
        if self.bias is None:
            return None
        chunk = self.query_BncNH.shape[2]
        values_ND = self.bias.values_ND
        part_ND = jax.lax.dynamic_slice_in_dim(values_ND, self._first_distance(place), 2 * chunk - 1, axis=1)
        return DistanceBias(part_ND, 1 - chunk)

    def add_to_bias(self, total: DistanceBias | None, part: Any, place: _Place) -> DistanceBias | None:
        """Add the gradient of `_bias_at` to that of all biases."""
        if total is None:
            return None
        whole_ND = jnp.zeros_like(total.values_ND)
        added_ND = jax.lax.dynamic_update_slice_in_dim(whole_ND, part.values_ND, self._first_distance(place), axis=1)
        return dataclasses.replace(total, values_ND=total.values_ND + added_ND)

    def _first_distance(self, place: _Place):
        """The index of the smallest distance of a pair of chunks among those of the row."""
        chunk = self.query_BncNH.shape[2]
        return place.distance * chunk + 1 - chunk - self.bias.first


def _merge(totals, new_output, new_log_sum):
    """Merge the attention over two disjoint sets of keys; float32 [B, c, N, H] and [B, c, N]."""
    output, log_sum = totals
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
    choices: for each slot int32 [steps, devices, 4]: the rule, the indices of both chunks, and their distance.
    """

    arrive: int
    leave: int
    rules: tuple[tuple[AttentionRule | None, ...], ...]
    choices: tuple[np.ndarray, ...]


def _plan(ring: Ring, length: int, operands: AttentionOperands) -> tuple[Step, ...]:
    """The plan for `length` tokens of a row per device."""
    chunk_length = length // len(held_chunks(ring.order, ring.size)[0])
    return plan_ring(ring.rule, ring.order, ring.size, chunk_length, prefixes=operands.prefix is not None)


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


def _choice(rules, pair: Pair | None) -> tuple[int, int, int, int]:
    if pair is None:
        return rules.index(None), 0, 0, 0
    return rules.index(pair.rule), pair.query, pair.key, pair.distance


def _go_around(ring: Ring, length: int, operands: AttentionOperands, step, carry):
    """Run `step(steps, carry, choices of this device by slot)` for all steps of the ring."""
    device = jax.lax.axis_index(AXIS)
    # Only biases by position depend on distances.
    columns = 3 if operands.position_bias is None else 4
    for steps in _runs(_plan(ring, length, operands)):
        mine = [jnp.asarray(choices[..., :columns])[:, device] for choices in steps.choices]
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
    branch, *indices = choice
    place = _Place(*indices)

    def by(rule):
        return lambda totals: totals if rule is None else attend(rule, place, blocks, totals)

    return by(rules[0])(totals) if len(rules) == 1 else jax.lax.switch(branch, [by(rule) for rule in rules], totals)


def _send(ring: Ring, arrays, distance: int):
    """Send each device's arrays to the device `distance` after it."""
    if distance == 0:
        return arrays
    route = [(device, (device + distance) % ring.size) for device in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, route), arrays)


def _circulating(ring: Ring, key_BTKH, value_BTKV, operands: AttentionOperands):
    """Chunks of this device's keys and values, and of their segments, prefixes and seeds."""
    dtype = ring.pieces.matmul_dtype
    return _chunks(ring, (key_BTKH.astype(dtype), value_BTKV.astype(dtype), _ids(operands, 1)))


def _ids(operands: AttentionOperands, side: int):
    """What of the operands belongs to queries (side 0) or keys (side 1): segments, prefixes, and seeds of dropout."""
    dropout = operands.dropout
    seeds = None if dropout is None else (dropout.query_seeds_BTN, dropout.key_seeds_BS)
    return tuple(None if ids is None else ids[side] for ids in (operands.segments, operands.prefix, seeds))


def _chunks(ring: Ring, arrays_BT):
    """Each array [B, T, ...] as [B, n, c, ...]."""
    chunks = len(held_chunks(ring.order, ring.size)[0])
    return jax.tree.map(lambda x: x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), arrays_BT)


def _at(x_Bnc, place):
    return jax.lax.dynamic_index_in_dim(x_Bnc, place, axis=1, keepdims=False)


def _put(x_Bnc, new_Bc, place):
    return jax.lax.dynamic_update_index_in_dim(x_Bnc, new_Bc, place, axis=1)
