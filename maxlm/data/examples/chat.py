"""Chats for fine-tuning: packing into rows, and the rows of each step."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from maxlm.config.data import ChatConfig
from maxlm.core.batch import Batch, Stream
from maxlm.core.packing import pack
from maxlm.core.sharding import RowShard
from maxlm.data.examples.chat_reader import read_chats
from maxlm.data.sample import even_sample
from maxlm.errors import DataError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.runtime.progress import console
from maxlm.tokenizer.codec import Tokenizer


class EpochOrder:
    """An endless sequence of examples: each epoch is a permutation that depends only on seed and epoch."""

    def __init__(self, num_examples: int, *, seed: int):
        self._num_examples = num_examples
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(num_examples)
        )

    def indices(self, step: int, *, batch_size: int, shard: int = 0, num_shards: int = 1) -> np.ndarray:
        """This shard's examples of a step: [batch_size / num_shards]."""
        share = batch_size // num_shards
        start = step * batch_size + shard * share
        epochs, places = np.divmod(np.arange(start, start + share), self._num_examples)
        return np.array([self._permutation(int(epoch))[place] for epoch, place in zip(epochs, places)])


def training_order(path: str, num_examples: int, *, batch_size: int, seed: int) -> EpochOrder:
    """The order in which a training file is read; prints a warning if a batch repeats examples."""
    if num_examples < batch_size:
        console.print(
            f"{path}: has {num_examples} rows, so that a batch of batch_size={batch_size} repeats some;"
            " lower batch_size, or give more examples",
            markup=False,
        )
    return EpochOrder(num_examples, seed=seed)


class PackedChats:
    """Chats as token ids, packed into rows.

    A row has several chats, each a segment with positions from 0. Targets are the next tokens of the same chat; loss
    weights are 1 where the target is the assistant's. The last token of a chat is only a target.

    Args:
      places: FILE:LINE of each chat.
      prefixes: for a prefix language model, whose prompts attend to themselves in both directions: only the last answer
        of a chat is trained on, and what is before it is its prefix.
      weighting: what has the weight 1 in the loss: each learned token, or each dialogue, by dividing its weights by the
        number of its learned tokens.
    """

    def __init__(
        self,
        chats: Sequence[ChatTokens],
        *,
        row_length: int,
        places: Sequence[str] = (),
        prefixes: bool = False,
        weighting: Literal["token", "dialogue"] = "token",
    ):
        self.row_length = row_length
        if prefixes:
            chats = [_with_last_answer(chat) for chat in chats]
        if weighting == "dialogue":
            chats = [_weighing_one(chat) for chat in chats]
        # As in decoding: the last token of the prompt begins the answer.
        self._prefix_lengths = np.array([max(_answer_start(chat) - 1, 0) for chat in chats]) if prefixes else None
        self._places = places
        self._lengths = np.array([len(chat.ids) - 1 for chat in chats])
        self._starts = np.concatenate([[0], np.cumsum(self._lengths + 1)[:-1]])
        self._ids = np.concatenate([np.array(chat.ids, np.int32) for chat in chats])
        self._weights = np.concatenate([np.array(chat.loss_weights, np.float32) for chat in chats])
        self.rows = pack(self._lengths, row_length)

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        row_length: int,
        form: ChatConfig | None = None,
        prefixes: bool = False,
    ) -> Self:
        """Read the chats of a file: see `read_chats`."""
        form = form or ChatConfig()
        chats, places = read_chats(path, tokenizer, row_length=row_length, form=form)
        packed = cls(chats, row_length=row_length, places=places, prefixes=prefixes, weighting=form.weighting)
        full = packed._lengths.sum() / (len(packed.rows) * row_length)
        console.print(f"{path}: {len(chats)} chats in {len(packed.rows)} rows, {full:.0%} full", markup=False)
        return packed

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def places(self, row: int) -> list[str]:
        """FILE:LINE of each chat in a row."""
        return [self._places[chat] for chat in self.rows[row]]

    def batch(self, row_indices: np.ndarray) -> Batch:
        """These rows, in order, as the stream `text`; index -1 gives a row of padding."""
        members = [self.rows[index] if index >= 0 else [] for index in row_indices]
        chats = np.array([chat for row in members for chat in row], np.int64)
        row_of_chat = np.repeat(np.arange(len(members)), [len(row) for row in members])
        segment_of_chat = np.array([segment for row in members for segment in range(1, len(row) + 1)])
        offset_of_chat = np.array(
            [offset for row in members for offset in np.cumsum([0, *self._lengths[row][:-1]])[: len(row)]], np.int64
        )
        lengths = self._lengths[chats]
        source = _ranges(self._starts[chats], lengths)
        prefixes = self._prefix_lengths
        target = _ranges(row_of_chat * self.row_length + offset_of_chat, lengths)

        def rows(values: np.ndarray, dtype=np.int32) -> np.ndarray:
            flat = np.zeros(len(members) * self.row_length, dtype)
            flat[target] = values
            return flat.reshape(len(members), self.row_length)

        text = Stream(
            tokens=rows(self._ids[source]),
            targets=rows(self._ids[source + 1]),
            loss_weights=rows(self._weights[source + 1], np.float32),
            segment_ids=rows(np.repeat(segment_of_chat, lengths)),
            positions=rows(_ranges(np.zeros_like(lengths), lengths)),
            prefix_lengths=prefixes if prefixes is None else rows(np.repeat(prefixes[chats], lengths)),
        )
        return Batch({"text": text})


