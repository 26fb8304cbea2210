"""Gated recurrent unit: a mixer whose memory of the tokens before is one vector.

Dimensions: B batch, L length, D embed, H hidden channels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.layers import GruConfig
from maxlm.config.model import ModelConfig
from maxlm.core.sharding import gather_weight, shard
from maxlm.layers.cache import Cache, put_row
from maxlm.layers.context import TokenContext
from maxlm.layers.weights import bias, multiply, residual_scale, weight
from maxlm.ops.attention.context import to_row_order, to_token_order


@partial(jax.tree_util.register_dataclass, data_fields=["state_BH"], meta_fields=[])
@dataclass(frozen=True)
class StateCache(Cache):
    """The state after the newest token, in float32: rounding errors would add up over a sequence."""

    axes: ClassVar[tuple[str | None, ...]] = ("batch", None)

    state_BH: jax.Array

    def write_row(self, other: Self, row: jax.Array) -> Self:
        return type(self)(put_row(self.state_BH, other.state_BH, row, 2))


class Gru(nnx.Module):
    """The GRU of arXiv:1412.3555, with the reset gate after the recurrent product:

    r, z = sigmoid(W x + U h + b);   n = tanh(W x + b + r * (U h + c));   h' = (1 - z) * n + z * h
    """

    def __init__(self, model: ModelConfig, config: GruConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        hidden, gates = (config.dim, "state"), (3 * config.dim, "gates")
        self.input = weight(execution, (model.embed_dim, "embed"), gates)
        self.input_bias = bias(gates)
        self.recurrent = weight(execution, hidden, gates)
        self.recurrent_bias = bias(gates)
        self.out = weight(execution, hidden, (model.embed_dim, "embed"), residual_scale(model.num_layers))

    def __call__(
        self, x_BLD: jax.Array, context: TokenContext, cache: StateCache | None = None
    ) -> tuple[jax.Array, StateCache | None]:
        times = partial(multiply, self.execution)
        # Tokens one after the other: each device has whole rows, in the order of the tokens.
        whole = lambda x: shard(to_token_order(x, context.row_order), "batch", *[None] * (x.ndim - 1))  # noqa: E731
        inputs_BLG = whole(times(x_BLD, self.input)).astype(jnp.float32) + self.input_bias
        positions_BL, segments_BL = whole(context.positions_BL), whole(context.segment_ids_BL)
        begins_BL = positions_BL == 0
        if cache is None:
            before_BL = jnp.pad(segments_BL, ((0, 0), (1, 0)))[:, :-1]
            begins_BL |= segments_BL != before_BL
            state_BH = jnp.zeros_like(inputs_BLG[:, 0, : self.config.dim])
        else:
            state_BH = cache.state_BH
        recurrent = gather_weight(self.recurrent) if isinstance(self.recurrent, jax.Array) else self.recurrent

        def step(state_BH, token):
            inputs_BG, begins_B, is_real_B = token
            before_BH = jnp.where(begins_B[:, None], 0.0, state_BH)
            products_BG = times(before_BH, recurrent) + self.recurrent_bias
            reset, update, new = jnp.split(inputs_BG, 3, axis=-1)
            reset_h, update_h, new_h = jnp.split(products_BG, 3, axis=-1)
            z_BH = jax.nn.sigmoid(update + update_h)
            n_BH = jnp.tanh(new + jax.nn.sigmoid(reset + reset_h) * new_h)
            after_BH = (1 - z_BH) * n_BH + z_BH * before_BH
            # Padding changes nothing.
            after_BH = jnp.where(is_real_B[:, None], after_BH, state_BH)
            return after_BH, after_BH

        tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (inputs_BLG, begins_BL, segments_BL != 0))
        state_BH, states_LBH = jax.lax.scan(step, state_BH, tokens)
        states_BLH = shard(jnp.swapaxes(states_LBH, 0, 1).astype(x_BLD.dtype), "batch", "length", None)
        y_BLD = times(to_row_order(states_BLH, context.row_order), self.out, context.residual_axes)
        return y_BLD, None if cache is None else StateCache(state_BH)

    def create_cache(self, batch_size: int, max_length: int, dtype: Any) -> StateCache:
        del max_length, dtype
        return StateCache(jnp.zeros((batch_size, self.config.dim)))
