"""Calls reward functions, which may be user code, and validates the rewards that they return."""

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

_WANTED = "a reward function returns a finite number for (completion, record)"


class CheckedReward:
    """Rewards of completions, each a finite number.

    Args:
      name: as in `objective.reward`, for error messages.
      function: (completion, record of the training file) -> number.
    """

    def __init__(self, name: str, function: RewardFunction):
        self._name, self._function = name, function

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """The reward of each completion, with its prompt: float32 [completions].

        Raises:
          ConfigError: the function raised, or returned something else.
        """
        rewards = [self._reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        return np.array(rewards, np.float32)

    def try_out(self, prompts: Sequence[Prompt]) -> None:
        """Call the function for the first and last prompt, with the correct answer and with an empty completion.

        Raises:
          ConfigError: as above.
        """
        for prompt in {id(prompt): prompt for prompt in (prompts[0], prompts[-1])}.values():
            self([prompt, prompt], [str(prompt.record["answer"]), ""])

    def _reward(self, prompt: Prompt, completion: str) -> float:
        # A copy, so that a function that modifies its record does not affect later calls.
        record = copy.deepcopy(prompt.record)
        try:
            reward = self._function(completion, record)
        # User code may raise anything, or call `exit`.
        except (Exception, SystemExit) as error:
            message = " ".join(str(error).split())[:200]
            problem = f"raised {type(error).__name__}: {message}{self._line_of(error)}"
            raise self._error(prompt, completion, problem) from error
        if (problem := _problem_with(reward)) is not None:
            raise self._error(prompt, completion, f"returned {problem}")
        return float(reward)

    def _error(self, prompt: Prompt, completion: str, problem: str) -> ConfigError:
        shown = completion if len(completion) <= 60 else completion[:60] + "…"
        where = f" for {prompt.place}" if prompt.place else ""
        return ConfigError(
            [f"objective.reward: {self._name}{where} and the completion {shown!r} {problem}; {_WANTED}; fix it"]
        )

    def _line_of(self, error: BaseException) -> str:
        """The line of the function's own file that raised the error, or called what raised it."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self._function))
        except TypeError:
            return ""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        return f" ({file}:{lines[-1]})" if lines else ""


def _problem_with(reward: Any) -> str | None:
    """Describe a return value that is not a finite number; None if it is one."""
    if reward is None:
        return "None"
    if inspect.iscoroutine(reward):
        reward.close()
        return "a coroutine (the function must not be `async`)"
    if isinstance(reward, (str, bytes)):
        return f"the text {reward[:40]!r}"
    try:
        array = np.asarray(reward)
    except Exception:
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        return f"an object of type {type(reward).__name__}"
    if array.ndim:
        return f"{array.size} values in a {type(reward).__name__}"
    with np.errstate(over="ignore"):
        value = float(np.float32(array))
    return None if math.isfinite(value) else str(float(array))
