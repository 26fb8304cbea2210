"""Ring attention (arXiv:2310.01889): keys and values pass around the devices that a row is sharded over.

Each device merges the results of its queries for each block by their log-sum-exps. The backward pass goes around the
ring again, and the gradients of keys and values are sent with their block. A block is sent before it is computed with.

Each step is planned in advance, as pairs of chunks of the row. With a causal mask and rows in order, the
last device would compute all blocks and the first only its own. So a row of 2C chunks is a zigzag: device i of C
holds chunks i and 2C - 1 - i, and in every step except the first each device computes two whole pairs.

Arrays have heads first, and each chunk is an array of its own: a pair of chunks is a branch that reads and writes whole
arrays, where an index that differs between devices would copy its operands and its sums. The sums of outputs and of
gradients of queries have tokens last, as the kernels for TPUs write them: XLA does not find one layout for a loop by
itself, and would copy them in each step.

Shapes: B batch, T a device's tokens, N query heads, K key-value heads, H head dim, V value dim, c tokens per chunk, I
kinds of ids.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.remat import saved
from maxlm.ops.attention.flash import (
    Blocks,
    add_sinks,
    add_virtual,
    heads_first,
    sinks_gradient,
    virtual_gradients,
)
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

    distance: from the chunk of keys to that of queries, in chunks; pairs that differ only in it run the same code.
    """

    query: int
    key: int
    rule: AttentionRule
    distance: int = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Step:
    """The computation while each device holds the keys of the device `shift` before it on the ring.

    slots: run in sequence; each assigns every device a pair of chunks, or nothing.
    """

    shift: int
    slots: tuple[tuple[Pair | None, ...], ...]

    @property
    def branches(self) -> tuple[tuple[Pair | None, ...], ...]:
        """The distinct pairs of the devices in each slot."""
        return tuple(tuple(dict.fromkeys(slot)) for slot in self.slots)


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
        # The same pairs share a slot, so that few slots need a choice between them.
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
            pairs.append(Pair(query, key, relative, distance))
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
      operands: this device's segments, prefixes, dropout, sinks and virtual tokens, and a `DistanceBias` of the whole
        row; no masks and no other biases.
    """
    return _forward(ring, query_BTNH, key_BTKH, value_BTKV, operands)[0]


def _forward(ring: Ring, query_BTNH, key_BTKH, value_BTKV, operands: AttentionOperands):
    queries = _Queries.of(ring, query_BTNH, operands)

    def attend(pair: Pair, distance, blocks, totals):
        output_BNcV, log_sum_BNc = ring.pieces.forward(pair.rule, *queries.with_keys(blocks, pair, distance))
        new = output_BNcV.swapaxes(2, 3), log_sum_BNc
        return _replaced(totals, pair.query, _merge(totals[pair.query], new))

    def step(steps: "_SameSteps", carry, choices):
        blocks, totals = carry
        sent = _send(ring, blocks, steps.leave)
        for branches, choice in zip(steps.branches, choices):
            totals = _apply(branches, attend, choice, blocks, totals)
        return sent, totals

    def nothing(query_BNcH):
        batch, num_heads, chunk_length, _ = query_BNcH.shape
        output_BNVc = jnp.zeros((batch, num_heads, value_BTKV.shape[-1], chunk_length), jnp.float32)
        return output_BNVc, jnp.full((batch, num_heads, chunk_length), MASKED_LOGIT)

    carry = _circulating(ring, key_BTKH, value_BTKV, operands), tuple(map(nothing, queries.chunks_BNcH))
    _, totals = _go_around(ring, query_BTNH.shape[1], operands, step, carry)
    outputs, log_sums = [], []
    for query_BNcH, (output_BNVc, log_sum_BNc) in zip(queries.chunks_BNcH, totals):
        # For a fully masked query, +1e30 makes every probability of the backward pass an exact zero.
        log_sum_BNc = jnp.where(log_sum_BNc > MASKED_LOGIT / 2, log_sum_BNc, -MASKED_LOGIT)
        output_BNcV, log_sum_BNc = add_virtual(
            ring.pieces.matmul_dtype,
            ring.rule,
            query_BNcH,
            output_BNVc.swapaxes(2, 3),
            log_sum_BNc,
            operands.virtual,
        )
        output_BNcV, log_sum_BNc = add_sinks(output_BNcV, log_sum_BNc, operands.sinks_N)
        outputs.append(output_BNcV.swapaxes(1, 2).astype(query_BTNH.dtype))
        log_sums.append(saved(log_sum_BNc))
    output_BTNV = saved(jnp.concatenate(outputs, axis=1))
    return output_BTNV, (query_BTNH, key_BTKH, value_BTKV, operands, output_BTNV, tuple(log_sums))


def _backward(ring: Ring, residuals, gradient_BTNV):
    query_BTNH, key_BTKH, value_BTKV, operands, output_BTNV, log_sums_BNc = residuals
    mean_BNT = mean_gradient(output_BTNV, gradient_BTNV).swapaxes(1, 2)
    queries = _Queries.of(ring, query_BTNH, operands)
    means_BNc, gradients_BNcV = _chunks(ring, mean_BNT), _chunks(ring, gradient_BTNV.swapaxes(1, 2))

    def attend(pair: Pair, distance, blocks, totals):
        query_totals, key_totals, value_totals, bias_total = totals
        query, key, value, of_biases = ring.pieces.backward(
            pair.rule,
            *queries.with_keys(blocks, pair, distance),
            *(of_chunks[pair.query] for of_chunks in (log_sums_BNc, means_BNc, gradients_BNcV)),
        )
        return (
            _replaced(query_totals, pair.query, query_totals[pair.query] + query.swapaxes(2, 3)),
            _replaced(key_totals, pair.key, key_totals[pair.key] + key),
            _replaced(value_totals, pair.key, value_totals[pair.key] + value),
            queries.add_to_bias(bias_total, of_biases.position_bias, distance),
        )

    def step(steps: "_SameSteps", carry, choices):
        blocks, query_totals, circulating, bias_total = carry
        sent = _send(ring, blocks, steps.leave)
        # The partial sums for this block are in transit while this device computes its own part.
        arriving = _send(ring, circulating, steps.arrive)
        totals = query_totals, *jax.tree.map(jnp.zeros_like, circulating), bias_total
        for branches, choice in zip(steps.branches, choices):
            totals = _apply(branches, attend, choice, blocks, totals)
        query_totals, *own, bias_total = totals
        return sent, query_totals, jax.tree.map(jnp.add, arriving, tuple(own)), bias_total

    blocks = _circulating(ring, key_BTKH, value_BTKV, operands)
    zeros_BNHc = tuple(jnp.zeros_like(x.swapaxes(2, 3), jnp.float32) for x in queries.chunks_BNcH)
    zeros_of_block = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), blocks[:2])
    length = query_BTNH.shape[1]
    carry = blocks, zeros_BNHc, zeros_of_block, jax.tree.map(jnp.zeros_like, operands.position_bias)
    _, totals_BNHc, circulated, bias_total = _go_around(ring, length, operands, step, carry)
    home = _send(ring, circulated, -_plan(ring, length, operands)[-1].shift % ring.size)
    log_sum_BNT = jnp.concatenate(log_sums_BNc, axis=2)
    sinks_gradient_N = sinks_gradient(operands.sinks_N, log_sum_BNT, mean_BNT)
    from_virtual_BNTH, virtual_gradient = virtual_gradients(
        ring.pieces.matmul_dtype,
        ring.rule,
        query_BTNH.swapaxes(1, 2),
        operands.virtual,
        log_sum_BNT,
        mean_BNT,
        gradient_BTNV.swapaxes(1, 2),
    )
    query_gradient_BNTH = jnp.concatenate([x_BNHc.swapaxes(2, 3) for x_BNHc in totals_BNHc], axis=2)
    gradients = (query_gradient_BNTH + from_virtual_BNTH,), *home
    return (
        *(
            jnp.concatenate([x.swapaxes(1, 2).astype(like.dtype) for x in chunks], axis=1)
            for chunks, like in zip(gradients, residuals)
        ),
        AttentionOperands(position_bias=bias_total, sinks_N=sinks_gradient_N, virtual=virtual_gradient),
    )


ring_attention.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Queries:
    """This device's queries in chunks, their ids by name, the biases of the row, and the rate of dropout."""

    chunks_BNcH: tuple[jax.Array, ...]
    ids_BT: dict[str, jax.Array]
    bias: Any
    dropout_rate: float

    @classmethod
    def of(cls, ring: Ring, query_BTNH, operands: AttentionOperands) -> "_Queries":
        rate = 0.0 if operands.dropout is None else operands.dropout.rate
        chunks_BNcH = _chunks(ring, query_BTNH.swapaxes(1, 2))
        return cls(chunks_BNcH, _ids(operands, 0), operands.position_bias, rate)

    def with_keys(self, blocks, pair: Pair, distance) -> tuple[Any, Any, Any, AttentionOperands]:
        """Query, key, value and the operands of a pair of chunks."""
        keys_BKcH, values_BKcV, key_ids_IBT = blocks
        chunk = self.chunks_BNcH[0].shape[2]
        ids: dict[str, Any] = {
            name: (
                of_queries_BT[:, pair.query * chunk :][:, :chunk],
                key_ids_IBT[i, :, pair.key * chunk :][:, :chunk].astype(of_queries_BT.dtype),
            )
            for i, (name, of_queries_BT) in enumerate(self.ids_BT.items())
        }
        if "dropout" in ids:
            query_seeds_BTN, key_seeds_BS = ids["dropout"]
            ids["dropout"] = WeightDropout(query_seeds_BTN, key_seeds_BS, self.dropout_rate)
        operands = AttentionOperands(position_bias=self._bias_at(distance), **ids)
        return self.chunks_BNcH[pair.query], keys_BKcH[pair.key], values_BKcV[pair.key], operands

    def _bias_at(self, distance) -> DistanceBias | None:
        if self.bias is None:
            return None
        chunk = self.chunks_BNcH[0].shape[2]
        values_ND = self.bias.values_ND
        part_ND = jax.lax.dynamic_slice_in_dim(values_ND, self._first_distance(distance), 2 * chunk - 1, axis=1)
        return DistanceBias(part_ND, 1 - chunk)

    def add_to_bias(self, total: DistanceBias | None, part: Any, distance) -> DistanceBias | None:
        """Add the gradient of `_bias_at` to that of all biases."""
        if total is None:
            return None
        whole_ND = jnp.zeros_like(total.values_ND)
        first = self._first_distance(distance)
        added_ND = jax.lax.dynamic_update_slice_in_dim(whole_ND, part.values_ND, first, axis=1)
        return dataclasses.replace(total, values_ND=total.values_ND + added_ND)

    def _first_distance(self, distance):
        """The index of the smallest distance of a pair of chunks among those of the row."""
        chunk = self.chunks_BNcH[0].shape[2]
        return distance * chunk + 1 - chunk - self.bias.first


