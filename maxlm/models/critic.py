"""The critic of a policy: an estimate, at each token, of the rewards that its answer will still get.

Dimensions: B rows, L length.
"""

from typing import Literal

import jax

from maxlm.core.batch import Stream
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten, part_at, unflatten
from maxlm.models.decoder import Decoder, DecoderOutput
from maxlm.models.scores import scores_of, token_scores


def with_critic(
    decoder: Decoder, kind: Literal["shared", "own"], key: jax.Array, start: Decoder | None = None
) -> Decoder:
    """The decoder with a critic whose values are all 0, or those of a reward model.

    Args:
      kind: `shared` adds a head to its hidden states, `own` a second model that begins with the same weights.
      start: a reward model of the same shape, whose weights an `own` critic begins with.
    """
    plan = Decoder(decoder.config.model_copy(update={"critic": kind}), decoder.execution)
    if kind == "shared":
        return unflatten({**flatten(decoder), **initialize({"value": plan.value}, key)}, plan)
    declared = flatten(plan.critic)
    given = {path: x for path, x in flatten(decoder if start is None else start).items() if path in declared}
    new = initialize({path: each for path, each in declared.items() if path not in given}, key)
    # A copy, because a training step donates both models.
    copied = jax.tree.map(lambda x: x.copy(), given)
    return unflatten({**flatten(decoder), **{f"critic/{path}": x for path, x in {**copied, **new}.items()}}, plan)


def without_critic(decoder: Decoder) -> Decoder:
    """The decoder alone."""
    if decoder.config.critic is None:
        return decoder
    plan = Decoder(decoder.config.model_copy(update={"critic": None}), decoder.execution)
    # Weights may be adapted: then they are more than one leaf.
    return unflatten({path: part_at(decoder, path) for path in flatten(plan)}, plan)


def values(decoder: Decoder, output: DecoderOutput, of_critic: DecoderOutput | None) -> jax.Array:
    """The value at each token, float32 [B, L].

    Args:
      output, of_critic: of the decoder, and of its own critic, for the same tokens.
    """
    if of_critic is None:
        return scores_of(decoder.value, output)[..., 0]
    return token_scores(decoder.critic, of_critic)[..., 0]


def apply_critic(decoder: Decoder, stream: Stream) -> jax.Array:
    """The value at each token of a stream, float32 [B, L]."""
    if decoder.config.critic == "own":
        return token_scores(decoder.critic, decoder.critic.apply(stream))[..., 0]
    return scores_of(decoder.value, decoder.apply(stream))[..., 0]
