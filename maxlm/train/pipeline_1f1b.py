"""1F1B pipeline schedule: a microbatch's backward pass starts as soon as it leaves the last stage.

This bounds activations in flight by the number of stages, not of microbatches (arXiv:1806.03377; with several
groups of layers per stage arXiv:2104.04473). The loss is computed within the pipeline: each model that it applies is
computed in three parts, `enter`, `trunk` and `leave`, of which the stages share the trunk.

In each tick a stage runs one unit forward, of which it keeps only the input, and one unit backward, for which it
recomputes its layers. Dimensions: S stages, M microbatches, R repeats, K microbatches in flight.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.hardware import traced_platform
from maxlm.core.sharding import spec_of
from maxlm.core.term import LossOutput, Term, add, unite
from maxlm.models.applied import AppliedModel, noise_of
from maxlm.models.decoder import Decoder, Residual
from maxlm.models.pipeline_parallelism import (
    STAGE,
    Schedule,
    can_split_rows,
    from_chunks,
    merge_rows,
    over_stages,
    pick,
    select,
    send,
    split_rows,
    to_chunks,
    to_microbatches,
)
from maxlm.train.loss import TrainingLoss

# Passed from stage to stage: for each model, the residual stream of each of the batch's streams.
State = dict[str, dict[str, Residual]]


def one_forward_one_backward(
    trainable: Any, frozen: Any, batch: Any, *, loss: TrainingLoss, schedule: Schedule
) -> tuple[LossOutput, Any]:
    """The loss terms of the whole batch, and the gradient, in float32, of the sum of their means."""
    # Weights depend only on the batch, so the compiler drops the model from this pass over the whole batch.
    whole = loss(jax.lax.stop_gradient(trainable), frozen, batch)
    weights = {name: term.weight for name, term in whole.terms.items()}
    trained, kept = _Partition(trainable), _Partition(frozen)

    def run(staged, shared, kept_staged, kept_shared, microbatches_M, weights, no_output):
        stages = _Stages(
            schedule,
            loss,
            lambda chunk, shared, kept_chunk: loss.models(
                trained.join(chunk, shared), kept.join(kept_chunk, kept_shared)
            ),
            [leaf[:, 0] for leaf in staged],
            shared,
            [leaf[:, 0] for leaf in kept_staged],
            microbatches_M,
            weights,
        )
        output, staged_grads, shared_grads = stages.run(no_output)
        return jax.lax.psum((output, shared_grads), STAGE), [leaf[:, None] for leaf in staged_grads]

    by_stage = P(None, STAGE)
    (output, shared_grads), staged_grads = over_stages(
        run, in_specs=(by_stage, P(), by_stage, P(), P(), P(), P()), out_specs=(P(), by_stage)
    )(
        [to_chunks(leaf, schedule) for leaf in trained.staged(trainable)],
        trained.shared(trainable),
        [to_chunks(leaf, schedule) for leaf in kept.staged(frozen)],
        kept.shared(frozen),
        jax.tree.map(lambda leaf: to_microbatches(leaf, schedule), batch),
        weights,
        jax.tree.map(jnp.zeros_like, whole),
    )
    return output, trained.join([from_chunks(leaf) for leaf in staged_grads], shared_grads)


class _Partition:
    """The leaves of a tree, partitioned into those sharded over the stages and those that all stages share."""

    def __init__(self, tree: Any):
        leaves, self._structure = jax.tree.flatten(tree)
        self._is_staged = [spec_of(leaf)[:1] == (STAGE,) for leaf in leaves]

    def staged(self, tree: Any) -> list[jax.Array]:
        return [leaf for leaf, is_staged in zip(jax.tree.leaves(tree), self._is_staged) if is_staged]

    def shared(self, tree: Any) -> list[jax.Array]:
        return [leaf for leaf, is_staged in zip(jax.tree.leaves(tree), self._is_staged) if not is_staged]

    def join(self, staged: list[jax.Array], shared: list[jax.Array]) -> Any:
        staged, shared = iter(staged), iter(shared)
        return jax.tree.unflatten(
            self._structure, [next(staged if is_staged else shared) for is_staged in self._is_staged]
        )


class _Stages:
    """The work of one stage, tick by tick; within a `shard_map` over the stages."""

    def __init__(self, schedule, loss, models, staged, shared, kept_staged, microbatches_M, weights):
        """`models`: (chunk, shared, kept chunk) -> the models of the loss, with a chunk of the trunk's layers."""
        self._schedule = schedule
        self._loss_of, self._models = loss, models
        self._staged, self._shared, self._kept_staged = staged, shared, kept_staged
        self._microbatches_M = microbatches_M
        self._weights = weights
        self._stage = jax.lax.axis_index(STAGE)
        self._is_last = self._stage == schedule.stages - 1

    def run(self, no_output: LossOutput) -> tuple[LossOutput, list[jax.Array], list[jax.Array]]:
        """This stage's part of the loss terms and of the gradients."""
        schedule = self._schedule
        nothing = jax.tree.map(jnp.zeros_like, self._enter(self._shared, self._microbatch(0)))
        zeros = lambda leaf: jnp.zeros_like(leaf, jnp.float32)  # noqa: E731
        grads = jax.tree.map(zeros, (self._staged, self._shared))
        stash = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (schedule.repeats * schedule.in_flight, *leaf.shape)), nothing
        )

        def forward_only(carry, tick):
            stash, arrived = carry
            stash, leaving = self._forward(stash, arrived, tick)
            return (stash, send(leaving, 1)), None

        def both(carry, tick):
            stash, arrived, arrived_back, output, grads = carry
            stash, leaving = self._forward(stash, arrived, tick)
            microbatch = schedule.unit(tick - schedule.stages + 1).microbatch
            added, (shared_grads, turned) = self._when(
                schedule.enters(tick - schedule.lead),
                lambda: self._loss(leaving, self._microbatch(microbatch)),
                (no_output, (self._shared, leaving)),
            )
            grads = (grads[0], add(grads[1], shared_grads))
            grads, leaving_back = self._backward(stash, arrived_back, turned, grads, _after(turned, tick))
            leaving, leaving_back = _after(grads, (leaving, leaving_back))
            return (stash, send(leaving, 1), send(leaving_back, -1), add(output, added), grads), None

        def backward_only(carry, tick):
            stash, arrived_back, grads = carry
            grads, leaving_back = self._backward(stash, arrived_back, nothing, grads, tick)
            return (stash, send(_after(grads, leaving_back), -1), grads), None

        lead, end = schedule.lead, schedule.num_ticks
        (stash, arrived), _ = jax.lax.scan(forward_only, (stash, nothing), jnp.arange(lead))
        carry = (stash, arrived, nothing, no_output, grads)
        (stash, _, arrived_back, output, grads), _ = jax.lax.scan(both, carry, jnp.arange(lead, end))
        carry = (stash, arrived_back, grads)
        (_, _, grads), _ = jax.lax.scan(backward_only, carry, jnp.arange(end, end + lead))
        return output, *grads

    def _forward(self, stash: State, arrived: State, tick) -> tuple[State, State]:
        """The stash with this tick's input added, and the output of the stage."""
        unit = self._schedule.unit(tick - self._stage)
        microbatch = self._microbatch(unit.microbatch)
        entering = self._when(self._schedule.enters(tick), lambda: self._enter(self._shared, microbatch), arrived)
        entering = select((self._stage == 0) & (unit.turn == 0), entering, arrived)
        # Values in idle stages are unused, and finite.
        entering = select(unit.is_real, entering, jax.tree.map(jnp.zeros_like, entering))
        place = self._place(unit)
        stash = jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_index_in_dim(
                kept, jnp.where(unit.is_real, new, pick(kept, place)), place, 0
            ),
            stash,
            entering,
        )
        microbatch = _after(entering, microbatch)
        return stash, self._work(self._chunk(unit.turn), self._shared, unit.turn, entering, microbatch)

    def _backward(self, stash: State, arrived: State, turned: State, grads, tick) -> tuple[Any, State]:
        """The gradients with this tick's added, and the cotangent of the stage's input.

        `arrived` is from the next stage; `turned` is from the loss, for a microbatch on its last turn.
        """
        schedule, (staged_grads, shared_grads) = self._schedule, grads
        number = tick - schedule.lead - (schedule.stages - 1 - self._stage)
        unit = schedule.unit(number)
        unit = unit._replace(turn=schedule.repeats - 1 - unit.turn)
        microbatch = self._microbatch(unit.microbatch)
        cotangent = select(self._is_last & (unit.turn == schedule.repeats - 1), turned, arrived)
        cotangent = select(unit.is_real, cotangent, jax.tree.map(jnp.zeros_like, cotangent))

        entered = jax.tree.map(lambda leaf: pick(leaf, self._place(unit)), stash)
        work = lambda chunk, shared, state: self._work(chunk, shared, unit.turn, state, microbatch)  # noqa: E731
        _, pull_back = jax.vjp(work, self._chunk(unit.turn), self._shared, entered)
        # Of the shared weights, layers have gradients only of those in their context.
        chunk_grads, context_grads, entered_grads = pull_back(cotangent)
        staged_grads = [
            jax.lax.dynamic_update_index_in_dim(total, pick(total, unit.turn) + grad, unit.turn, 0)
            for total, grad in zip(staged_grads, chunk_grads)
        ]

        is_start = (self._stage == 0) & (unit.turn == 0) & unit.is_real
        start_grads = select(is_start, entered_grads, jax.tree.map(jnp.zeros_like, entered_grads))
        enter = lambda shared: self._enter(shared, microbatch)  # noqa: E731
        # The first stage's last turn of a round, counted backwards.
        ends = schedule.enters(tick - schedule.lead - (schedule.stages - 1) + schedule.stages)
        (entry_grads,) = self._when(ends, lambda: jax.vjp(enter, self._shared)[1](start_grads), (self._shared,))
        return (staged_grads, add(add(shared_grads, context_grads), entry_grads)), entered_grads

    def _loss(self, leaving: State, microbatch: Any) -> tuple[LossOutput, tuple[list[jax.Array], State]]:
        """Terms of the output of the last stage, and the gradients of their means: of the shared weights, and of
        `leaving` on the last stage.

        Each stage takes an equal part of the rows, if they are divisible; else the last one takes all.
        """
        stages = self._schedule.stages
        shares = can_split_rows(jax.tree.leaves(microbatch)[0].shape[0], stages)
        if not shares:
            leaving = select(self._is_last, leaving, jax.tree.map(jnp.zeros_like, leaving))
            output, shared_grads, turned = self._loss_gradient(leaving, microbatch, self._is_last)
            output = select(self._is_last, output, jax.tree.map(jnp.zeros_like, output))
            return output, (shared_grads, turned)

        def last_rows(x):
            return jax.lax.all_to_all(split_rows(x, stages), STAGE, 0, 0)[stages - 1]

        def everywhere(x, like):
            return merge_rows(jax.lax.all_gather(x[None], STAGE, axis=0, tiled=True), like)

        def only(chosen, tree):
            return jax.tree.map(lambda leaf: jax.lax.psum(jnp.where(chosen, leaf, 0), STAGE), tree)

        # The auxiliary losses of layers are counted once, by the first stage.
        is_first = self._stage == 0

        def mine(residual: Residual) -> Residual:
            added = only(self._is_last, residual.auxiliary)
            return Residual(last_rows(residual.x_BLD), select(is_first, added, jax.tree.map(jnp.zeros_like, added)))

        def of_all(gradient: Residual, like: Residual) -> Residual:
            return Residual(everywhere(gradient.x_BLD, like.x_BLD), only(is_first, gradient.auxiliary))

        rows = jax.tree.map(lambda leaf: pick(split_rows(leaf, stages), self._stage), microbatch)
        output, shared_grads, turned = self._loss_gradient(_map_residuals(mine, leaving), rows, True)
        return output, (shared_grads, _map_residuals(of_all, turned, leaving))

    def _loss_gradient(self, state: State, microbatch: Any, counts: Any):
        def total(shared, state):
            models = self._models(self._chunk(0), shared, self._kept_chunk(0))
            applied = {}
            for name, model in models.items():
                outputs = {
                    stream: model.leave(residual, self._entered(name, model, stream, microbatch)[1])
                    for stream, residual in state[name].items()
                }
                rates = self._loss_of.rates_of(name)
                applied[name] = AppliedModel(model, outputs, 0.0 if rates is None else rates.label_smoothing)
            output = self._loss_of.of_outputs(applied, microbatch)
            terms = [Term(term.sum, self._weights[name]).mean() for name, term in output.terms.items()]
            return jnp.where(counts, sum(terms), 0.0), output

        (shared_grads, state_grads), output = jax.grad(total, argnums=(0, 1), has_aux=True)(self._shared, state)
        return output, shared_grads, state_grads

    def _enter(self, shared: list[jax.Array], microbatch: Any) -> State:
        """The input of the layers."""
        models = self._models(self._chunk(0), shared, self._kept_chunk(0))

        def start(name: str, model: Decoder, stream: str) -> Residual:
            residual, context = self._entered(name, model, stream, microbatch)
            _, added = jax.eval_shape(model.trunk, model.trunk_layers, residual.x_BLD, context, 0)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), added)
            return Residual(residual.x_BLD, unite([residual.auxiliary, zeros]))

        return {
            name: {stream: start(name, model, stream) for stream in microbatch.streams}
            for name, model in models.items()
        }

    def _work(self, chunk: list[jax.Array], shared: list[jax.Array], turn: Any, state: State, microbatch: Any) -> State:
        """A chunk of layers applied to each model's tokens."""
        models = self._models(chunk, shared, self._kept_chunk(turn))

        def work(name: str, stream: str, residual: Residual) -> Residual:
            model, x_BLD = models[name], residual.x_BLD
            # A frozen model has no backward pass.
            x_BLD = jax.lax.stop_gradient(x_BLD) if name == "teacher" else x_BLD
            first = self._schedule.first_repeat(model.trunk_layers, self._stage, turn)
            _, context = self._entered(name, model, stream, microbatch)
            x_BLD, added = model.trunk(model.trunk_layers, x_BLD, context, first)
            return Residual(x_BLD, unite([residual.auxiliary, added]))

        return {
            name: {stream: work(name, stream, residual) for stream, residual in streams.items()}
            for name, streams in state.items()
        }

    def _entered(self, name: str, model: Decoder, stream: str, microbatch: Any) -> tuple[Residual, Any]:
        """The input of a model's trunk, and the context of its layers."""
        rows, noise = microbatch[stream], noise_of(microbatch, stream, self._loss_of.rates_of(name))
        return model.enter(rows.tokens, rows.positions, rows.segment_ids, rows.prefix_lengths, noise)

    def _microbatch(self, number: Any) -> Any:
        return jax.tree.map(lambda leaf: pick(leaf, number), self._microbatches_M)

    def _chunk(self, turn: Any) -> list[jax.Array]:
        return [pick(leaf, turn) for leaf in self._staged]

    def _kept_chunk(self, turn: Any) -> list[jax.Array]:
        return [pick(leaf, turn) for leaf in self._kept_staged]

    def _place(self, unit) -> Any:
        """Index of a unit's input in the stash."""
        return unit.turn * self._schedule.in_flight + unit.microbatch % self._schedule.in_flight

    def _when(self, condition: Any, function: Callable[[], Any], like: Any) -> Any:
        """`function()`, or zeros at ticks at which no stage needs it; with one turn there are no such ticks."""
        if self._schedule.repeats == 1:
            return function()
        return jax.lax.cond(condition, function, lambda: jax.tree.map(jnp.zeros_like, like))


def _after(earlier: Any, tree: Any) -> Any:
    """`tree`, which on CPUs is not available before `earlier` is computed.

    The runtime of XLA for CPUs starts a collective while an earlier one still waits inside a loop or a branch, unless
    its data depend on it. Then devices meet in different collectives. An optimization barrier is no such dependence,
    since it is removed.
    """
    if traced_platform() != "cpu":
        return tree
    # No number is both, which the compiler does not know.
    impossible = jnp.stack([jnp.any(jnp.isnan(leaf) & (leaf == 0)) for leaf in jax.tree.leaves(earlier)]).any()
    return jax.tree.map(lambda leaf: jnp.where(impossible, jnp.zeros_like(leaf), leaf), tree)


def _map_residuals(function: Callable[..., Residual], *states: State) -> State:
    return jax.tree.map(function, *states, is_leaf=lambda node: isinstance(node, Residual))
