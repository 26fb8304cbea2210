"""Preference pairs and prompts: reading, tokenization, and padding to batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.batch import Batch, Stream
from maxlm.data.examples.chat import check_some_left
from maxlm.data.examples.encoding import encode_answer, encode_prompt
from maxlm.data.examples.records import (
    TOOL_KEYS,
    Text,
    is_undecided,
    parse_pair,
    parse_prompt,
    read_records,
    tools_of,
)
from maxlm.errors import DataError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.runtime.progress import console
from maxlm.tokenizer.codec import Tokenizer

# Rows are padded to a multiple of this.
_LENGTH_MULTIPLE = 16


class PreferencePairs:
    """The pairs of a file as token ids.

    Args:
      parts: row_length must be divisible by this.
      places: FILE:LINE of each pair.
      margins: of each pair, if the objective uses them.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[ChatTokens, ChatTokens]],
        *,
        row_length: int,
        places: Sequence[str] = (),
        parts: int = 1,
        margins: Sequence[float] | None = None,
    ):
        self._pairs = pairs
        self._places = places
        self._margins = margins
        longest = max(len(answer.ids) for pair in pairs for answer in pair)
        self.row_length = min(row_length, round_up(longest, parts))

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        row_length: int,
        parts: int = 1,
        form: RecordFormat | None = None,
        with_margins: bool = False,
    ) -> Self:
        """Read pairs of a file with `prompt`, `chosen` and `rejected`.

        Those too long, and votes for neither answer, are skipped and counted.

        Rows are as long as the longest answer, up to `row_length`, and divisible by `parts`.
        `prompt` is a list of messages or a plain string; an answer is a string, or, after messages, a list of messages,
        which may call the `tools` of the pair.

        Args:
          with_margins: whether a pair may have a `margin`, a number of 0 or more; 0 if it has none.

        Raises:
          DataError: a line is not a pair, or no pair is left.
        """
        form = form or RecordFormat()
        pairs, places, margins, num_too_long, num_undecided = [], [], [], 0, 0
        others = (*TOOL_KEYS, *(("margin",) if with_margins else ()))
        for where, record in read_records(path, form):
            if is_undecided(record):
                num_undecided += 1
                continue
            prompt, *answers = parse_pair(record, where, form, others=others)
            if answers[0] == answers[1]:
                raise DataError(
                    f"{where}: chosen and rejected are the same, so there is no preference; remove the line"
                )
            tools = tools_of(record, where, form)
            chosen, rejected = (encode_answer(tokenizer, prompt, answer, where, tools=tools) for answer in answers)
            if max(len(chosen.ids), len(rejected.ids)) > row_length:
                num_too_long += 1
            else:
                pairs.append((chosen, rejected))
                places.append(where)
                margins.append(_margin(record, where) if with_margins else 0.0)
        check_some_left(path, len(pairs), num_too_long, what="pairs", row_length=row_length)
        if num_undecided:
            console.print(f"{path}: {num_undecided} votes for neither answer are left out", markup=False)
        return cls(pairs, row_length=row_length, places=places, parts=parts, margins=margins if with_margins else None)

    def __len__(self) -> int:
        return len(self._pairs)

    def places(self, pair: int) -> list[str]:
        """FILE:LINE of a pair."""
        return [self._places[pair]]

    def batch(self, indices: np.ndarray) -> Batch:
        """These pairs, in order, as the streams `chosen` and `rejected`; index -1 gives padding.

        Each row has one sequence, left-aligned; loss weights are 1 where the target is the answer's. A row without
        tokens is padding. Margins are the value `margin_B`.
        """
        pairs = [self._pairs[index] if index >= 0 else (_NOTHING, _NOTHING) for index in indices]
        chosen, rejected = zip(*pairs)
        streams = {"chosen": pad(chosen, self.row_length), "rejected": pad(rejected, self.row_length)}
        if self._margins is None:
            return Batch(streams)
        margins = [self._margins[index] if index >= 0 else 0.0 for index in indices]
        return Batch(streams, {"margin_B": np.array(margins, np.float32)})


def _margin(record: dict[str, Any], where: str) -> float:
    margin = record.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise DataError(f"{where}: margin must be a number of 0 or more, not {str(margin)[:40]!r}; fix or remove it")
    return float(margin)


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from: token ids, the record for the reward function, its FILE:LINE, and text or messages."""

    ids: list[int]
    record: dict[str, Any]
    place: str = ""
    text: Text = ""


def read_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    row_length: int,
    form: RecordFormat | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[Prompt]:
    """Read prompts of a file; those longer than `max_prompt_length` are skipped. `tools` may be called in answers.

    All keys of a record, such as `answer`, are for its reward function.

    Raises:
      DataError: a line is not such a record, or no prompt is left.
    """
    form = form or RecordFormat()
    prompts, num_too_long = [], 0
    for where, record in read_records(path, form):
        text = parse_prompt(record, where, form)
        ids = encode_prompt(tokenizer, text, where, tools=tools)
        if len(ids) > max_prompt_length:
            num_too_long += 1
        else:
            prompts.append(Prompt(ids, record, where, text))
    check_some_left(path, len(prompts), num_too_long, what="prompts with their answers", row_length=row_length)
    return prompts


def pad(sequences: Sequence[ChatTokens], length: int) -> Stream:
    """Pad sequences to one per row, keeping all tokens; the last one has no target."""
    arrays = {name: np.zeros((len(sequences), length), np.int32) for name in ("tokens", "targets", "segment_ids")}
    loss_weights = np.zeros((len(sequences), length), np.float32)
    for row, sequence in enumerate(sequences):
        count = len(sequence.ids)
        arrays["tokens"][row, :count] = sequence.ids
        arrays["targets"][row, : max(count - 1, 0)] = sequence.ids[1:]
        arrays["segment_ids"][row, :count] = 1
        loss_weights[row, : max(count - 1, 0)] = sequence.loss_weights[1:]
    positions = np.arange(length, dtype=np.int32) * arrays["segment_ids"]
    return Stream(**arrays, loss_weights=loss_weights, positions=positions)


def round_up(length: int, parts: int = 1) -> int:
    """Round up to a length that keeps the number of compiled shapes low and is divisible by `parts`."""
    multiple = math.lcm(_LENGTH_MULTIPLE, parts)
    return -(-length // multiple) * multiple


_NOTHING = ChatTokens([], [])
