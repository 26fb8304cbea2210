"""Rewards of the finance recipe: is the number right, are the citations right, are they supported by the report.

Rules of one's own, as docs/rewards.md describes them: `reward: finance_rules:right_number`, with this folder on
PYTHONPATH. The record has `value`, the right number, word or `not stated`, and `sources`, the right citations.
"""

import re
from typing import Any

NOT_STATED = "not stated"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_CITATION = re.compile(r"\[([^\[\]]*)\]")


def right_number(
    prompt: Any, completions: list[str], record: dict[str, Any], *, percent_tolerance: float = 1.0
) -> list[float]:
    """1 if the last number of the answer, citations aside, is the record's `value`.

    Percentages may differ by `percent_tolerance` points, other numbers not at all. If the value is `not stated`, the
    answer must be that, and nothing else; of an item, the last word counts.
    """
    value = record["value"]
    return [float(_is_value(text, value, percent_tolerance)) for text in completions]


def right_citations(prompt: Any, completions: list[str], record: dict[str, Any]) -> list[float]:
    """1 if the answer cites exactly the record's `sources`, in any order, each as often as it likes."""
    wanted = set(record["sources"])
    return [float({citation.strip() for citation in _CITATION.findall(text)} == wanted) for text in completions]


def _is_value(text: str, value: str, percent_tolerance: float) -> bool:
    if value == NOT_STATED:
        return text.strip().rstrip(".") == NOT_STATED
    plain = _CITATION.sub("", text).strip()
    if value.isalpha():
        return plain.rstrip(".").rpartition(" ")[2] == value
    numbers = _NUMBER.findall(plain)
    if not numbers or plain.endswith("%") != value.endswith("%"):
        return False
    tolerance = percent_tolerance if value.endswith("%") else 0.0
    return abs(float(numbers[-1]) - float(value.rstrip("%"))) <= tolerance
