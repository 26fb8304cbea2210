"""Chats, prompts and answers of files as token ids; mistakes are reported with file and line."""

from itertools import pairwise
from typing import Any

from maxlm.config.data import RecordFormat
from maxlm.data.examples.messages import Messages, parse_messages
from maxlm.data.examples.tool_calls import link_results
from maxlm.errors import DataError, TokenizerError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.tokenizer.codec import Tokenizer

_TOOLS_NEED_MESSAGES = "the prompt is a text, but tools need messages; write [{role: user, content: ...}]"


def encode_chat(
    tokenizer: Tokenizer,
    messages: Any,
    where: str,
    *,
    tools: list[dict[str, Any]] | None = None,
    generation_prompt: bool = False,
) -> ChatTokens:
    """`Tokenizer.encode_chat` for messages from a file.

    Raises:
      DataError: they are not a list of messages, a role is unknown, the template refuses them, a message with a weight
        is not an answer, an answer to learn is empty, or the result of a tool follows no call.
    """
    messages = link_results(parse_messages(messages, where, RecordFormat()), where)
    try:
        encoded = tokenizer.encode_chat(messages, tools=tools, generation_prompt=generation_prompt)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}{_remedy(str(error), messages)}") from None
    for number, message in enumerate(messages, 1):
        if message["role"] != tokenizer.answering_role:
            if message.get("weight"):
                raise DataError(
                    f"{where}: message {number} of role {message['role']!r} has a weight, but only messages of the"
                    f" {tokenizer.answering_role} are trained on; remove its weight, or set it to 0"
                )
        elif message.get("weight", 1.0) and not generation_prompt:
            check_answer(message["content"], where, what=f"message {number}", calls=bool(message.get("tool_calls")))
    return encoded


def check_answer(text: str, where: str, *, what: str, calls: bool = False) -> None:
    """Raise DataError if an answer to learn has neither text nor calls."""
    if not calls and not text.strip():
        raise DataError(f"{where}: {what} is an empty answer; remove the record, or set the weight of the message to 0")


def _remedy(problem: str, messages: Messages) -> str:
    if problem.startswith("chat role"):
        return "; objective.roles may map it to a known one"
    if problem.startswith("the chat template refuses"):
        for number, (message, following) in enumerate(pairwise(messages), 1):
            if message["role"] == following["role"]:
                both = f"messages {number} and {number + 1} are both of role {message['role']!r}"
                return f"; {both}: write them as one, or remove one"
    return ""


def encode_prompt(
    tokenizer: Tokenizer, prompt: Any, where: str, *, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Token ids of a prompt: messages up to the next answer, or a plain text after the bos token.

    Raises:
      DataError: it cannot be encoded, or a text comes with tools, for which it has no place.
    """
    if isinstance(prompt, str) and tools:
        raise DataError(f"{where}: {_TOOLS_NEED_MESSAGES}")
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt, where, bos=True)
    return encode_chat(tokenizer, prompt, where, tools=tools, generation_prompt=True).ids


def encode_text(tokenizer: Tokenizer, text: str, where: str, *, bos: bool = False, eos: bool = False) -> list[int]:
    """`Tokenizer.encode` for a text from a file; raises DataError."""
    try:
        return tokenizer.encode(text, bos=bos, eos=eos)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}") from None


def encode_answer(
    tokenizer: Tokenizer, prompt: Any, answer: Any, where: str, *, tools: list[dict[str, Any]] | None = None
) -> ChatTokens:
    """Tokenize a prompt and an answer as one sequence, with weight 1 only on the answer, not on earlier ones.

    Raises:
      DataError: see `encode_chat`.
    """
    if isinstance(prompt, str):
        if not isinstance(answer, str):
            raise DataError(f"{where}: if the prompt is a string, the answers must be strings")
        if tools:
            raise DataError(f"{where}: {_TOOLS_NEED_MESSAGES}")
        check_answer(answer, where, what="it")
        prompt_ids = encode_text(tokenizer, prompt, where, bos=True)
        ids = prompt_ids + encode_text(tokenizer, answer, where, eos=True)
        return ChatTokens(ids, [0.0] * len(prompt_ids) + [1.0] * (len(ids) - len(prompt_ids)))
    whole = encode_chat(tokenizer, join_answer(tokenizer, prompt, answer, where), where, tools=tools)
    if not any(whole.loss_weights):
        raise DataError(f"{where}: an answer has no message of role {tokenizer.answering_role!r}")
    return whole


def join_answer(tokenizer: Tokenizer, prompt: Any, answer: Any, where: str) -> Messages:
    """The messages of a prompt and an answer to it, with weight 0 for those of the prompt."""
    if isinstance(answer, str):
        answer = [{"role": tokenizer.answering_role, "content": answer}]
    if not isinstance(answer, list):
        raise DataError(f"{where}: an answer must be a string or a list of messages")
    return [*({**message, "weight": 0.0} for message in parse_messages(prompt, where, RecordFormat())), *answer]
