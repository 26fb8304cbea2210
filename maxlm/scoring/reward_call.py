"""A reward function called with care: it may be the user's own, and what it gives decides what is learned."""

import copy
import inspect
import math
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.data.preference import Prompt
from maxlm.errors import ConfigError
from maxlm.scoring.rewards import RewardFunction

_WANTED = "a reward is a finite number for each call with (completion, record)"


class CheckedReward:
    """Rewards of completions, each a finite number.

    Args:
      name: as `objective.reward` has it, to tell with a mistake.
      function: (completion, record of the training file) -> number.
    """

    def __init__(self, name: str, function: RewardFunction):
        self._name, self._function = name, function

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """The reward of each completion of the prompt beside it: float32 [completions].

        Raises:
          ConfigError: the function has raised, or given something else.
        """
        rewards = [self._reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        return np.array(rewards, np.float32)

    def try_out(self, prompts: Sequence[Prompt]) -> None:
        """Call it for the first and the last prompt, with the right answer as completion and with nothing at all.

        Raises:
          ConfigError: as above.
        """
        for prompt in {id(prompt): prompt for prompt in (prompts[0], prompts[-1])}.values():
            self([prompt, prompt], [str(prompt.record["answer"]), ""])

    def _reward(self, prompt: Prompt, completion: str) -> float:
        # A function that changes its record must not change what it is called with next time.
        record = copy.deepcopy(prompt.record)
        try:
            given = self._function(completion, record)
        # Whatever the user's code does, calling `exit` among it.
        except (Exception, SystemExit) as error:
            message = " ".join(str(error).split())[:200]
            problem = f"has raised {type(error).__name__}: {message}{self._line_of(error)}"
            raise self._error(prompt, completion, problem) from error
        if (problem := _problem_with(given)) is not None:
            raise self._error(prompt, completion, f"has given {problem}")
        return float(given)

    def _error(self, prompt: Prompt, completion: str, problem: str) -> ConfigError:
        shown = completion if len(completion) <= 60 else completion[:60] + "…"
        where = f" for {prompt.place}" if prompt.place else ""
        return ConfigError(
            [f"objective.reward: {self._name}{where} and the completion {shown!r} {problem}; {_WANTED}; mend it"]
        )

    def _line_of(self, error: BaseException) -> str:
        """Where in the function's own file it was raised, or was called that raised it."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self._function))
        except TypeError:
            return ""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        return f" ({file}:{lines[-1]})" if lines else ""


def _problem_with(given: Any) -> str | None:
    """What something is, in words, where it is no finite number."""
    if given is None:
        return "None"
    if inspect.iscoroutine(given):
        given.close()
        return "a coroutine (it must be no `async` function)"
    if isinstance(given, (str, bytes)):
        return f"the text {given[:40]!r}"
    try:
        array = np.asarray(given)
    except Exception:
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        return f"an object of type {type(given).__name__}"
    if array.ndim:
        return f"{array.size} values in a {type(given).__name__}"
    with np.errstate(over="ignore"):
        value = float(np.float32(array))
    return None if math.isfinite(value) else str(float(array))