def _merge(total, new):
    """Merge the attention over two disjoint sets of keys; float32 [B, N, V, c] and [B, N, c]."""
    (output, log_sum), (new_output, new_log_sum) = total, new
    new_log_sum = jnp.where(new_log_sum < -MASKED_LOGIT / 2, new_log_sum, MASKED_LOGIT)
    total_log_sum = jnp.logaddexp(log_sum, new_log_sum)
    share, new_share = (jnp.exp(part - total_log_sum)[:, :, None] for part in (log_sum, new_log_sum))
    return output * share + new_output * new_share, total_log_sum


# Around the ring


@dataclasses.dataclass(frozen=True)
class _SameSteps:
    """Consecutive steps that one loop can run.

    arrive, leave: distance in devices from the previous step, and to the next step; 0 at the ends.
    branches: for each slot, the pairs that devices choose from.
    choices: for each slot int32 [steps, devices, 2]: the branch, and the distance of the chunks.
    """

    arrive: int
    leave: int
    branches: tuple[tuple[Pair | None, ...], ...]
    choices: tuple[np.ndarray, ...]


def _plan(ring: Ring, length: int, operands: AttentionOperands) -> tuple[Step, ...]:
    """The plan for `length` tokens of a row per device."""
    chunk_length = length // len(held_chunks(ring.order, ring.size)[0])
    return plan_ring(ring.rule, ring.order, ring.size, chunk_length, prefixes=operands.prefix is not None)


