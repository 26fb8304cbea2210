"""What a step of training changes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["norm_mean", "skipped", "skipped_in_a_row"], meta_fields=[])
@dataclass(frozen=True)
class GuardState:
    """Running mean of the gradient norm over good steps, and how many steps were skipped."""

    norm_mean: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["step", "trainable", "optimizer", "guard"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """step: batches consumed; trainable: the model, or its adapters; optimizer: optax's state."""

    step: jax.Array
    trainable: Any
    optimizer: Any
    guard: GuardState


def create_state(trainable: Any, optimizer) -> TrainState:
    """The state before the first step."""
    guard = GuardState(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), guard)
