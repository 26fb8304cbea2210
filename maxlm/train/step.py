"""One training step: a pure function from state and batch to state and metrics."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from maxlm.config.fault import GuardConfig
from maxlm.config.pipeline import PipelineConfig
from maxlm.core.sharding import is_explicit, shard, spec_of
from maxlm.core.term import LossOutput, Term, add
from maxlm.models.pipeline_parallelism import fitting_schedule
from maxlm.ops.dropout import row_seeds
from maxlm.optim.build import Optimizer
from maxlm.optim.ema import update_ema
from maxlm.train.loss import TrainingLoss
from maxlm.train.pipeline_1f1b import one_forward_one_backward
from maxlm.train.state import GuardState, TrainState

# (trainable, frozen, batch) -> LossOutput. With pipeline stages it is a `TrainingLoss`.
LossFunction = Callable[[Any, Any, Any], LossOutput]

# The running mean of the gradient norm covers about 50 steps, and is not used before step 20.
NORM_DECAY = 0.98
GUARD_WARMUP_STEPS = 20


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Any,
    *,
    loss_function: LossFunction,
    optimizer: Optimizer,
    schedule: Callable[[jax.Array], jax.Array],
    guard: GuardConfig,
    accumulate: int,
    ema_decay: float | None = None,
    pipeline: PipelineConfig | None = None,
    seed: int | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Loss, gradient, guard, update.

    Args:
      state: consumed; donate it in `jax.jit`.
      frozen: weights of the loss that are not trained, such as the base of adapters.
      batch: a pytree of arrays whose first axis is the batch.
      accumulate: gradient accumulation steps; changes memory, not the result.
      ema_decay: decay of the state's weight average, if it has one.
      pipeline: the pipeline schedule, if the mesh has stages.
      seed: for randomness in the loss; each row's seed depends only on it, the step and the row. None: nothing is
        random.
    """
    if seed is not None:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rows = jax.tree.leaves(batch)[0].shape[0]
        batch = replace(batch, row_seeds_B=shard(row_seeds(key, rows), "batch"))
    output, grads = loss_and_gradient(
        state.trainable,
        frozen,
        batch,
        loss_function=loss_function,
        accumulate=accumulate,
        pipeline=pipeline,
    )
    grads = optimizer.of_trained(grads)
    loss = sum(term.mean() for term in output.terms.values())
    grad_norm = optimizer.gradient_norm(grads)

    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
    trainable = optimizer.apply_updates(state.trainable, updates, schedule(state.step), state.step)
    ema = None if state.ema is None else update_ema(state.ema, trainable, ema_decay, state.step)

    good, guard_state = judge(guard, state, loss, grad_norm)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
    new_state = TrainState(
        step=state.step + 1,
        trainable=keep(trainable, state.trainable),
        optimizer=keep(optimizer_state, state.optimizer),
        guard=guard_state,
        ema=keep(ema, state.ema),
    )
    metrics = {
        "loss": loss,
        "terms": {**output.terms, **output.metrics},
        "grad_norm": grad_norm,
        "skipped": guard_state.skipped,
        "skipped_in_a_row": guard_state.skipped_in_a_row,
    }
    return new_state, metrics


def loss_and_gradient(
    trainable: Any,
    frozen: Any,
    batch: Any,
    *,
    loss_function: LossFunction,
    accumulate: int,
    pipeline: PipelineConfig | None = None,
) -> tuple[LossOutput, Any]:
    """The loss terms of the whole batch, and the gradient of the sum of their means."""
    if pipeline is not None and pipeline.schedule == "1f1b":
        rows = jax.tree.leaves(batch)[0].shape[0]
        if (schedule := fitting_schedule(pipeline, rows // accumulate)) is not None:
            # More microbatches cost no memory in 1F1B, so those of gradient accumulation join the pipeline's.
            schedule = replace(schedule, microbatches=schedule.microbatches * accumulate)
            return one_forward_one_backward(
                trainable, frozen, batch, loss=cast(TrainingLoss, loss_function), schedule=schedule
            )

    def scaled_loss(trainable, microbatch, weights):
        output = loss_function(trainable, frozen, microbatch)
        weights = weights or {name: jax.lax.stop_gradient(term.weight) for name, term in output.terms.items()}
        return sum(Term(term.sum, weights[name]).mean() for name, term in output.terms.items()), output

    def gradient(trainable, microbatch, weights):
        grads, output = jax.grad(scaled_loss, has_aux=True)(trainable, microbatch, weights)
        # Gradients are summed over microbatches in float32, also those of 16-bit parameters.
        return optax.tree.cast(grads, jnp.float32), output

    if accumulate == 1:
        grads, output = gradient(trainable, batch, None)
        return output, grads

    # Weights depend only on the batch, so the compiler drops the model from this pass over the whole batch.
    whole = loss_function(jax.lax.stop_gradient(trainable), frozen, batch)
    weights = {name: term.weight for name, term in whole.terms.items()}

    def body(totals, microbatch):
        return add(totals, gradient(trainable, microbatch, weights)), None

    microbatches = jax.tree.map(lambda x: _split(x, accumulate), batch)
    # Starts from zeros: peeling the first microbatch would compile its pass a second time outside the loop.
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, trainable, first, weights))
    (grads, output), _ = jax.lax.scan(body, zeros, microbatches)
    return output, grads


def judge(guard: GuardConfig, state: TrainState, loss: jax.Array, grad_norm: jax.Array) -> tuple[jax.Array, GuardState]:
    """Whether to keep this step's update, and the guard's state after it."""
    old = state.guard
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if guard.spike_factor is not None:
        known = (state.step - old.skipped >= GUARD_WARMUP_STEPS) & (old.norm_mean > 0)
        good &= ~known | (grad_norm <= guard.spike_factor * old.norm_mean)
    is_first = old.norm_mean == 0
    mean = jnp.where(is_first, grad_norm, NORM_DECAY * old.norm_mean + (1 - NORM_DECAY) * grad_norm)
    # A zero gradient, as of answers with equal rewards, does not count in the running mean.
    counts = good & (grad_norm > 0)
    return good, GuardState(
        norm_mean=jnp.where(counts, mean, old.norm_mean),
        skipped=old.skipped + (~good).astype(jnp.int32),
        skipped_in_a_row=jnp.where(good, 0, old.skipped_in_a_row + 1),
    )


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] to [parts, batch / parts, ...], each part with rows from every device."""
    split = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
    # A reshape drops mesh axes of size 1.
    return jax.reshard(split, P(None, *spec_of(x))) if is_explicit() else split
