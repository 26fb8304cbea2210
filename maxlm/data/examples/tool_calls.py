"""Tools and tool calls in the forms of OpenAI and ShareGPT, converted to one: OpenAI's, with arguments as objects."""

import json
from typing import Any

from maxlm.errors import DataError
from maxlm.runtime.json_objects import unique_keys

Calls = list[dict[str, Any]]


def parse_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The functions that a chat may call: a list, or JSON text of one, of functions with or without `type` around them.

    Returns:
      `{"type": "function", "function": {"name", ...}}` each; None if there are none.

    Raises:
      DataError: it is something else.
    """
    if isinstance(tools, str):
        tools = _json(tools, f"{where}: tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: tools must be a list of functions, or its JSON text, not {type(tools).__name__}")
    return [_tool(tool, f"{where}: tool {number}") for number, tool in enumerate(tools, 1)]


def _tool(tool: Any, what: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f'{what} must be a function: an object with a name, or {{"type": "function", "function": ...}}')
    if tool is not function and tool.get("type", "function") != "function":
        raise DataError(f"{what} is of type {tool['type']!r}, but only functions are supported; remove it")
    return {"type": "function", "function": function}


def parse_calls(calls: Any, what: str) -> Calls:
    """The calls of an answer: `tool_calls` or `function_call` of OpenAI, or the content of `function_call` of ShareGPT.

    Args:
      calls: a call, a list of calls, or JSON text of these. A call has a name and arguments, which are an object or its
        JSON text, either itself or as `function`.

    Returns:
      `{"type": "function", "function": {"name", "arguments"}}` each, with an `id` if it has one.

    Raises:
      DataError: a call is something else; it begins with `what`.
    """
    if isinstance(calls, str):
        calls = _json(calls, what)
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call, f"{what}: call {number}" if len(calls) > 1 else what) for number, call in enumerate(calls, 1)]


def _call(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{what} must be an object with the name of a function and its arguments")
    if call is not function and call.get("type", "function") != "function":
        raise DataError(f"{what} is of type {call['type']!r}, but only functions can be called")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{what}: arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise DataError(f"{what}: arguments must be an object, or its JSON text, not {type(arguments).__name__}")
    # Values of Parquet have every key of the column, most of them null.
    id_ = call.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise DataError(f"{what}: id must be a string, not {id_!r}")
    parsed = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return ({"id": id_} if id_ else {}) | parsed


def link_results(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages, with an id for every call, and for every result the id of its call.

    Results follow the answer with their calls, in any order if they name it, otherwise in that of the calls.

    Raises:
      DataError: a result is of no call.
    """
    linked, count = [], 0
    waiting: dict[str, str] = {}
    for number, message in enumerate(messages, 1):
        if calls := message.get("tool_calls"):
            named = []
            for call in calls:
                count += 1
                # Nine letters and digits, as templates of Mistral require.
                named.append({"id": f"call{count:05d}", **call})
            waiting |= {call["id"]: call["function"]["name"] for call in named}
            message = message | {"tool_calls": named}
        elif message["role"] == "tool":
            id_ = message.get("tool_call_id", next(iter(waiting), None))
            if id_ not in waiting:
                named_call = f"the call {id_!r}" if "tool_call_id" in message else "a tool"
                raise DataError(
                    f"{where}: message {number} is the result of {named_call}, but no answer right before it makes such"
                    " a call that has no result yet; add the call, or remove the result"
                )
            message = {"name": waiting.pop(id_), **message, "tool_call_id": id_}
        else:
            waiting = {}
        linked.append(message)
    return linked


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise DataError(f"{what}: is not JSON: {detail}") from None