def _runs(steps: tuple[Step, ...]) -> list[_SameSteps]:
    shifts = [step.shift for step in steps]
    arrive = [0, *(after - before for before, after in itertools.pairwise(shifts))]
    described = zip(arrive, [*arrive[1:], 0], (step.branches for step in steps), steps)
    runs = []
    for (arriving, leaving, branches), group in itertools.groupby(described, key=lambda parts: parts[:3]):
        members = [parts[-1] for parts in group]
        choices = [
            np.asarray([[_choice(branches[slot], pair) for pair in step.slots[slot]] for step in members], np.int32)
            for slot in range(len(branches))
        ]
        runs.append(_SameSteps(arriving, leaving, branches, tuple(choices)))
    return runs


def _choice(branches, pair: Pair | None) -> tuple[int, int]:
    return branches.index(pair), 0 if pair is None else pair.distance


def _go_around(ring: Ring, length: int, operands: AttentionOperands, step, carry):
    """Run `step(steps, carry, choices of this device by slot)` for all steps of the ring."""
    device = jax.lax.axis_index(AXIS)
    for steps in _runs(_plan(ring, length, operands)):
        mine = [jnp.asarray(choices)[:, device] for choices in steps.choices]
        if len(mine[0]) == 1:
            carry = step(steps, carry, [choices[0] for choices in mine])
        else:
            # One body for all: a long ring compiles no slower than a short one.
            def body(carry, choices, steps=steps):
                return step(steps, carry, choices), None

            carry, _ = jax.lax.scan(body, carry, mine)
    return carry


