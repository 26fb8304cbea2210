"""Reward model: a decoder with a scalar head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import DEFAULT_EXECUTION, ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.batch import Stream
from maxlm.core.parameters import Parameter, initialize, zeros
from maxlm.core.tree import flatten, unflatten
from maxlm.models.decoder import Decoder, DecoderOutput


class RewardModel(Decoder):
    """A decoder whose final hidden state at the end of a sequence is projected to one number.

    The head is initialized at zero, so training starts from equal rewards.
    """

    trained_whole = ("value",)

    def __init__(self, config: ModelConfig, execution: ExecutionConfig = DEFAULT_EXECUTION):
        super().__init__(config, execution)
        self.value: Any = nnx.data(Parameter((config.embed_dim,), (None,), zeros, role="vector"))

    @classmethod
    def from_decoder(cls, decoder: Decoder, key: jax.Array) -> "RewardModel":
        """A decoder's weights with a new head."""
        plan = cls(decoder.config, decoder.execution)
        head = initialize({"value": plan.value}, key)
        return unflatten({**flatten(decoder), **head}, plan)

    def token_values(self, output: DecoderOutput) -> jax.Array:
        """The output of the head at each token, float32 [B, L]."""
        return jnp.sum(output.hidden_BLD.astype(jnp.float32) * self.value, axis=-1)

    def rewards(self, stream: Stream, output: DecoderOutput) -> jax.Array:
        """The reward of each row of one sequence, read at its last token: float32 [B]; 0 for a row of padding.

        Args:
          output: for the stream.
        """
        is_token_BL = stream.segment_ids > 0
        is_last_BL = is_token_BL & (stream.positions == jnp.max(stream.positions, axis=1, keepdims=True))
        return jnp.sum(jnp.where(is_last_BL, self.token_values(output), 0.0), axis=1)
