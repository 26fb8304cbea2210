"""Pipeline stages over the stacked layers.

The mesh axis `stage` shards the layers. A batch is split into microbatches; in each tick every stage applies a chunk of
layers to a different microbatch and sends the result to the next stage (GPipe, arXiv:1811.06965). With `repeats` R a
stage holds R non-adjacent chunks, and a microbatch passes around the ring R times (arXiv:2104.04473).

A `shard_map` is over the axis `stage` only: all other axes stay explicit within it, so layers run unchanged.

Dimensions: B rows, L length, D embed; S stages, M microbatches, R repeats; Q = M / S slots; C = layers / (S R).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.config.pipeline import PipelineConfig
from maxlm.core.sharding import LOGICAL_AXES, current_mesh, spec_of
from maxlm.core.term import LossOutput, add
from maxlm.layers.context import TokenContext

STAGE = "stage"

# The mesh axes that shard the rows of a microbatch.
MICROBATCH_AXES = tuple(axis for axis in LOGICAL_AXES["batch"] if axis != STAGE)

# (layers of a chunk, x [rows, L, D], context, its first repeat) -> (x, auxiliary losses of the layers)
ApplyLayers = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, LossOutput]]


class Unit(NamedTuple):
    """A stage's work in one tick: chunk `turn` on a microbatch. If it is idle, `is_real` is False and the others are
    in range."""

    is_real: Any
    microbatch: Any
    turn: Any


@dataclass(frozen=True)
class Schedule:
    """The pipeline schedule: which microbatch is on which stage in which tick.

    Microbatches enter in rounds of S, and each round passes around R times before the next one enters. So the unit that
    enters at tick u is microbatch (u // SR) * S + u % S on its turn (u // S) % R, and stage s works on it at u + s.
    """

    stages: int
    microbatches: int
    repeats: int

    @property
    def num_ticks(self) -> int:
        """Ticks of a forward pass, each of one chunk of layers; a backward pass takes the same number."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def lead(self) -> int:
        """Ticks from a microbatch's entry until it leaves the last stage: in a 1F1B schedule, that is when
        the first backward pass starts."""
        return self.stages * self.repeats - 1

    @property
    def in_flight(self) -> int:
        """Microbatches between a chunk's forward and backward pass on one stage, in a 1F1B schedule."""
        return min(self.microbatches, 2 * self.stages - (self.repeats == 1))

    def unit(self, number: Any) -> Unit:
        """The unit that entered at tick `number`, which may be out of range."""
        is_real = (number >= 0) & (number < self.microbatches * self.repeats)
        number = jnp.clip(number, 0, self.microbatches * self.repeats - 1)
        around, place = number // (self.stages * self.repeats), number % self.stages
        return Unit(is_real, around * self.stages + place, number // self.stages % self.repeats)

    def first_repeat(self, chunk: Any, stage: Any, turn: Any) -> Any:
        """The repeat of the group of layers with which a stage's chunk begins."""
        return (turn * self.stages + stage) * jax.tree.leaves(chunk)[0].shape[0]

    def enters(self, tick: Any) -> Any:
        """Whether the first stage takes a new microbatch in this tick, rather than one on a later turn."""
        return tick // self.stages % self.repeats == 0


def num_stages() -> int:
    """Stages of the current mesh, 1 within a `shard_map` over them."""
    mesh = current_mesh()
    return 1 if mesh is None or STAGE in mesh.manual_axes else mesh.shape[STAGE]


def fitting_schedule(config: PipelineConfig, rows: int) -> Schedule | None:
    """The schedule for a batch with this number of rows; None without stages, or if the rows are not divisible."""
    if (stages := num_stages()) == 1:
        return None
    sizes = current_mesh().shape
    parts = math.prod(sizes[axis] for axis in MICROBATCH_AXES)
    candidates = (2 * stages, stages) if config.microbatches is None else (config.microbatches,)
    fits = [count for count in candidates if count % stages == 0 and rows % (count * parts) == 0]
    return Schedule(stages, fits[0], config.repeats) if fits else None


def gpipe(apply: ApplyLayers, layers: Any, x_BLD: jax.Array, context: TokenContext, schedule: Schedule):
    """Apply all layers to all rows: (x_BLD, auxiliary losses of the layers).

    Rows are sharded over the stages before and after. Stage s keeps microbatches s, s + S, ... in slots, which rotate
    past the first stage, which in each tick takes one microbatch out of a slot and puts a finished one in. Every stage
    has the weights in the context, which have no rows.
    """
    slots = schedule.microbatches // schedule.stages

    def run(layers, stream_SQBLD, contexts_M, relative_bias):
        stage, stream_QBLD = jax.lax.axis_index(STAGE), stream_SQBLD[0]
        layers = jax.tree.map(lambda leaf: leaf[:, 0], layers)

        def context_of(microbatch):
            rows = jax.tree.map(lambda leaf: pick(leaf, microbatch), contexts_M)
            return replace(rows, relative_bias=relative_bias)

        def work(unit: Unit, state):
            x_BLD, auxiliary = state
            chunk = jax.tree.map(lambda leaf: pick(leaf, unit.turn), layers)
            # Values in idle stages are unused, and finite.
            x_BLD = jnp.where(unit.is_real, x_BLD, 0)
            context = context_of(unit.microbatch)
            x_BLD, added = apply(chunk, x_BLD, context, schedule.first_repeat(chunk, stage, unit.turn))
            return x_BLD, add(auxiliary, added)

        if schedule.repeats > 1:
            # A chunk selected from several would be stored for the backward pass, once per tick.
            work = jax.checkpoint(work)

        def exchange(state, stream, tick):
            slot = tick // (schedule.stages * schedule.repeats)
            enters = (stage == 0) & schedule.enters(tick)
            waiting = jax.tree.map(lambda leaf: pick(leaf, slot), stream)
            turned = send(select(enters, state, waiting), -1)
            stream = jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, slot, 0), stream, turned
            )
            return select(enters, waiting, state), stream

        def tick(carry, number):
            state, stream = exchange(*carry, number)
            return (send(work(schedule.unit(number - stage), state), 1), stream), None

        first = jax.tree.map(lambda leaf: leaf[0], (layers, stream_QBLD))
        _, added = jax.eval_shape(apply, *first, context_of(0), 0)
        state = (jnp.zeros_like(first[1]), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), added))
        # One extra slot: what finishes in a round replaces what enters in the next.
        stream = (
            jnp.concatenate([stream_QBLD, jnp.zeros_like(stream_QBLD[:1])]),
            jax.tree.map(lambda leaf: jnp.zeros((slots + 1, *leaf.shape), leaf.dtype), state[1]),
        )
        carry, _ = jax.lax.scan(tick, (state, stream), jnp.arange(schedule.num_ticks))
        _, (stream_QBLD, auxiliary_Q) = exchange(*carry, schedule.num_ticks)
        return stream_QBLD[1:][None], jax.tree.map(lambda leaf: jnp.sum(leaf[1:], axis=0)[None], auxiliary_Q)

    stream_SQBLD, auxiliary_S = over_stages(run, in_specs=(P(None, STAGE), P(STAGE), P(), P()), out_specs=P(STAGE))(
        jax.tree.map(lambda leaf: to_chunks(leaf, schedule), layers),
        to_slots(x_BLD, schedule),
        jax.tree.map(lambda leaf: to_microbatches(leaf, schedule), replace(context, relative_bias=None)),
        context.relative_bias,
    )
    return from_slots(stream_SQBLD, x_BLD), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), auxiliary_S)


