"""Verifiable rewards: (completion, record of the training file) -> number.

A configuration names one of `REWARDS`, or a custom function as `package.module:function`. `right_answer` reads the
correct answer from the record and rejects one that no completion can match.
"""

import difflib
import importlib
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

from maxlm.errors import ConfigError, DataError
from maxlm.prompts.answer_formats import final_line, tagged_answers
from maxlm.scoring.numerals import Number, find_numbers

RewardFunction = Callable[[str, dict[str, Any]], float]

# Writing systems whose words are not separated by spaces, or take endings without one, by the prefix of their
# characters' Unicode names.
_UNSPACED = (
    "CJK ", "IDEOGRAPHIC ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "HANGUL", "YI ",
    "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "JAVANESE ", "BALINESE ", "TAI ", "NEW TAI ",
)  # fmt: skip


def exact_match(completion: str, record: dict[str, Any]) -> float:
    """1 if the completion, stripped of surrounding whitespace, is the answer."""
    return float(_composed(completion) == right_answer(record))


def contains(completion: str, record: dict[str, Any]) -> float:
    """1 if the completion contains the answer as whole words.

    In scripts without spaces between words (Chinese, Japanese, Thai, ...), or with endings joined to them (Korean), the
    answer may be anywhere.
    """
    text, answer = _composed(completion), right_answer(record)
    starts = (match.start() for match in re.finditer(f"(?={re.escape(answer)})", text))
    return float(any(_is_whole(text, start, start + len(answer)) for start in starts))


def last_number(completion: str, record: dict[str, Any]) -> float:
    """1 if the last number in the completion equals the answer's: 1,000 is 1000.0, and 50% is 0.5 or 50."""
    return _last_number(completion, right_number(record))


def last_number_zh(completion: str, record: dict[str, Any]) -> float:
    """`last_number` with Chinese numerals too, in the completion and in the answer: 十八, 两万, 四分之三."""
    return _last_number(completion, right_number(record, chinese=True), chinese=True)


def tagged_answer(completion: str, record: dict[str, Any]) -> float:
    """1 if the completion has one <answer>...</answer> with the answer in it; 0.1 if it has one with something else."""
    answer, found = right_answer(record), tagged_answers(completion)
    if len(found) != 1:
        return 0.0
    return 1.0 if _composed(found[0]) == answer else 0.1


REWARDS: dict[str, RewardFunction] = {
    function.__name__: function for function in (exact_match, contains, last_number, last_number_zh, tagged_answer)
}


def right_answer(record: dict[str, Any]) -> str:
    """The `answer` of a record as text: a text, or a number as JSON writes it (18.0 as 18).

    If the text ends with a line `#### 18`, the answer is what follows the marks.

    Raises:
      ValueError: it is neither, or empty, so that no completion could be correct.
    """
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"must be a text or a number, not {_shown(answer)}")
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise ValueError(f"is {answer}, which no completion can equal")
        answer = int(answer) if answer.is_integer() and abs(answer) < 2**53 else answer
    text = final_line(_composed(str(answer)))
    if not text:
        raise ValueError("is empty")
    return text


def right_number(record: dict[str, Any], *, chinese: bool = False) -> Number:
    """The only number in `right_answer`; a unit may accompany it.

    Raises:
      ValueError: there is not exactly one number, or `right_answer` rejects the record.
    """
    answer = right_answer(record)
    numbers = find_numbers(answer, chinese=chinese)
    if len(numbers) != 1:
        raise ValueError(f"must contain one number, and {_shown(answer)} contains {len(numbers) or 'none'}")
    if numbers[0].value is None:
        raise ValueError(f"{_shown(answer)} is too large, or divides by zero")
    return numbers[0]


# Rewards for which `check_answer` requires more than a non-empty answer.
_READERS = {"last_number": right_number, "last_number_zh": lambda record: right_number(record, chinese=True)}


def check_answer(reward: str, record: dict[str, Any], where: str) -> None:
    """Reject a record whose answer this reward could never match; a custom function accepts any record.

    Raises:
      DataError: its message begins with `where`, FILE:LINE.
    """
    if reward not in REWARDS:
        return
    try:
        _READERS.get(reward, right_answer)(record)
    except ValueError as error:
        raise DataError(
            f"{where}: for the reward {reward} answer {error}; fix or remove the line, or choose another reward"
        ) from None


def find_reward(name: str) -> RewardFunction:
    """The reward function of this name.

    Raises:
      ConfigError: there is no such function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if colon:
        # sys.path holds the folder of the maxlm command; user modules are in the current folder.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        # A user module may raise anything on import.
        except (Exception, SystemExit) as error:
            raise ConfigError([f"objective.reward: {name!r} cannot be imported: {_first_line(error)}"]) from error
        if not callable(function):
            raise ConfigError([f"objective.reward: {name!r} is not a function but a {type(function).__name__}"])
        return function
    near = difflib.get_close_matches(name, REWARDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(REWARDS)}, or package.module:function"
    raise ConfigError([f"objective.reward: {name!r} is not a reward function; {hint}"])


def _last_number(completion: str, wanted: Number, *, chinese: bool = False) -> float:
    numbers = find_numbers(completion, chinese=chinese)
    return float(bool(numbers) and numbers[-1].equals(wanted))


def _composed(text: str) -> str:
    """The text stripped, and in NFC: each accented letter is one character."""
    return unicodedata.normalize("NFC", text).strip()


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether neither end of text[start:end] is within a word or a number."""
    before, after = text[max(start - 2, 0) : start], text[end : end + 2]
    first, last = text[start], text[end - 1]
    if unicodedata.category(after[:1] or " ").startswith("M"):
        return False  # a vowel or an accent of the last letter
    if first.isdecimal() and re.search(r"\d[.,]$|(?:^|[^\w)])[-\u2212]$", before):
        return False  # 18 in 1,218 or in -18
    if last.isdecimal() and re.match(r"[.,]\d", after):
        return False  # 18 in 18.5
    return not (_joins(before[-1:], first) or _joins(after[:1], last))


def _joins(neighbor: str, edge: str) -> bool:
    """Whether a word continues from the edge of an answer to the neighboring character."""
    return _is_of_word(neighbor) and not (_is_unspaced(neighbor) or _is_unspaced(edge))


def _is_of_word(character: str) -> bool:
    return bool(character) and (character == "_" or unicodedata.category(character)[0] in "LMN")


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {text}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "…"
