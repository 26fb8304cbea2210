"""Calls reward functions, which may be user code, and validates the rewards that they return."""

import copy
import inspect
import itertools
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError
from maxlm.runtime.time_limit import TimeLimitExceeded, within
from maxlm.scoring.rewards import Reward

_WANTED = "a reward function returns one finite number per completion for (prompt, completions, record)"


@dataclass(frozen=True)
class Rewards:
    """The weighted sum of the rewards of completions, and what is reported: float32 [completions].

    parts: each part of the sum without its weight, and, as PART_NAME, further numbers that its function reports.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]

    def taken(self, indices: np.ndarray) -> Self:
        """Those of these completions, in this order."""
        return type(self)(self.total[indices], {name: part[indices] for name, part in self.parts.items()})

    def joined(self, other: Self) -> Self:
        """Those of both, one after the other."""
        parts = {name: np.concatenate([part, other.parts[name]]) for name, part in self.parts.items()}
        return type(self)(np.concatenate([self.total, other.total]), parts)


class CheckedReward:
    """Rewards of completions, each a finite number.

    Args:
      rewards: the parts of the sum.
      time_limit: seconds for the completions of one prompt, each part on its own.
    """

    def __init__(self, rewards: Sequence[Reward], *, time_limit: float):
        self._rewards, self._time_limit = rewards, time_limit
        self._names: dict[str, Any] = {}  # what each part has reported

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], num_tokens: Sequence[int] | np.ndarray
    ) -> Rewards:
        """The rewards of each completion, with its prompt. Consecutive completions of one prompt are one call.

        Raises:
          ConfigError: a function raised, took too long, or returned something else.
        """
        values: dict[str, list[float]] = {}
        indices = range(len(prompts))
        for _, group in itertools.groupby(indices, key=lambda index: id(prompts[index])):
            members = list(group)
            texts, counts = [completions[index] for index in members], [int(num_tokens[index]) for index in members]
            for reward in self._rewards:
                for name, numbers in self._call(reward, prompts[members[0]], texts, counts).items():
                    values.setdefault(name, []).extend(numbers)
        arrays = {name: np.array(numbers, np.float64) for name, numbers in values.items()}
        total = sum((reward.weight * arrays[reward.name] for reward in self._rewards), np.zeros(len(prompts)))
        return Rewards(total.astype(np.float32), {name: array.astype(np.float32) for name, array in arrays.items()})

    def try_out(self, prompts: Sequence[Prompt]) -> None:
        """Call the functions for the first and last prompt, with the correct answer and with an empty completion.

        Raises:
          ConfigError: as above.
        """
        for prompt in {id(prompt): prompt for prompt in (prompts[0], prompts[-1])}.values():
            self([prompt, prompt], [str(prompt.record.get("answer", "")), ""], [1, 1])

    def _call(
        self, reward: Reward, prompt: Prompt, completions: list[str], num_tokens: list[int]
    ) -> dict[str, list[float]]:
        """The rewards of completions, by the name of the part, and what else its function reports."""
        # Copies, so that a function that modifies its arguments does not affect later calls.
        text, record = copy.deepcopy((prompt.text, prompt.record))

        def call() -> dict[str, list[Any]]:
            metrics: dict[str, Any] = {}
            values = {reward.name: _listed(reward(text, list(completions), record, num_tokens, metrics), completions)}
            return values | {f"{reward.name}_{name}": _listed(each, completions) for name, each in metrics.items()}

        try:
            returned = within(self._time_limit, call)
        except TimeLimitExceeded:
            raise self._error(
                reward,
                prompt,
                f"has not returned after {self._time_limit:g} seconds for {len(completions)} completions; make it"
                " faster, end its own waits, or raise objective.reward_time_limit",
            ) from None
        except _Returned as error:
            raise self._error(reward, prompt, f"returned {error}; {_WANTED}; fix it") from None
        except ConfigError:
            raise
        # User code may raise anything, or call `exit`.
        except (Exception, SystemExit) as error:
            message = " ".join(str(error).split())[:200]
            problem = f"raised {type(error).__name__}: {message}{_line_of(reward, error)}"
            raise self._error(reward, prompt, f"{problem}; {_WANTED}; fix it") from error
        if self._names.setdefault(reward.name, returned.keys()) != returned.keys():
            raise self._error(reward, prompt, "reports other metrics than before; it must report the same in each call")
        for values in returned.values():
            for completion, value in zip(completions, values):
                if (problem := _problem_with(value)) is not None:
                    shown = completion if len(completion) <= 60 else completion[:60] + "…"
                    raise self._error(
                        reward, prompt, f"returned {problem} for the completion {shown!r}; {_WANTED}; fix it"
                    )
        return {name: [float(value) for value in values] for name, values in returned.items()}

    @staticmethod
    def _error(reward: Reward, prompt: Prompt, problem: str) -> ConfigError:
        where = f" for {prompt.place}" if prompt.place else ""
        return ConfigError([f"objective.reward: {reward.source}{where} {problem}"])


class _Returned(Exception):  # noqa: N818 - never leaves this module
    """A return value that is not a list of as many values as there are completions; its message describes it."""


def _listed(returned: Any, completions: Sequence[str]) -> list[Any]:
    """The values for each completion, whose iteration may also run user code."""
    if returned is None:
        raise _Returned("None")
    if inspect.iscoroutine(returned):
        returned.close()
        raise _Returned("a coroutine (the function must not be `async`)")
    if isinstance(returned, (str, bytes)):
        raise _Returned(f"the text {returned[:40]!r}")
    if isinstance(returned, dict) or not hasattr(returned, "__iter__"):
        raise _Returned(f"one {type(returned).__name__} instead of a list")
    if getattr(returned, "ndim", 1) == 0:
        raise _Returned("one number instead of a list")
    # One value more than wanted: a generator may be endless.
    values = list(itertools.islice(returned, len(completions) + 1))
    if len(values) != len(completions):
        count = f"{len(values)}" if len(values) < len(completions) else f"more than {len(completions)}"
        raise _Returned(f"{count} {'value' if count == '1' else 'values'} for {len(completions)} completions")
    return values


def _line_of(reward: Reward, error: BaseException) -> str:
    """The line of the function's own file that raised the error, or called what raised it."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(reward.function))
    except TypeError:
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}:{lines[-1]})" if lines else ""


def _problem_with(reward: Any) -> str | None:
    """Describe a value that is not a finite number; None if it is one."""
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
