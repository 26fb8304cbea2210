"""Chats for fine-tuning: tokenization, packing into rows, and the rows of each step."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.batch import Batch, Stream
from maxlm.core.packing import pack
from maxlm.core.sharding import RowShard
from maxlm.data.messages import parse_messages
from maxlm.data.records import parse_chat, read_records
from maxlm.data.sample import even_sample
from maxlm.errors import DataError, TokenizerError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.runtime.progress import console
from maxlm.tokenizer.codec import Tokenizer


def encode_chat(tokenizer: Tokenizer, messages: Any, where: str, *, generation_prompt: bool = False) -> ChatTokens:
    """`Tokenizer.encode_chat` for messages from a file.

    Raises:
      DataError: they are not a list of messages, a role is unknown, or a message with a weight is not an answer.
    """
    messages = parse_messages(messages, where, RecordFormat())
    try:
        encoded = tokenizer.encode_chat(messages, generation_prompt=generation_prompt)
    except TokenizerError as error:
        remedy = "; objective.roles may map it to a known one" if str(error).startswith("chat role") else ""
        raise DataError(f"{where}: {error}{remedy}") from None
    for number, message in enumerate(messages, 1):
        if message.get("weight") and message["role"] != tokenizer.answering_role:
            raise DataError(
                f"{where}: message {number} of role {message['role']!r} has a weight, but only messages of the"
                f" {tokenizer.answering_role} are trained on; remove its weight, or set it to 0"
            )
    return encoded


def encode_prompt(tokenizer: Tokenizer, prompt: Any, where: str) -> list[int]:
    """Token ids of a prompt: messages up to the next answer, or a plain text after the bos token."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt, where, bos=True)
    return encode_chat(tokenizer, prompt, where, generation_prompt=True).ids


def encode_text(tokenizer: Tokenizer, text: str, where: str, *, bos: bool = False, eos: bool = False) -> list[int]:
    """`Tokenizer.encode` for a text from a file; raises DataError."""
    try:
        return tokenizer.encode(text, bos=bos, eos=eos)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}") from None


def encode_answer(tokenizer: Tokenizer, prompt: Any, answer: Any, where: str) -> ChatTokens:
    """Tokenize a prompt and an answer as one sequence, with weight 1 only on the answer, not on earlier ones."""
    if isinstance(prompt, str):
        if not isinstance(answer, str):
            raise DataError(f"{where}: if the prompt is a string, the answers must be strings")
        prompt_ids = encode_text(tokenizer, prompt, where, bos=True)
        ids = prompt_ids + encode_text(tokenizer, answer, where, eos=True)
        return ChatTokens(ids, [0.0] * len(prompt_ids) + [1.0] * (len(ids) - len(prompt_ids)))
    if isinstance(answer, str):
        answer = [{"role": tokenizer.answering_role, "content": answer}]
    if not isinstance(answer, list):
        raise DataError(f"{where}: an answer must be a string or a list of messages")
    given = [{**message, "weight": 0.0} for message in parse_messages(prompt, where, RecordFormat())]
    whole = encode_chat(tokenizer, [*given, *answer], where)
    if not any(whole.loss_weights):
        raise DataError(f"{where}: an answer has no message of role {tokenizer.answering_role!r}")
    return whole


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
    """

    def __init__(
        self, chats: Sequence[ChatTokens], *, row_length: int, places: Sequence[str] = (), prefixes: bool = False
    ):
        self.row_length = row_length
        if prefixes:
            chats = [_with_last_answer(chat) for chat in chats]
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
        form: RecordFormat | None = None,
        prefixes: bool = False,
    ) -> Self:
        """Read the chats of a file; those too long for a row, or with no answer to train on, are skipped and counted.

        Raises:
          DataError: a record is not a chat, or no chat is left.
        """
        form = form or RecordFormat()
        chats, places, num_too_long, num_weightless, unanswered = [], [], 0, 0, []
        for where, record in read_records(path, form):
            prompt, answer = parse_chat(record, where, form)
            if prompt is None:
                chat = encode_chat(tokenizer, answer, where)
            else:
                chat = encode_answer(tokenizer, prompt, answer, where)
            if not any(chat.loss_weights):
                if any("weight" in message for message in answer):
                    num_weightless += 1
                else:
                    unanswered.append(where)
            elif len(chat.ids) - 1 > row_length:
                num_too_long += 1
            else:
                chats.append(chat)
                places.append(where)
        if num_weightless:
            console.print(f"{path}: {num_weightless} chats have only weights of 0 and are skipped", markup=False)
        if unanswered:
            lacks = f"no message of role {tokenizer.answering_role!r}"
            if not chats and not num_too_long:
                raise DataError(
                    f"{unanswered[0]}: has {lacks}, like every other chat that could be trained on;"
                    " objective.roles may name the role that answers"
                )
            console.print(
                f"{path}: {len(unanswered)} chats have {lacks} and are skipped; the first is {unanswered[0]}",
                markup=False,
            )
        check_some_left(path, len(chats), num_too_long, what="chats", row_length=row_length)
        packed = cls(chats, row_length=row_length, places=places, prefixes=prefixes)
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
