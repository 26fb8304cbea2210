"""Scores of whole sequences, a reward or one for each class, which models with `labels` compute instead of logits."""

import jax
import jax.numpy as jnp

from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten, unflatten
from maxlm.models.decoder import Decoder, DecoderOutput


def with_labels(decoder: Decoder, labels: tuple[str, ...], key: jax.Array) -> Decoder:
    """A decoder's weights with a new head for these scores, at zero, so that all begin equal."""
    plan = Decoder(decoder.config.model_copy(update={"labels": labels}), decoder.execution)
    kept = {path: x for path, x in flatten(decoder).items() if path != "head"}
    return unflatten({**kept, **initialize({"score": plan.score}, key)}, plan)


def token_scores(model: Decoder, output: DecoderOutput) -> jax.Array:
    """The scores at each token, float32 [B, L, labels]."""
    return scores_of(model.score, output)


def scores_of(table: jax.Array, output: DecoderOutput) -> jax.Array:
    """The product of each hidden state with each row of a table, float32 [B, L, rows]."""
    return jnp.sum(output.hidden_BLD[..., None, :].astype(jnp.float32) * jnp.asarray(table, jnp.float32), axis=-1)


def sequence_scores(
    model: Decoder, output: DecoderOutput, *, positions_BL: jax.Array, segment_ids_BL: jax.Array
) -> jax.Array:
    """The scores of each row of one sequence, read at its last token: float32 [B, labels]; 0 for a row of padding.

    Args:
      output: for tokens of these positions and segments.
    """
    is_token_BL = segment_ids_BL > 0
    last_B1 = jnp.max(jnp.where(is_token_BL, positions_BL, -1), axis=1, keepdims=True)
    is_last_BL = is_token_BL & (positions_BL == last_B1)
    return jnp.sum(jnp.where(is_last_BL[..., None], token_scores(model, output), 0.0), axis=1)
