"""Tool calls, their results and names of speakers as plain text, for chat templates that do not write them.

The form is that of Hermes and Qwen: tools are listed in the system prompt, a call is JSON in <tool_call> within an
answer, and results are the user's, in <tool_response>.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# What a template may write itself.
CALLS, RESULTS, TOOLS, NAMES = "tool calls", "results of tools", "tools", "names of speakers"

# A call in an answer; the last one may be cut off.
CALL_BEGINS = "<tool_call>"
CALL = re.compile(rf"{CALL_BEGINS}(.*?)(?:</tool_call>|\Z)", re.DOTALL)

_TOOLS_TEXT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def as_written(
    messages: Sequence[dict], tools: Sequence[dict] | None, writes: Collection[str]
) -> tuple[list[dict], Sequence[dict] | None]:
    """The messages and tools that a template gets which writes only some of CALLS, RESULTS, TOOLS and NAMES.

    Adjacent results become one message. Everything else stays as it is.
    """
    written: list[dict] = []
    before = None
    for message in messages:
        role, previous = message.get("role"), before
        before = role
        if role == "tool":
            if RESULTS not in writes:
                text = f"<tool_response>\n{message['content']}\n</tool_response>"
                if previous == "tool":
                    text = f"{written.pop()['content']}\n{text}"
                message = {"role": "user", "content": text}
        elif "name" in message and NAMES not in writes:
            message = {**_without(message, "name"), "content": f"{message['name']}: {message['content']}"}
        if message.get("tool_calls") and CALLS not in writes:
            parts = [*([message["content"]] if message["content"] else []), *map(_call_text, message["tool_calls"])]
            message = {**_without(message, "tool_calls"), "content": "\n".join(parts)}
        written.append(message)
    if tools and TOOLS not in writes:
        text = _TOOLS_TEXT.format(tools="\n".join(map(to_json, tools)))
        if written and written[0].get("role") == "system":
            written[0] = {**written[0], "content": f"{written[0]['content']}\n\n{text}"}
        else:
            written.insert(0, {"role": "system", "content": text})
        return written, None
    return written, tools


def read_calls(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer around its calls, and the calls: `{"name", "arguments"}` each, the latter an object.

    If one is no such JSON, or calls none of `names`, all of the answer is text.
    """
    calls = []
    for found in CALL.findall(text):
        try:
            call = json.loads(found)
        except (ValueError, RecursionError):
            return text, []
        if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
            return text, []
        if not isinstance(call.get("name"), str) or call["name"] not in names:
            return text, []
        calls.append({"name": call["name"], "arguments": call["arguments"]})
    return CALL.sub("", text) if calls else text, calls


def to_json(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def texts_in(value: Any) -> Iterable[str]:
    """Every string in nested objects and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def _call_text(call: dict) -> str:
    function = call["function"]
    written = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{to_json(written)}\n</tool_call>"


def _without(message: dict, key: str) -> dict:
    return {name: value for name, value in message.items() if name != key}
