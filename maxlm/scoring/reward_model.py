"""What a trained reward model gives to texts."""

from collections.abc import Sequence

import jax
import numpy as np

from maxlm.core.batch import Stream
from maxlm.data.preference import pad, round_up
from maxlm.errors import RequestError
from maxlm.models.reward import RewardModel
from maxlm.runtime.progress import track
from maxlm.tokenizer.codec import ChatTokens, Tokenizer

_SCORED_ROWS = 8


def score(model: RewardModel, tokenizer: Tokenizer, texts: Sequence[str | Sequence[dict]]) -> np.ndarray:
    """The reward of each chat (a list of messages) or plain text: float32 [number of texts].

    Raises:
      RequestError: one is longer than the model's context.
      TokenizerError: a role is unknown.
    """
    sequences = [
        tokenizer.encode(text, bos=True, eos=True) if isinstance(text, str) else tokenizer.encode_chat(text).ids
        for text in texts
    ]
    for index, ids in enumerate(sequences):
        if len(ids) > model.config.max_length:
            raise RequestError(
                f"text {index}: its {len(ids)} tokens are more than the model's context of {model.config.max_length}"
            )
    return score_sequences(model, sequences)


def score_sequences(model: RewardModel, sequences: Sequence[list[int]]) -> np.ndarray:
    """The reward of each sequence of token ids: float32 [number of sequences]. The shortest go first, with a bar."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores = np.zeros(len(sequences), np.float32)
    for start in track(range(0, len(order), _SCORED_ROWS), "score"):
        group = order[start : start + _SCORED_ROWS]
        rows = [ChatTokens(sequences[index], [0.0] * len(sequences[index])) for index in group]
        rows += [ChatTokens([], [])] * (_SCORED_ROWS - len(group))
        # No longer than the model's context, where rounding up would be.
        length = min(round_up(len(sequences[group[-1]])), model.config.max_length)
        scores[group] = np.asarray(_rewards(model, pad(rows, length)))[: len(group)]
    return scores


@jax.jit
def _rewards(model: RewardModel, stream: Stream) -> jax.Array:
    return model.rewards(stream)[0]
