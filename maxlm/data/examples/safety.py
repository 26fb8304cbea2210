"""Pairs of answers of which it is known which is safer, and whether each is safe: data of cost models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.batch import Batch
from maxlm.data.examples.chat import check_some_left
from maxlm.data.examples.encoding import encode_answer
from maxlm.data.examples.preference import PreferencePairs
from maxlm.data.examples.records import parse_safety, read_records
from maxlm.errors import DataError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.tokenizer.codec import Tokenizer


class SafetyPairs(PreferencePairs):
    """The pairs of a file as token ids; the chosen answer is the safer one.

    Args:
      are_safe: of the chosen and the rejected answer of each pair.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[ChatTokens, ChatTokens]],
        are_safe: Sequence[tuple[bool, bool]],
        *,
        row_length: int,
        places: Sequence[str],
        parts: int = 1,
    ):
        super().__init__(pairs, row_length=row_length, places=places, parts=parts)
        self._are_safe = np.array(are_safe)

    @classmethod
    def read_safety(
        cls, path: str | Path, tokenizer: Tokenizer, *, row_length: int, parts: int = 1, form: RecordFormat
    ) -> Self:
        """Read a file in the form of PKU-SafeRLHF; pairs that are too long are skipped and counted.

        Raises:
          DataError: a line is not such a pair, none is left, or all answers are equally safe.
        """
        pairs, are_safe, places, num_too_long = [], [], [], 0
        for where, record in read_records(path, form):
            prompt, answers, safe = parse_safety(record, where, form)
            safer, other = (encode_answer(tokenizer, prompt, answer, where) for answer in answers)
            if max(len(safer.ids), len(other.ids)) > row_length:
                num_too_long += 1
            else:
                pairs.append((safer, other))
                are_safe.append(safe)
                places.append(where)
        check_some_left(path, len(pairs), num_too_long, what="pairs", row_length=row_length)
        if len({flag for flags in are_safe for flag in flags}) == 1:
            what = "safe" if are_safe[0][0] else "harmful"
            raise DataError(f"{path}: all answers are {what}, so a cost of 0 cannot separate them; add others")
        return cls(pairs, are_safe, row_length=row_length, places=places, parts=parts)

    def batch(self, indices: np.ndarray) -> Batch:
        """As of `PreferencePairs`, with the values `chosen_safe_B` and `rejected_safe_B`, 1.0 for safe answers."""
        batch = super().batch(indices)
        safe_B2 = np.where((indices >= 0)[:, None], self._are_safe[indices], False).astype(np.float32)
        return replace(batch, values={"chosen_safe_B": safe_B2[:, 0], "rejected_safe_B": safe_B2[:, 1]})
