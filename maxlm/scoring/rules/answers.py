"""Rewards of completions that must contain the `answer` of the record: as text, in tags, or as a number."""

import json
import math
import re
import unicodedata
from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field

from maxlm.prompts.answer_formats import final_line, tagged_answers
from maxlm.scoring.numerals import Number, find_numbers

Tolerance = Annotated[float, Field(ge=0)]

# Writing systems whose words are not separated by spaces, or take endings without one, by the prefix of their
# characters' Unicode names.
_UNSPACED = (
    "CJK ", "IDEOGRAPHIC ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "HANGUL", "YI ",
    "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "JAVANESE ", "BALINESE ", "TAI ", "NEW TAI ",
)  # fmt: skip


def exact_match(prompt: Any, completions: list[str], record: dict[str, Any]) -> list[float]:
    """1 if the completion, stripped of surrounding whitespace, is the answer."""
    answer = right_answer(record)
    return [float(_composed(text) == answer) for text in completions]


def contains(prompt: Any, completions: list[str], record: dict[str, Any]) -> list[float]:
    """1 if the completion contains the answer as whole words.

    In scripts without spaces between words (Chinese, Japanese, Thai, ...), or with endings joined to them (Korean), the
    answer may be anywhere.
    """
    answer = right_answer(record)

    def found(text: str) -> bool:
        starts = (match.start() for match in re.finditer(f"(?={re.escape(answer)})", text))
        return any(_is_whole(text, start, start + len(answer)) for start in starts)

    return [float(found(_composed(text))) for text in completions]


def last_number(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    absolute_tolerance: Tolerance = 0.0,
    relative_tolerance: Tolerance = 0.0,
) -> list[float]:
    """1 if the last number in the completion equals the answer's: 1,000 is 1000.0, and 50% is 0.5 or 50.

    Or if it differs from the answer a by at most max(absolute_tolerance, relative_tolerance * |a|).
    """
    wanted, tolerances = right_number(record), (absolute_tolerance, relative_tolerance)
    return [_last_number(text, wanted, tolerances) for text in completions]


def last_number_zh(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    absolute_tolerance: Tolerance = 0.0,
    relative_tolerance: Tolerance = 0.0,
) -> list[float]:
    """`last_number` with Chinese numerals too, in the completion and in the answer: 十八, 两万, 四分之三."""
    wanted, tolerances = right_number(record, chinese=True), (absolute_tolerance, relative_tolerance)
    return [_last_number(text, wanted, tolerances, chinese=True) for text in completions]


def tagged_answer(prompt: Any, completions: list[str], record: dict[str, Any]) -> list[float]:
    """1 if the completion has one <answer>...</answer> with the answer in it; 0.1 if it has one with something else."""
    answer = right_answer(record)

    def reward(found: list[str]) -> float:
        if len(found) != 1:
            return 0.0
        return 1.0 if _composed(found[0]) == answer else 0.1

    return [reward(tagged_answers(text)) for text in completions]


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


def _last_number(completion: str, wanted: Number, tolerances: tuple[float, float], *, chinese: bool = False) -> float:
    numbers = find_numbers(completion, chinese=chinese)
    absolute, relative = (Fraction(tolerance) for tolerance in tolerances)
    return float(bool(numbers) and numbers[-1].equals(wanted, absolute=absolute, relative=relative))


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


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "…"
