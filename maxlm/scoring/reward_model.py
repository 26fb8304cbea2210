"""Scores of texts under a trained reward model."""

from collections.abc import Sequence

import jax
import numpy as np

from maxlm.core.batch import Stream
from maxlm.errors import RequestError
from maxlm.generate.scorer import score_sequences
from maxlm.models.decoder import Decoder
from maxlm.models.scores import token_scores
from maxlm.tokenizer.codec import Tokenizer


def score(model: Decoder, tokenizer: Tokenizer, texts: Sequence[str | Sequence[dict]]) -> np.ndarray:
    """The reward of each chat (a list of messages) or plain text: float32 [number of texts].

    Raises:
      RequestError: a text is longer than the model's context.
      TokenizerError: a role is unknown.
    """
    sequences = [
        tokenizer.encode(text, bos=True, eos=True) if isinstance(text, str) else tokenizer.encode_chat(text).ids
        for text in texts
    ]
    for index, ids in enumerate(sequences):
        if len(ids) > model.execution.max_length:
            raise RequestError(
                f"text {index}: its {len(ids)} tokens exceed the model's context of {model.execution.max_length}"
            )
    return reward_of_sequences(model, sequences)


def reward_of_sequences(model: Decoder, sequences: Sequence[list[int]]) -> np.ndarray:
    """The reward of each sequence of token ids, read at its last token: float32 [number of sequences]."""
    return np.array([value_L[-1] for value_L in values_of_sequences(model, sequences)], np.float32)


def values_of_sequences(model: Decoder, sequences: Sequence[list[int]]) -> list[np.ndarray]:
    """The score at each token of each sequence, from itself and those before it: float32 [its length]."""
    return [value_L for (value_L,) in score_sequences(_token_values, model, sequences, title="score")]


@jax.jit
def _token_values(model: Decoder, rows: Stream) -> tuple[jax.Array]:
    return (token_scores(model, model.apply(rows))[..., 0],)
