"""What the objectives on whole answers share: log-probabilities of tokens, and results back on the host.

Dimensions: B rows, L length.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Batch
from maxlm.core.sharding import RowShard, shard
from maxlm.core.term import LossOutput
from maxlm.data.chat import share_of
from maxlm.models.decoder import Decoder


def token_log_probabilities(model: Decoder, batch: Batch, *, temperature: float = 1.0) -> tuple[jax.Array, LossOutput]:
    """log p(target) under softmax(logits / temperature): float32 [B, L]; 0 where the loss weight is 0.

    Beside it, what the model's layers add to the loss.
    """
    output = model(batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
    log_probability_BL, _ = model.log_probabilities(output.hidden_BLD, batch.targets, temperature=temperature)
    return jnp.where(batch.loss_weights > 0, log_probability_BL, 0.0), output.auxiliary


def token_scores(model: Decoder, batch: Batch, *, temperature: float = 1.0) -> jax.Array:
    """`token_log_probabilities` for the host to read: each device holds whole rows."""
    return shard(token_log_probabilities(model, batch, temperature=temperature)[0], "batch", None)


def is_real(batch: Batch) -> jax.Array:
    """1.0 for rows that hold a sequence and 0.0 for padding: float32 [B]."""
    return jnp.any(batch.segment_ids > 0, axis=1).astype(jnp.float32)


def local_rows(x: Any) -> np.ndarray:
    """This process's rows of a global array that is cut along its first axis."""
    # Devices along a mesh axis that does not cut the rows hold the same ones.
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def share_of_rows(batch: Any, rows: RowShard) -> Any:
    """A process's rows of a whole batch."""
    return jax.tree.map(lambda x: share_of(x, rows.index, rows.count), batch)
