"""Environments: what answers a model during a rollout, such as the results of tools that it calls.

A call is JSON in <tool_call> in the model's answer, {"name": ..., "arguments": {...}}, as `maxlm.prompts.tools` writes
it for templates without a form of their own. Whatever a tool does, the model gets a text of bounded length.
"""

import ast
import json
import math
import operator
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from maxlm.config.base import Count, Frozen
from maxlm.errors import DataError
from maxlm.prompts.few_shot import Bm25
from maxlm.prompts.tools import CALL
from maxlm.runtime.bounded import Limits, Program, run_program

# Of a program: what a model runs while it answers is short.
_LIMITS = Limits(seconds=5.0, cpu_seconds=5)


class Environment(Protocol):
    """What a model talks to."""

    @property
    def tools(self) -> Sequence[dict]:
        """Functions that the model may call, in OpenAI's form, for the chat template."""

    def step(self, conversation: Sequence[dict]) -> Sequence[dict] | None:
        """The messages that follow an answer; None ends the conversation.

        Args:
          conversation: the prompt's messages and those since; the last one is the model's.
        """


@dataclass(frozen=True)
class Tool:
    """A function of named arguments that returns a text, or raises what the model is told.

    parameters: the JSON schema of each argument, by name; all are required.
    """

    name: str
    description: str
    parameters: Mapping[str, dict]
    function: Callable[..., str]

    @property
    def declaration(self) -> dict:
        """It as chat templates show it."""
        parameters = {
            "type": "object",
            "properties": dict(self.parameters),
            "required": list(self.parameters),
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolEnvironment:
    """Runs the tools that an answer calls, and ends with an answer without calls.

    max_calls: of one answer; the others are not run. max_characters: of a result. seconds: for a call, after which its
      thread is left to itself.
    """

    functions: tuple[Tool, ...]
    max_calls: int = 4
    max_characters: int = 2000
    seconds: float = 60.0

    @property
    def tools(self) -> list[dict]:
        return [tool.declaration for tool in self.functions]

    def step(self, conversation: Sequence[dict]) -> list[dict] | None:
        calls = CALL.findall(conversation[-1]["content"])
        if not calls:
            return None
        results = [self._shortened(self._result(call)) for call in calls[: self.max_calls]]
        if len(calls) > self.max_calls:
            results.append(f"error: only the first {self.max_calls} of {len(calls)} calls were run")
        return [{"role": "tool", "content": result} for result in results]

    def _result(self, text: str) -> str:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"error: the call is not JSON: {error}"
        if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
            return 'error: a call is {"name": ..., "arguments": {...}}'
        tool = next((tool for tool in self.functions if tool.name == call.get("name")), None)
        if tool is None:
            return (
                f"error: there is no tool {call.get('name')!r}, only {', '.join(each.name for each in self.functions)}"
            )
        arguments = call["arguments"]
        if set(arguments) != set(tool.parameters):
            return f"error: {tool.name} takes {', '.join(tool.parameters)}, not {', '.join(arguments) or 'nothing'}"
        outcome: list[str] = []

        def run() -> None:
            try:
                outcome.append(tool.function(**arguments))
            except Exception as error:
                # A tool's failure is the model's to see, and never ends training.
                outcome.append(f"error: {type(error).__name__}: {error}")

        # A daemon, so that the process can end while it still runs.
        thread = threading.Thread(target=run, name=tool.name, daemon=True)
        thread.start()
        thread.join(self.seconds)
        return outcome[0] if outcome else f"error: {tool.name} took longer than {self.seconds:g} seconds"

    def _shortened(self, result: str) -> str:
        more = len(result) - self.max_characters
        # Surrogates, which JSON may contain, are no text that a tokenizer takes.
        kept = result[: self.max_characters].encode("utf-8", "replace").decode()
        return kept if more <= 0 else f"{kept}... ({more} more characters)"


def calculator() -> Tool:
    """Arithmetic with + - * / // % **, brackets, and numbers of up to 1000 digits."""
    number = {"type": "string", "description": "such as (3 + 4) * 2 ** 5 / 7"}
    return Tool("calculator", "Compute an arithmetic expression.", {"expression": number}, _calculate)


def python(limits: Limits = _LIMITS) -> Tool:
    """Python programs in a bounded and isolated process."""

    def run(code: str) -> str:
        outcome = run_program(Program(code), limits)
        text = outcome.stdout + (f"\n{outcome.stderr}" if outcome.stderr else "")
        if outcome.ended == "exit":
            return text if outcome.exit_code == 0 else f"{text}\nerror: exit code {outcome.exit_code}"
        limit = {"time": f"{limits.seconds:g} seconds", "output": f"{limits.output_bytes} bytes"}.get(outcome.ended, "")
        # Its output may be long, and the error must not be lost with its end.
        return f"error: the program was ended by its limit of {outcome.ended} {limit}\n{text}"

    source = {"code": {"type": "string", "description": "a whole program; what it prints is the result"}}
    return Tool("python", "Run a Python program without network or files.", source, run)


def retrieval(folder: str | Path, *, count: int = 3) -> Tool:
    """The paragraphs of the .txt and .md files below a folder that fit a question best, by BM25.

    Raises:
      DataError: there are no such files, or one is not UTF-8.
    """
    texts: list[str] = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in (".txt", ".md")):
        try:
            paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        texts += [f"{path.relative_to(folder)}: {text.strip()}" for text in paragraphs if text.strip()]
    if not texts:
        raise DataError(f"{folder}: has no .txt or .md file with text to search in")
    index = Bm25(texts)

    def search(query: str) -> str:
        scores_D = index.scores(query)
        best = sorted(range(len(texts)), key=lambda place: (-scores_D[place], place))[:count]
        return "\n\n".join(texts[place] for place in best if scores_D[place] > 0) or "nothing was found"

    return Tool("search", "Search a collection of texts.", {"query": {"type": "string"}}, search)


