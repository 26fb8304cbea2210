"""What quantisation cost: a quantised model against the float model that it was made of, on held-out text.

Dimensions: B batch, L length, D embed, V vocab, C tokens in a chunk.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Batch
from maxlm.errors import DataError
from maxlm.models.decoder import Decoder

# Tokens whose logits, of both models, live at a time.
CHUNK_LENGTH = 512


@dataclass(frozen=True)
class Receipt:
    """Means are over targets, by their loss weights.

    perplexity_float, perplexity_int8: exp of the mean cross-entropy.
    perplexity_change: perplexity_int8 / perplexity_float - 1.
    mean_kl, max_kl: KL(float || int8) of the next-token distributions, in nats.
    top1_agreement: share of targets for which both models find the same token likeliest.
    num_tokens: targets that were compared.
    bytes_float, bytes_int8: of the weights in memory.
    """

    perplexity_float: float
    perplexity_int8: float
    perplexity_change: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    num_tokens: int
    bytes_float: int
    bytes_int8: int

    @classmethod
    def measure(cls, float_model: Decoder, int8_model: Decoder, batches: Iterable[Batch]) -> Self:
        """Run both models over held-out rows, as they would be served: each with its own arithmetic.

        Raises:
          DataError: no target in the batches has a weight.
        """
        totals, weight, max_kl, num_tokens = np.zeros(4), 0.0, 0.0, 0
        for batch in batches:
            values = np.stack(jax.device_get(_compare(float_model, int8_model, batch))).astype(np.float64)
            weights_BL = np.asarray(batch.loss_weights, np.float64)
            counted_BL = weights_BL > 0
            # Elsewhere (padding) the values mean nothing, and need not be finite.
            totals += (values[:, counted_BL] * weights_BL[counted_BL]).sum(axis=1)
            weight += weights_BL.sum()
            max_kl = np.maximum(max_kl, values[2][counted_BL].max(initial=0.0))
            num_tokens += int(counted_BL.sum())
        if not num_tokens:
            raise DataError("the held-out rows hold no target to compare the models on; build more data")
        loss_float, loss_int8, mean_kl, agreement = totals / weight
        return cls(
            perplexity_float=float(np.exp(loss_float)),
            perplexity_int8=float(np.exp(loss_int8)),
            perplexity_change=float(np.expm1(loss_int8 - loss_float)),
            mean_kl=float(mean_kl),
            max_kl=float(max_kl),
            top1_agreement=float(agreement),
            num_tokens=num_tokens,
            bytes_float=_num_bytes(float_model),
            bytes_int8=_num_bytes(int8_model),
        )


@jax.jit
def _compare(float_model: Decoder, int8_model: Decoder, batch: Batch) -> tuple[jax.Array, ...]:
    """Each [batch, length]: -log p(target) of either model, KL(float || int8), whether the likeliest tokens agree."""
    run = partial(_hidden, batch=batch)
    length = batch.targets.shape[1]
    chunk_length = min(CHUNK_LENGTH, length)

    def cut(x_BLX):
        padding = [(0, 0)] * x_BLX.ndim
        padding[1] = (0, -length % chunk_length)
        return jnp.pad(x_BLX, padding).reshape(-1, chunk_length, *x_BLX.shape[2:])

    def chunk(inputs):
        float_CD, int8_CD, targets_C = inputs
        log_p_CV = jax.nn.log_softmax(float_model.logits(float_CD))
        log_q_CV = jax.nn.log_softmax(int8_model.logits(int8_CD))
        kl_C = jnp.sum(jnp.exp(log_p_CV) * (log_p_CV - log_q_CV), axis=-1)
        agree_C = jnp.argmax(log_p_CV, axis=-1) == jnp.argmax(log_q_CV, axis=-1)
        return _negative_at(log_p_CV, targets_C), _negative_at(log_q_CV, targets_C), kl_C, agree_C.astype(jnp.float32)

    values = jax.lax.map(chunk, (cut(run(float_model)), cut(run(int8_model)), cut(batch.targets)))
    return tuple(value.reshape(batch.targets.shape[0], -1)[:, :length] for value in values)


def _hidden(model: Decoder, batch: Batch) -> jax.Array:
    return model(batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids).hidden_BLD


def _negative_at(log_p_CV: jax.Array, targets_C: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p_CV, targets_C[:, None], axis=-1)[:, 0]


def _num_bytes(model: Decoder) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))