def _answer_start(chat: ChatTokens) -> int:
    """The index of the first token of the last answer that is trained on."""
    is_trained = np.array(chat.loss_weights) > 0
    last = np.flatnonzero(is_trained)[-1]
    before = np.flatnonzero(~is_trained[:last])
    return int(before[-1]) + 1 if before.size else 0


def _with_last_answer(chat: ChatTokens) -> ChatTokens:
    """The chat, with the loss weights of its last answer only."""
    start = _answer_start(chat)
    return replace(chat, loss_weights=[0.0] * start + list(chat.loss_weights[start:]))


def _weighing_one(chat: ChatTokens) -> ChatTokens:
    """The chat, with its weights divided by the number of tokens that are learned."""
    count = sum(weight > 0 for weight in chat.loss_weights[1:])
    return replace(chat, loss_weights=[weight / count for weight in chat.loss_weights])


def check_some_left(path: str | Path, num_left: int, num_too_long: int, *, what: str, row_length: int) -> None:
    """Print how many examples were too long; raise DataError if none is left."""
    if num_left == 0:
        reason = f"all {num_too_long} {what} are longer than" if num_too_long else f"has no {what} to fit in"
        remedy = "raise row_length" if num_too_long else "give a JSONL file with at least one line"
        raise DataError(f"{path}: {reason} row_length={row_length} tokens; {remedy}")
    if num_too_long:
        console.print(
            f"{path}: {num_too_long} of {num_too_long + num_left} {what} are longer than row_length={row_length}"
            " tokens and are skipped",
            markup=False,
        )


def padded_batches(num_examples: int, batch_size: int, limit: int) -> list[np.ndarray]:
    """Index arrays [batch_size] of examples, each at most once and ascending; the last one is padded with -1.

    If there are more examples than `limit` batches hold, `even_sample` selects them.
    """
    sample = even_sample([np.arange(num_examples)], limit * batch_size)
    padded = np.full(-(-len(sample) // batch_size) * batch_size, -1)
    padded[: len(sample)] = sample
    return list(padded.reshape(-1, batch_size))


def share_of(indices: np.ndarray, shard: int, num_shards: int) -> np.ndarray:
    """The part of a batch's indices that shard `shard` of `num_shards` reads."""
    return np.split(indices, num_shards)[shard]


def step_batches(
    order: EpochOrder,
    build: Callable[[np.ndarray], Any],
    start_step: int,
    *,
    batch_size: int,
    rows: RowShard,
) -> Iterator[Any]:
    """Endless batches: `build` of the examples of each step from `start_step` on."""
    step = start_step
    while True:
        yield build(order.indices(step, batch_size=batch_size, shard=rows.index, num_shards=rows.count))
        step += 1


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated ranges: start, start + 1, ... of each."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
