"""Chats to learn from: read from a file, shortened where they are too long, and counted."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from maxlm.config.data import ChatConfig
from maxlm.data.examples.encoding import encode_answer, encode_chat, join_answer
from maxlm.data.examples.messages import Messages
from maxlm.data.examples.records import Chat, parse_chat, read_records
from maxlm.data.examples.turns import Encode, is_learned, split, truncated, with_selected
from maxlm.errors import DataError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.runtime.progress import console
from maxlm.tokenizer.codec import Tokenizer


def read_chats(
    path: str | Path, tokenizer: Tokenizer, *, row_length: int, form: ChatConfig
) -> tuple[list[ChatTokens], list[str]]:
    """The chats of a file, of at most `row_length` + 1 tokens each, and their places, FILE:LINE.

    What becomes of longer ones, and of those without an answer, or none that `form.train_on` selects, is printed.

    Raises:
      DataError: a record is not a chat, or all its answers have weight 0, or nothing is left; with file and line.
    """
    tokenizer.check_template()
    reader = _Reader(tokenizer, form, row_length)
    chats: list[ChatTokens] = []
    places: list[str] = []
    for where, record in read_records(path, form):
        parts = reader.examples(parse_chat(record, where, form), where)
        chats += parts
        places += [where] * len(parts)
    reader.report(path, found=bool(chats))
    return chats, places


@dataclass
class _Reader:
    """Makes examples of chats, and counts what becomes of them."""

    tokenizer: Tokenizer
    form: ChatConfig
    row_length: int
    num_chats: int = 0
    num_too_long: int = 0
    num_kept: int = 0  # what is left of those that are too long: chats, or their parts
    num_dropped: int = 0  # chats that are too long, or exchanges of chats that are split
    unanswered: list[str] = field(default_factory=list)
    unselected: list[str] = field(default_factory=list)

    def examples(self, chat: Chat, where: str) -> list[ChatTokens]:
        """What is learned of a chat: itself, nothing, or parts of it."""
        self.num_chats += 1
        if isinstance(chat.prompt, str):
            whole = encode_answer(self.tokenizer, chat.prompt, chat.answer, where)
            return [whole] if self._fits(whole) else self._count([], num_dropped=1)
        given = chat.answer if chat.prompt is None else join_answer(self.tokenizer, chat.prompt, chat.answer, where)
        messages = with_selected(given, self.form.train_on, self.tokenizer.answering_role)
        encode = partial(encode_chat, self.tokenizer, where=where, tools=chat.tools)
        whole = encode(messages)
        if not is_learned(whole):
            role = self.tokenizer.answering_role
            weights = [message.get("weight", 1.0) for message in given if message["role"] == role]
            if weights and not any(weights):
                raise DataError(f"{where}: all its answers have weight 0, so nothing of it is learned; remove it")
            (self.unselected if weights else self.unanswered).append(where)
            return []
        return [whole] if self._fits(whole) else self._shortened(messages, encode)

    def _fits(self, chat: ChatTokens) -> bool:
        # The last token is only a target.
        return len(chat.ids) <= self.row_length + 1

    def _shortened(self, messages: Messages, encode: Encode) -> list[ChatTokens]:
        if self.form.too_long == "split":
            parts, num_dropped = split(messages, encode, self.row_length + 1)
            return self._count(parts, num_dropped=num_dropped)
        rest = truncated(messages, encode, self.row_length + 1) if self.form.too_long == "truncate" else None
        parts = [] if rest is None or not is_learned(rest) else [rest]
        return self._count(parts, num_dropped=1 - len(parts))

    def _count(self, parts: list[ChatTokens], *, num_dropped: int) -> list[ChatTokens]:
        self.num_too_long += 1
        self.num_kept += len(parts)
        self.num_dropped += num_dropped
        return parts

    def report(self, path: str | Path, *, found: bool) -> None:
        """Print what became of chats that are too long, or without a selected answer; raise DataError if none is
        found."""
        longer = f"longer than row_length={self.row_length} tokens"
        if not found and self.num_too_long:
            raise DataError(f"{path}: all {self.num_too_long} chats are {longer}; raise row_length")
        lacks = {
            f"no message of role {self.tokenizer.answering_role!r}": self.unanswered,
            "no answer that objective.train_on selects": self.unselected,
        }
        for what, places in lacks.items():
            if places and not found:
                raise DataError(
                    f"{places[0]}: has {what}, like every other chat; objective.roles may name the role that answers,"
                    " and objective.train_on the answers to learn"
                )
            if places:
                console.print(
                    f"{path}: {len(places)} of {self.num_chats} chats have {what} and are skipped; the first is"
                    f" {places[0]}",
                    markup=False,
                )
        if not found:
            raise DataError(f"{path}: has no chats; give a file with at least one")
        if self.num_too_long:
            outcome = {
                "drop": " and are skipped",
                "truncate": f": {self.num_kept} lose their first turns, {self.num_dropped} are skipped",
                "split": f": {self.num_kept} parts are made of them, {self.num_dropped} exchanges are skipped",
            }
            console.print(
                f"{path}: {self.num_too_long} of {self.num_chats} chats are {longer}{outcome[self.form.too_long]}",
                markup=False,
            )
