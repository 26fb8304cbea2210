"""Rewards of answers in LaTeX, compared as mathematics: equal text, equal value, or equal parts.

After normalization, an answer is a set, tuple, interval, union, matrix or single term. Terms are equal if their texts
are, or if they have the same value at several points for their variables (`latex_terms`): 1/2, 0.5 and \\frac12;
(x+1)^2 and x^2+2x+1. Not recognized: equality of equations and inequalities written differently, simplification that
needs a domain (|x| = x), sums, integrals, units in different systems. Those are compared as text.
"""

import re
from fractions import Fraction
from typing import Any

from maxlm.scoring.rules.answers import right_answer
from maxlm.scoring.rules.exact import Unreadable, Value
from maxlm.scoring.rules.latex_terms import evaluate

_POINTS = 3
_MAX_BOXES = 20
_RELATIVE = 1e-9

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_DROPPED = re.compile(
    r"(?<!\\)\\(?:left|right|[bB]ig+[lr]?|displaystyle|textstyle|limits|quad|qquad|,|;|:|!|\s)(?![A-Za-z])|\\?\$|~"
    r"|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_MATRIX = re.compile(r"^\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.DOTALL)
_NAMES = [
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "exp",
    "ln",
    "log",
    "sqrt",
    "frac",
    "pi",
    "arcsin",
    "arccos",
    "arctan",
]


def latex_answer(
    prompt: Any, completions: list[str], record: dict[str, Any], *, require_box: bool = False
) -> list[float]:
    """1 if the answer of the completion equals the record's as mathematics.

    It is what is in the last \\boxed{}; without one, unless `require_box`, in the last $...$, \\(...\\) or \\[...\\];
    without these, all of the completion.
    """
    wanted = right_answer(record)
    found = (find_answer(text, require_box=require_box) for text in completions)
    return [float(answer is not None and equal(answer, find_answer(wanted) or wanted)) for answer in found]


def find_answer(text: str, *, require_box: bool = False) -> str | None:
    """The final answer of a text; None if there is none."""
    for match in reversed([*_BOX.finditer(text)][-_MAX_BOXES:]):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) * (text[place - 1] != "\\")
            if depth == 0:
                return text[match.end() : place]
    if require_box:
        return None
    spans = [next(filter(None, match.groups())) for match in _MATH.finditer(text)]
    return spans[-1] if spans else text


def equal(left: str, right: str) -> bool:
    """Whether two answers are the same mathematics, as far as is recognized."""
    left, right = _normalized(left), _normalized(right)
    return bool(left) and _equal(left, right, 0)


def _equal(left: str, right: str, depth: int) -> bool:
    if _squeezed(left) == _squeezed(right):
        return True
    if depth > 5:
        return False
    kinds = [_parts(text) for text in (left, right)]
    if kinds[0] is not None or kinds[1] is not None:
        if kinds[0] is None or kinds[1] is None or kinds[0][0] != kinds[1][0]:
            return False
        (kind, mine), (_, other) = kinds
        if len(mine) != len(other):
            return False
        if kind != "unordered":
            return all(_equal(a, b, depth + 1) for a, b in zip(mine, other))
        rest = list(other)
        for part in mine:
            match = next((each for each in rest if _equal(part, each, depth + 1)), None)
            if match is None:
                return False
            rest.remove(match)
        return True
    return _equal_terms(left, right)


def _equal_terms(left: str, right: str) -> bool:
    if any(re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", text)) for text in (left, right)):
        return False  # words, whose letters are no variables
    try:
        for point in range(_POINTS):
            values = [evaluate(text, lambda name: _value(name, point)) for text in (left, right)]  # noqa: B023
            if not _close(*values):
                return False
    except Unreadable:
        return False
    return True


def _value(name: str, point: int) -> Fraction:
    """A value for a variable that no identity is likely to hold at by chance: above 1, so that roots are real."""
    code = sum(ord(character) * 31**index for index, character in enumerate(name))
    return 1 + Fraction((code * 7919 + point * 104729) % 99991, 33331)


def _close(left: Value, right: Value) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    try:
        a, b = complex(left), complex(right)
    except OverflowError:
        return False
    return abs(a - b) <= _RELATIVE * max(abs(a), abs(b))


def _normalized(text: str) -> str:
    """One spelling of each symbol, without what has no meaning: delimiters, spacing, degrees, units after a number."""
    text = text.strip().rstrip(".。").strip()
    if (match := _MATH.fullmatch(text)) is not None:
        text = next(filter(None, match.groups()))
    text = text.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ").replace("\\%", "%")
    text = _DROPPED.sub(" ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\{,\}", "", text)
    text = text.replace("\u2212", "-").replace("×", "\\times ").replace("∞", "\\infty ").replace("√", "\\sqrt ")
    # A unit after a number has no meaning; a text alone is the answer.
    text = re.sub(rf"(?<=[\d}}])\s*{_TEXT.pattern}(?:\s*\^\s*(?:\d|\{{\d\}}))?\s*$", "", text)
    text = _TEXT.sub(lambda match: match[1] if match[1].strip() not in ("and", "or") else ",", text)
    text = re.sub(r"(?<![\\A-Za-z])(" + "|".join(_NAMES) + r")(?![A-Za-z])", r"\\\1", text)
    if re.fullmatch(r"\s*-?\d{1,3}(?:,\d{3})+(?:\.\d+)?\s*", text):
        text = text.replace(",", "")
    text = re.sub(r"(?<![\d.}/])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\.?\d)", r"(\1+\2/\3)", text)
    text = re.sub(r"(?<![\d.}^_])(\d+)\s*\\frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))", _mixed, text)
    # x = 5, f(x) = 5: the name is not part of the answer.
    text = re.sub(r"^\s*[A-Za-z](?:_\w|_\{\w+\})?(?:\s*\([a-z]\))?\s*(?:=|\\in(?![A-Za-z]))(?!.*=)", "", text)
    return text.strip()


def _mixed(match: re.Match) -> str:
    return f"({match[1]}+{match[2] or match[4]}/{match[3] or match[5]})"


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The kind and the parts of an answer of several; None if it is one term."""
    text = text.strip()
    if (match := _MATRIX.match(text)) is not None:
        rows = [row.split("&") for row in re.split(r"\\\\", match[2].strip().removesuffix("\\\\"))]
        return f"matrix of {len(rows)} rows", [entry for row in rows for entry in row]
    for sign in ("\\cup", "\\pm"):
        pieces = re.split(rf"{re.escape(sign)}(?![A-Za-z])", text)
        if sign == "\\cup" and len(pieces) > 1:
            return "unordered", pieces
        if sign == "\\pm" and len(pieces) == 2:
            return "unordered", ["+".join(pieces), "-".join(pieces)]
    if text.startswith("\\lbrace") and text.endswith("\\rbrace"):
        return "unordered", _split(text.removeprefix("\\lbrace").removesuffix("\\rbrace"))
    pieces = _split(text)
    if len(pieces) > 1:
        return "unordered", pieces
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(inner := _split(text[1:-1])) > 1:
        return f"{text[0]}{text[-1]}", inner
    return None


def _split(text: str) -> list[str]:
    """The parts between commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
