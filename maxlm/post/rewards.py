"""Rewards that a program can verify: (completion, record of the training file) -> number.

A configuration names one of `REWARDS`, or a function of its own as `package.module:function`.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from maxlm.errors import ConfigError

Reward = Callable[[str, dict[str, Any]], float]

_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def exact_match(completion: str, record: dict[str, Any]) -> float:
    """1 if the completion, without space around it, is the answer."""
    return float(completion.strip() == _answer(record))


def contains(completion: str, record: dict[str, Any]) -> float:
    """1 if the answer stands somewhere in the completion as whole words."""
    return float(re.search(rf"(?<!\w){re.escape(_answer(record))}(?!\w)", completion) is not None)


def last_number(completion: str, record: dict[str, Any]) -> float:
    """1 if the last number in the completion equals the answer as a number."""
    numbers, wanted = _NUMBER.findall(completion), _NUMBER.fullmatch(_answer(record))
    return float(bool(numbers) and wanted is not None and _value(numbers[-1]) == _value(wanted[0]))


def tagged_answer(completion: str, record: dict[str, Any]) -> float:
    """1 if the completion has one <answer>...</answer> with the answer in it; 0.1 if it has one with something else."""
    found = _TAGGED.findall(completion)
    if len(found) != 1:
        return 0.0
    return 1.0 if found[0].strip() == _answer(record) else 0.1


REWARDS: dict[str, Reward] = {
    function.__name__: function for function in (exact_match, contains, last_number, tagged_answer)
}


def find_reward(name: str) -> Reward:
    """The reward function of this name.

    Raises:
      ConfigError: there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if colon:
        # A script's own folder is on the path, and this one's is that of the command: the user's is the current one.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError([f"objective.reward: {name!r} cannot be imported: {error}"]) from None
        if not callable(function):
            raise ConfigError([f"objective.reward: {name!r} is no function but a {type(function).__name__}"])
        return function
    near = difflib.get_close_matches(name, REWARDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(REWARDS)}, or package.module:function"
    raise ConfigError([f"objective.reward: {name!r} is no reward function; {hint}"])


def _answer(record: dict[str, Any]) -> str:
    return str(record["answer"]).strip()


def _value(text: str) -> float:
    return float(text.replace(",", ""))
