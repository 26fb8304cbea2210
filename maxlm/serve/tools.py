"""Tools in requests and replies: what a chat template gets of them, and the calls in an answer."""

import json
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from maxlm.data.examples.tool_calls import link_results, parse_calls, parse_tools
from maxlm.errors import DataError, TokenizerError
from maxlm.prompts.tools import read_calls
from maxlm.tokenizer.codec import Tokenizer


def usable_tools(tools: Sequence[dict[str, Any]] | None, choice: str | None, tokenizer: Tokenizer) -> list[dict]:
    """The tools that an answer may call, in OpenAI's form.

    Raises:
      DataError: one is no function, two have a name, or calls in the form of the chat template cannot be read.
    """
    if not tools or choice == "none":
        return []
    parsed = parse_tools(list(tools), "tools") or []
    names = [tool["function"]["name"] for tool in parsed]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"tools: the name {twice!r:.60} is given twice")
    if not _calls_are_read(tokenizer):
        raise DataError(
            "tools are not supported for this model: its chat template writes calls in a form that this server cannot"
            " read; leave tools out, or send tool_choice: none"
        )
    return parsed


def linked_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with calls as chat templates get them, and each result with its call.

    Raises:
      DataError: a call is malformed, or a result is of no call.
    """
    parsed = []
    for number, message in enumerate(messages, 1):
        if "tool_calls" in message:
            calls = parse_calls(message["tool_calls"], f"messages: message {number}: tool_calls")
            message = message | {"tool_calls": calls}
        parsed.append(message)
    return link_results(parsed, "messages")


def answer_with_calls(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer, and its calls as the API has them."""
    content, calls = read_calls(text, names)
    return content, [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
        }
        for call in calls
    ]


def _calls_are_read(tokenizer: Tokenizer) -> bool:
    """Whether a call that the chat template writes is found again in the text of its tokens."""
    call = {"name": "f", "arguments": {"x": 1}}
    question = {"role": "user", "content": "a"}
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
    }
    try:
        written = tokenizer.decode(tokenizer.encode_chat([question, answer]).ids)
    except TokenizerError:
        return False
    return read_calls(written, ["f"])[1] == [call]