class EnvironmentConfig(Frozen):
    """Tools that the model may call while it answers."""

    tools: tuple[Literal["calculator", "python", "search"], ...] = Field(
        description="`python` runs in a bounded process (Linux); `search` reads `folder`.", min_length=1
    )
    folder: str | None = Field(None, description="Of .txt and .md files, for the tool `search`.")
    max_turns: Count = Field(4, description="Of the model in a conversation; max_new_tokens is of each turn.")
    max_tokens: Count = Field(512, description="Of a conversation after the prompt, results of tools included.")

    def problems(self) -> list[str]:
        """What is wrong with these settings."""
        if ("search" in self.tools) != (self.folder is not None):
            return ["objective.environment.folder and the tool `search` need one another; set both, or neither"]
        return []

    def build(self) -> ToolEnvironment:
        """The environment.

        Raises:
          DataError: there is nothing to search in.
        """
        made = {"calculator": calculator, "python": python, "search": lambda: retrieval(str(self.folder))}
        return ToolEnvironment(tuple(made[name]() for name in self.tools))


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_MAX_BITS = 3322  # 1000 digits
_MAX_CHARACTERS = 500


def _calculate(expression: str) -> str:
    if not isinstance(expression, str) or len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"an expression is a text of at most {_MAX_CHARACTERS} characters")
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return repr(int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value)


def _value(node: ast.AST) -> int | float:
    """The value of an expression; no intermediate result takes long or much memory."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result: int | float = value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            result = _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = _value(left), _value(right)
            if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _MAX_BITS:
                raise ValueError("a power is too large")
            result = base**exponent
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")
    if isinstance(result, complex) or (isinstance(result, float) and not math.isfinite(result)):
        raise ValueError("a result is not a real number")
    if isinstance(result, int) and result.bit_length() > _MAX_BITS:
        raise ValueError("a result has more than 1000 digits")
    return result
