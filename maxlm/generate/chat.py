"""A conversation in the terminal."""

import sys
from collections.abc import Callable
from typing import Any

from maxlm.errors import MaxlmError, RequestError
from maxlm.generate.engine import Engine
from maxlm.generate.model import LoadedModel
from maxlm.generate.request import Request


class Chat:
    """Keeps the history of a conversation and prints answers as they are generated."""

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        self._model = model
        self._engine = engine
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        self._seed = seed
        self.messages: list[dict] = list(self._opening)

    def run(self, read_line: Callable[[str], str] = input) -> int:
        """Read lines until /quit or end of input; return the exit code."""
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{self._model.name}: /reset clears the conversation, /quit exits, Ctrl-C stops an answer")
        while True:
            try:
                line = read_line("> " if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            except UnicodeDecodeError as error:
                raise RequestError(f"standard input is not {error.encoding.upper()}; encode it as UTF-8") from None
            if line == "/quit":
                return 0
            if line == "/reset":
                self.messages = list(self._opening)
                print("(conversation cleared)")
            elif line.startswith("/"):
                print(f"(unknown command {line.split()[0]}; the commands are /reset and /quit)")
            elif line:
                self._answer(line)

    def _answer(self, question: str) -> None:
        """Print an answer and append the turn to the history; on an error the history is left as it was."""
        messages = [*self.messages, {"role": "user", "content": question}]
        answer = ""
        try:
            # Each turn has its own random stream, so a repeated question may get a different answer.
            stream = (len(messages), 0)
            request = Request(tuple(self._model.encode(messages)), seed=self._seed, stream=stream, **self._settings)
            for event in self._engine.stream(request):
                answer += event.text
                print(event.text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except MaxlmError as error:
            print(f"({error}; /reset clears the conversation)")
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]
