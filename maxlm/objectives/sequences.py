"""Helpers for objectives on whole answers: log-probabilities of tokens, and transfer of results to the host.

Dimensions: B rows, L length.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Stream
from maxlm.core.sharding import shard
from maxlm.models.decoder import Decoder, DecoderOutput
from maxlm.ops.loss import in_chunks


def target_log_probabilities(
    model: Decoder,
    stream: Stream,
    output: DecoderOutput | None = None,
    *,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> jax.Array:
    """log p(target) under softmax(logits / temperature): float32 [B, L]; 0 where the loss weight is 0.

    Args:
      output: of the model for this stream; computed if not given.
      smoothing: label smoothing.
    """
    output = model.apply(stream) if output is None else output
    log_probability_BL, _ = model.log_probabilities(
        output.hidden_BLD, stream.targets, temperature=temperature, smoothing=smoothing
    )
    return jnp.where(stream.loss_weights > 0, log_probability_BL, 0.0)


def token_entropies(model: Decoder, hidden_BLD: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """The entropy of the distribution over the vocabulary at each token, in nats: float32 [B, L].

    The full logits are never materialized.
    """

    def chunk(model, hidden):
        log_p_BCV = jax.nn.log_softmax(model.logits(hidden) / temperature)
        return (-jnp.sum(jnp.exp(log_p_BCV) * log_p_BCV, axis=-1),)

    (entropy_BL,) = in_chunks(chunk, model, hidden_BLD, chunk_length=model.execution.loss_chunk_length)
    return entropy_BL


def whole_rows(x_BL: jax.Array) -> jax.Array:
    """Reshard so that each device holds whole rows, for transfer to the host."""
    return shard(x_BL, "batch", None)


def is_real(stream: Stream) -> jax.Array:
    """1.0 for rows that hold a sequence and 0.0 for padding: float32 [B]."""
    return jnp.any(stream.segment_ids > 0, axis=1).astype(jnp.float32)


def local_rows(x: Any) -> np.ndarray:
    """This process's rows of a global array that is sharded along its first axis."""
    # Devices along a mesh axis that does not shard the rows hold copies of the same rows.
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def rows_of(stream: Stream) -> Iterator[Stream]:
    """Each row as a separate stream."""
    for row in range(len(stream.tokens)):
        yield jax.tree.map(lambda x, row=row: x[row : row + 1], stream)
