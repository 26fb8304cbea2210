"""The training step: the same for any mesh, accumulation, packing or padding; and what the guard skips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from declared import declared
from jax.sharding import PartitionSpec as P
from same_gradient import assert_same, on_host
from tiny_decoder import EXECUTION, documents, pack, text_loss, tiny_config

from maxlm.config.fault import GuardConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.optim import OptimConfig, ScheduleConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.parameters import initialize, shardings
from maxlm.core.sharding import make_mesh
from maxlm.core.term import LossOutput, Term
from maxlm.core.tree import flatten
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer
from maxlm.optim.schedule import schedule_factor
from maxlm.train.state import create_state
from maxlm.train.step import GUARD_WARMUP_STEPS, loss_and_gradient, train_step

CONFIG = tiny_config(num_heads=8, num_kv_heads=8, window_pattern=(6,))
PLAN = Decoder(CONFIG, EXECUTION)


def loss_function(model, frozen, batch):
    return text_loss(model, batch, z_loss=0.1)


PACKED = pack(documents(), rows=8, length=30, per_row=3)


@functools.cache
def weights():
    """Weights, drawn once for all meshes."""
    return jax.tree.map(lambda leaf: 1.5 * np.asarray(leaf), initialize(PLAN, jax.random.key(0)))


def model_of(mesh=None):
    return jax.device_put(weights(), None if mesh is None else shardings(PLAN, mesh))


def terms_and_gradient(batch, *, mesh=None, accumulate=1):
    def compute(model, batch):
        return loss_and_gradient(model, None, batch, loss_function=loss_function, accumulate=accumulate)

    if mesh is None:
        output, gradient = jax.jit(compute)(model_of(), batch)
    else:
        with jax.set_mesh(mesh):
            output, gradient = jax.jit(compute)(model_of(mesh), put_batch(batch, mesh))
    return on_host(output.terms, gradient)


@pytest.fixture(scope="module")
def whole():
    """Terms and gradient of the packed batch, without accumulation, on one device."""
    return terms_and_gradient(PACKED)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_microbatches_change_nothing(accumulate, whole):
    """Although they have different numbers of tokens, some none."""
    weights = PACKED.loss_weights.reshape(8 // accumulate, accumulate, -1).sum((0, 2))
    assert len(set(weights.round(3))) > 1
    assert_same(terms_and_gradient(PACKED, accumulate=accumulate), whole)


@pytest.mark.parametrize("layout", [{"rows": 12, "length": 9, "per_row": 1}, {"rows": 16, "length": 20, "per_row": 2}])
def test_packing_and_padding_change_nothing(layout, whole):
    assert_same(terms_and_gradient(pack(documents(), **layout)), whole)


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [({"fsdp": 8}, 1), ({"tensor": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"data": 8}, 2)],
    ids=str,
)
def test_mesh_changes_nothing(sizes, accumulate, whole):
    batch = PACKED
    if sizes == {"data": 8}:
        # Each microbatch must fill all devices.
        batch = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), PACKED)
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    assert_same(terms_and_gradient(batch, mesh=mesh, accumulate=accumulate), whole)


def test_weight_of_a_term_does_not_depend_on_parameters():
    def weights(model):
        output = loss_function(model, None, PACKED)
        return sum(term.weight for term in output.terms.values())

    gradient = jax.jit(jax.grad(weights))(model_of())
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_terms_add_up_and_are_divided_once():
    left, right = Term(jnp.float32(3), jnp.float32(1)), Term(jnp.float32(1), jnp.float32(3))
    assert float((left + right).mean()) == 1
    assert float(Term(jnp.float32(0), jnp.float32(0)).mean()) == 0


# The step


def make_step(*, kind="adamw", accumulate=1, guard=None, loss=loss_function, learning_rate=0.01):
    config = OptimConfig(
        kind=kind, learning_rate=learning_rate, schedule=ScheduleConfig(kind="constant", warmup_steps=2)
    )
    optimizer = make_optimizer(config, PLAN)

    def step(state, batch):
        return train_step(
            state,
            None,
            batch,
            loss_function=loss,
            optimizer=optimizer,
            schedule=lambda step: schedule_factor(config.schedule, 10, step),
            guard=guard or GuardConfig(),
            accumulate=accumulate,
        )

    return optimizer, jax.jit(step)


def three_steps(*, mesh=None, **settings):
    optimizer, step = make_step(**settings)
    mesh = mesh or make_mesh(MeshConfig(fsdp=1))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda model: create_state(model, optimizer))(model_of(mesh))
        for seed in range(3):
            batch = pack(documents(seed), rows=8, length=30, per_row=3)
            state, metrics = step(state, put_batch(batch, mesh))
    return flatten(jax.device_get(state.trainable)), {name: float(metrics[name]) for name in ("loss", "grad_norm")}


@pytest.fixture(scope="module")
def alone():
    """The result of steps on one device, without accumulation."""
    return {kind: three_steps(kind=kind) for kind in ("adamw", "muon")}


@pytest.mark.parametrize(
    ("kind", "sizes", "accumulate"),
    [("adamw", {"data": 2, "fsdp": 2, "tensor": 2}, 2), ("muon", {"fsdp": 8}, 1), ("muon", {"tensor": 8}, 4)],
    ids=str,
)
def test_steps_are_the_same_on_every_mesh(kind, sizes, accumulate, alone):
    parameters, metrics = alone[kind]
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    other_parameters, other_metrics = three_steps(kind=kind, mesh=mesh, accumulate=accumulate)
    assert other_metrics == pytest.approx(metrics, rel=1e-4)
    start = flatten(model_of())
    for path, value in parameters.items():
        moved = np.abs(value - start[path]).max()
        assert moved > 1e-3, path
        # Adam's first steps follow the sign of a gradient, however small: rounding affects single weights.
        near = np.abs(other_parameters[path] - value) <= 0.02 * moved
        assert near.mean() > 0.99, path


def test_learning_rate_follows_schedule():
    """Of two warm-up steps the first is half as large: with Adam, half the rate in each weight."""
    optimizer, step = make_step()
    state, _ = step(create_state(model_of(), optimizer), PACKED)
    moved = np.abs(np.asarray(state.trainable.final_norm.scale) - 1.5)
    np.testing.assert_allclose(moved, 0.005, rtol=1e-3)


# The guard


def poisoned(model, frozen, batch):
    """The loss times the weight of the batch's first token, to make it NaN or large."""
    output = text_loss(model, batch)
    factor = batch.loss_weights[0, 0]
    return LossOutput({name: Term(term.sum * factor, term.weight) for name, term in output.terms.items()}, {})