def _apply(branches, attend, choice, blocks, totals):
    """Run `attend` for the chosen pair; a device without work keeps its totals."""
    branch, distance = choice

    def by(pair):
        return lambda totals: totals if pair is None else attend(pair, distance, blocks, totals)

    return jax.lax.switch(branch, [by(pair) for pair in branches], totals)


def _send(ring: Ring, arrays, distance: int):
    """Send each device's arrays to the device `distance` after it."""
    if distance == 0:
        return arrays
    route = [(device, (device + distance) % ring.size) for device in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, route), arrays)


def _circulating(ring: Ring, key_BTKH, value_BTKV, operands: AttentionOperands):
    """The chunks of this device's keys and of its values, and the ids of its keys as one array [I, B, T]."""
    keys, values = (_chunks(ring, x.astype(ring.pieces.matmul_dtype)) for x in heads_first(key_BTKH, value_BTKV))
    ids = [x.astype(jnp.uint32) for x in _ids(operands, 1).values()]
    return keys, values, jnp.stack(ids) if ids else None


def _ids(operands: AttentionOperands, side: int) -> dict[str, jax.Array]:
    """What of the operands belongs to queries (side 0) or keys (side 1), by name: ids >= 0, and seeds of dropout."""
    dropout = operands.dropout
    seeds = None if dropout is None else (dropout.query_seeds_BTN, dropout.key_seeds_BS)
    by_name = {"segments": operands.segments, "prefix": operands.prefix, "dropout": seeds}
    return {name: ids[side] for name, ids in by_name.items() if ids is not None}


def _chunks(ring: Ring, x_BNT) -> tuple[jax.Array, ...]:
    """The chunks of an array [B, N, T, ...]."""
    return tuple(jnp.split(x_BNT, len(held_chunks(ring.order, ring.size)[0]), axis=2))


def _replaced(parts: tuple, index: int, part) -> tuple:
    return *parts[:index], part, *parts[index + 1 :]
