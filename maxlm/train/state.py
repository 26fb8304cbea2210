"""The training state: everything that a training step updates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.optim.ema import create_ema


@partial(jax.tree_util.register_dataclass, data_fields=["norm_mean", "skipped", "skipped_in_a_row"], meta_fields=[])
@dataclass(frozen=True)
class GuardState:
    """Running mean of the gradient norm over good steps, and how many steps were skipped."""

    norm_mean: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "optimizer", "guard", "ema"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """step: batches consumed; trainable: the model, or its adapters; optimizer: optax's state; ema: the average of the
    trained parameters, or None."""

    step: jax.Array
    trainable: Any
    optimizer: Any
    guard: GuardState
    ema: Any = None


def abstract_state(create: Callable[[Any], TrainState], trainable: Any, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state that `create` makes, from those of the trained parameters."""

    def on_mesh(leaf):
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(on_mesh, jax.eval_shape(create, trainable))


def create_state(trainable: Any, optimizer, *, keep_ema: bool = False) -> TrainState:
    """The state before the first step."""
    guard = GuardState(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    ema = create_ema(trainable) if keep_ema else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), guard, ema)