def batch_with(factor):
    weights = np.ones_like(PACKED.loss_weights)
    weights[0, 0] = factor
    return dataclasses.replace(PACKED, loss_weights=weights)


def guarded(factors, **settings):
    """States and metrics after each batch of a sequence."""
    optimizer, step = make_step(loss=poisoned, guard=GuardConfig(**settings), learning_rate=1e-5)
    state, history = create_state(model_of(), optimizer), []
    for factor in factors:
        state, metrics = step(state, batch_with(factor))
        history.append((state, metrics))
    return history


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_step_is_skipped_and_counted(bad):
    before, skipped, after = (state for state, _ in guarded([1.0, bad, 1.0]))
    for part in ("trainable", "optimizer"):
        for old, new in zip(jax.tree.leaves(getattr(before, part)), jax.tree.leaves(getattr(skipped, part))):
            np.testing.assert_array_equal(old, new)
    assert [int(state.step) for state in (before, skipped, after)] == [1, 2, 3], "the batch is consumed anyway"
    assert [int(state.guard.skipped) for state in (before, skipped, after)] == [0, 1, 1]
    assert [int(state.guard.skipped_in_a_row) for state in (before, skipped, after)] == [0, 1, 0]
    assert float(skipped.guard.norm_mean) == float(before.guard.norm_mean)
    assert not np.array_equal(before.trainable.embedding, after.trainable.embedding)


def test_non_finite_first_step_leaves_initial_state():
    [(state, _)] = guarded([np.nan])
    np.testing.assert_array_equal(state.trainable.embedding, model_of().embedding)
    assert np.isfinite(float(state.guard.norm_mean))


def test_spike_is_skipped_after_warmup_of_guard():
    early = guarded([1.0, 100.0])
    assert int(early[-1][0].guard.skipped) == 0, "the guard is still in warm-up"
    late = guarded([1.0] * GUARD_WARMUP_STEPS + [9.0, 100.0, 1.0], spike_factor=10.0)
    assert [int(state.guard.skipped) for state, _ in late[-3:]] == [0, 1, 1]
    np.testing.assert_array_equal(late[-2][0].trainable.embedding, late[-3][0].trainable.embedding)
    never = guarded([1.0] * GUARD_WARMUP_STEPS + [1e4], spike_factor=None)
    assert int(never[-1][0].guard.skipped) == 0


def test_batches_are_split_along_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = put_batch(PACKED, mesh)
    assert batch.tokens.sharding.spec == P(("data", "stage", "fsdp", "expert"), "context")
    np.testing.assert_array_equal(batch.loss_weights, PACKED.loss_weights)


# Random numbers


def noisy(model, frozen, batch):
    """A loss that is the sum of a random draw of each row, times a weight."""
    seeds_B = jnp.zeros(len(batch["text"].tokens)) if batch.row_seeds_B is None else batch.row_seeds_B * 2.0**-32
    return LossOutput({"noise": Term(jnp.sum(seeds_B) * model["w"], jnp.float32(1))}, {})


def noise_of_step(step, *, accumulate=1, seed=0):
    weights = {"w": jnp.ones(())}
    optimizer = make_optimizer(OptimConfig(kind="sgd"), declared(weights))
    state = dataclasses.replace(create_state(weights, optimizer), step=jnp.int32(step))
    settings = {"schedule": lambda step: 1.0, "guard": GuardConfig(), "accumulate": accumulate, "seed": seed}
    batch = Batch({"text": PACKED})
    _, metrics = train_step(state, None, batch, loss_function=noisy, optimizer=optimizer, **settings)
    return float(metrics["terms"]["noise"].sum)


def test_each_step_has_its_own_random_numbers():
    drawn = [noise_of_step(step, seed=seed) for step in (0, 1) for seed in (0, 1)]
    assert len({*drawn, 0.0}) == 5
    assert noise_of_step(0) == drawn[0], "a step draws the same each time"
    assert noise_of_step(0, seed=None) == 0.0, "without a seed nothing is random"


def test_rows_draw_the_same_however_they_are_split():
    assert noise_of_step(0, accumulate=2) == pytest.approx(noise_of_step(0), rel=1e-6)