def over_stages(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """Run `function` on each stage, with the other mesh axes explicit."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={STAGE}, check_vma=False)


def to_chunks(stacked: jax.Array, schedule: Schedule) -> jax.Array:
    """Stacked weights [layers, ...], sharded over the stages, as [R, S, C, ...], sharded along S.

    With repeats, a stage's chunks are not stored on it and move here: weights have the same layout everywhere else.
    """
    repeats, stages = schedule.repeats, schedule.stages
    shape = (repeats, stages, stacked.shape[0] // (repeats * stages), *stacked.shape[1:])
    return jax.lax.reshape(stacked, shape, out_sharding=P(None, STAGE, None, *spec_of(stacked)[1:]))


def from_chunks(chunks: jax.Array) -> jax.Array:
    """The inverse of `to_chunks`."""
    shape = (math.prod(chunks.shape[:3]), *chunks.shape[3:])
    return jax.lax.reshape(chunks, shape, out_sharding=P(STAGE, *spec_of(chunks)[3:]))


def to_slots(x: jax.Array, schedule: Schedule) -> jax.Array:
    """[B, ...], rows also sharded over the stages, as [S, Q, B / M, ...]: no row moves to another device."""
    sizes, rest = current_mesh().shape, spec_of(x)[1:]
    outer, inner = sizes["data"], sizes["fsdp"] * sizes["expert"]
    slots = schedule.microbatches // schedule.stages
    parts = (outer, schedule.stages, inner, slots, x.shape[0] // (outer * inner * schedule.microbatches))
    x = jax.lax.reshape(x, (*parts, *x.shape[1:]), out_sharding=P("data", STAGE, ("fsdp", "expert"), None, None, *rest))
    x = jnp.transpose(x, (1, 3, 0, 2, 4, *range(5, x.ndim)))
    shape = (schedule.stages, slots, parts[0] * parts[2] * parts[4], *x.shape[5:])
    return jax.lax.reshape(x, shape, out_sharding=P(STAGE, None, MICROBATCH_AXES, *rest))


def from_slots(stream: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `to_slots`, of which `like` was the argument."""
    sizes, rest = current_mesh().shape, spec_of(stream)[3:]
    stages, slots, rows = stream.shape[:3]
    outer, inner = sizes["data"], sizes["fsdp"] * sizes["expert"]
    shape = (stages, slots, outer, inner, rows // (outer * inner), *stream.shape[3:])
    x = jax.lax.reshape(stream, shape, out_sharding=P(STAGE, None, "data", ("fsdp", "expert"), None, *rest))
    x = jnp.transpose(x, (2, 0, 3, 1, 4, *range(5, x.ndim)))
    return jax.lax.reshape(x, like.shape, out_sharding=P(*spec_of(like)))


def to_microbatches(x: jax.Array, schedule: Schedule) -> jax.Array:
    """[B, ...] as [M, B / M, ...], replicated over the stages."""
    stream = to_slots(x, schedule)
    rest = spec_of(stream)[2:]
    stream = jnp.swapaxes(jax.reshard(stream, P(None, None, *rest)), 0, 1)
    return jax.lax.reshape(stream, (schedule.microbatches, *stream.shape[2:]), out_sharding=P(None, *rest))


def can_split_rows(rows: int, parts: int) -> bool:
    """Whether the rows of a microbatch can be split into `parts` parts, each with rows on every device."""
    sizes = current_mesh().shape
    return rows % (parts * math.prod(sizes[axis] for axis in MICROBATCH_AXES)) == 0


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[rows, ...] as [parts, rows / parts, ...], each part with rows from every device."""
    spec = spec_of(x)
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.swapaxes(jax.lax.reshape(x, shape, out_sharding=P(spec[0], None, *spec[1:])), 0, 1)


def merge_rows(parts: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `split_rows`, of which `like` was the argument."""
    return jax.lax.reshape(jnp.swapaxes(parts, 0, 1), like.shape, out_sharding=P(*spec_of(like)))


def pick(stacked: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def select(condition: Any, left: Any, right: Any) -> Any:
    """The leaves of `left` where the condition holds, else of `right`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), left, right)


def send(tree: Any, step: int) -> Any:
    """Send a tree to the stage `step` further around the ring."""
    stages = current_mesh().shape[STAGE]
    ring = [(stage, (stage + step) % stages) for stage in range(stages)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, STAGE, ring), tree)
