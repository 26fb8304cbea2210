"""Turns of a chat: which answers are learned, and shorter chats from one that is too long."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from maxlm.data.examples.messages import Messages
from maxlm.prompts.chat_template import ChatTokens

TrainOn = Literal["all", "last"] | tuple[int | str, ...]
Encode = Callable[[Messages], ChatTokens]


def with_selected(messages: Sequence[dict[str, Any]], train_on: TrainOn, answering_role: str) -> Messages:
    """The messages, with weight 0 for answers that are not selected.

    Args:
      train_on: `all`, `last`, or numbers of answers (from 1, or from -1 backwards) and names of those who answer.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == answering_role]

    def is_selected(index: int) -> bool:
        if isinstance(train_on, str):
            return train_on == "all" or index == answers[-1]
        turn = answers.index(index) + 1
        return bool({turn, turn - len(answers) - 1, messages[index].get("name")} & {*train_on})

    return [
        message if index not in answers or is_selected(index) else {**message, "weight": 0.0}
        for index, message in enumerate(messages)
    ]


def truncated(messages: Messages, encode: Encode, limit: int) -> ChatTokens | None:
    """The chat without its first exchanges, as few as possible, so that it has at most `limit` tokens.

    The system prompt stays. None if the last exchange alone is too long.
    """
    system, exchanges = _exchanges(messages)
    # Fewer exchanges are shorter.
    count = bisect.bisect_left(
        range(len(exchanges)), True, key=lambda start: _encoded(system, exchanges[start:], encode, limit) is not None
    )
    return None if count == len(exchanges) else _encoded(system, exchanges[count:], encode, limit)


def split(messages: Messages, encode: Encode, limit: int) -> tuple[list[ChatTokens], int]:
    """Chats of consecutive exchanges of at most `limit` tokens, as long as possible, each after the system prompt.

    Returns:
      The chats that have something to learn, and the number of exchanges that are too long by themselves.
    """
    system, exchanges = _exchanges(messages)
    parts, num_too_long = [], 0
    while exchanges:
        longest, count = None, 0
        for end in range(1, len(exchanges) + 1):
            if (part := _encoded(system, exchanges[:end], encode, limit)) is None:
                break
            longest, count = part, end
        if longest is None:
            num_too_long += 1
        elif is_learned(longest):
            parts.append(longest)
        exchanges = exchanges[max(count, 1) :]
    return parts, num_too_long


def is_learned(chat: ChatTokens) -> bool:
    """Whether a token of it is learned; the first one is predicted from nothing."""
    return any(chat.loss_weights[1:])


def _exchanges(messages: Messages) -> tuple[Messages, list[Messages]]:
    """The system prompt, and the rest: each part is questions, or other messages to be answered, with their answers,
    including calls of tools and their results."""
    start = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[Messages] = []
    for index in range(start, len(messages)):
        asks, asked = (_asks(messages[i]["role"]) for i in (index, index - 1))
        if index == start or (asks and not asked):
            exchanges.append([])
        exchanges[-1].append(messages[index])
    return messages[:start], exchanges


def _asks(role: str) -> bool:
    return role in ("user", "system")


def _encoded(system: Messages, exchanges: list[Messages], encode: Encode, limit: int) -> ChatTokens | None:
    """None if it is longer than the limit."""
    chat = encode([*system, *(message for exchange in exchanges for message in exchange)])
    return chat if len(chat.ids) <= limit else None
