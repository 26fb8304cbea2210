"""bfloat16 parameters learn like float32 ones: on average, and from updates smaller than their spacing."""

import jax
import jax.numpy as jnp
import numpy as np
from declared import declared

from maxlm.config.fault import GuardConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.sharding import make_mesh, shard
from maxlm.core.term import LossOutput, Term
from maxlm.optim.build import make_optimizer
from maxlm.optim.rounding import stochastic_round
from maxlm.train.state import create_state
from maxlm.train.step import train_step


def neighbors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The adjacent bfloat16 numbers towards zero and away from it, as float32."""
    low = x.view(np.uint32) & np.uint32(0xFFFF0000)
    return low.view(np.float32), (low + np.uint32(0x10000)).view(np.float32)


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbor():
    x = np.array([1.001, -3.14159, 1e-20, 0.5, -0.0, 300.7], np.float32)
    draws = jax.vmap(lambda key: stochastic_round(jnp.asarray(x), key))(jax.random.split(jax.random.key(0), 4000))
    draws = np.asarray(draws, np.float32)
    low, high = neighbors(x)
    assert (((draws == low) | (draws == high)).all(axis=0)).all()
    # Exact bfloat16 numbers are unchanged.
    np.testing.assert_array_equal(draws[:, 3:5], np.broadcast_to(x[3:5], (4000, 2)))
    spacing = np.abs(high - low)
    # The mean of 4,000 draws is within five standard deviations, of at most spacing / 2 each.
    assert (np.abs(draws.astype(np.float64).mean(axis=0) - x) <= 5 * spacing / 2 / np.sqrt(4000)).all()


def test_non_finite_values_stay_non_finite():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    rounded = np.asarray(stochastic_round(x, jax.random.key(1)), np.float32)
    np.testing.assert_array_equal(rounded, np.asarray(x))


def test_small_updates_accumulate():
    """A thousand updates of 1e-4 on 1.0, whose bfloat16 neighbor is 0.0078 away: to nearest, it would stay."""
    parameters = {"w": jnp.ones(256, jnp.bfloat16), "exact": jnp.ones(4)}
    change = {"w": jnp.full(256, 1e-4), "exact": jnp.full(4, 1e-4)}
    optimizer = make_optimizer(OptimConfig(), declared(parameters))
    update = jax.jit(lambda parameters, step: optimizer.apply_updates(parameters, change, 1.0, step))
    for step in range(1000):
        parameters = update(parameters, step)
    assert parameters["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(parameters["w"], np.float32).mean(), 1.1, atol=0.003)
    np.testing.assert_allclose(parameters["exact"], 1.1, rtol=1e-4)


def test_random_bits_do_not_depend_on_mesh():
    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    key = jax.random.key(3)
    alone = stochastic_round(jnp.asarray(values), key)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4))):
        sharded = jax.jit(lambda x: stochastic_round(shard(x, "embed", "mlp"), key))(values)
    np.testing.assert_array_equal(np.asarray(sharded, np.float32), np.asarray(alone, np.float32))


def test_optimizer_computes_in_float32():
    """Adam's moments of bfloat16 parameters are float32, and gradients are accumulated in float32."""

    def loss(trainable, frozen, batch):
        errors = (batch @ trainable["w"].astype(jnp.float32)) ** 2
        return LossOutput({"squares": Term(jnp.sum(errors), jnp.float32(batch.shape[0]))}, {})

    weights = {"w": jnp.ones(8, jnp.bfloat16)}
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2), declared(weights))
    state = create_state(weights, optimizer)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim} == {jnp.dtype(jnp.float32)}
    batch = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)

    def step(state, accumulate):
        arguments = {"loss_function": loss, "optimizer": optimizer, "guard": GuardConfig()}
        return train_step(state, None, batch, schedule=lambda step: 1.0, accumulate=accumulate, **arguments)[0]

    whole, parts = step(state, 1), step(state, 4)
    assert whole.trainable["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(whole.trainable["w"], np.float32), np.asarray(parts.trainable["w"], np.float32)
    )
