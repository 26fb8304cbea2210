"""Text normalization and document quality rules."""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from maxlm.config.data import CleanConfig

# Control characters except tab and newline; byte order marks inside of a text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufeff]")
_TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)
_MANY_NEWLINES = re.compile(r"\n{4,}")


def normalize(text: str, unicode_form: Literal["NFC", "NFKC", "none"]) -> str:
    """Normalize line ends and Unicode; remove control characters, trailing whitespace and runs of empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    text = _CONTROLS.sub("", text)
    if unicode_form != "none":
        text = unicodedata.normalize(unicode_form, text)
    text = _MANY_NEWLINES.sub("\n\n\n", _TRAILING_SPACE.sub("", text))
    return text.strip("\n").rstrip()


def find_abnormal(text: str, config: CleanConfig) -> tuple[str, str] | None:
    """The first quality rule that a text fails, as (reason, detail); None if it passes all."""
    for reason, rule in _RULES.items():
        if detail := rule(text, config):
            return reason, detail
    return None


def _empty(text: str, config: CleanConfig) -> str | None:
    return None if text.strip() else "nothing is left after normalization"


def _too_short(text: str, config: CleanConfig) -> str | None:
    if len(text) < config.min_characters:
        return f"{len(text)} characters, but clean.min_characters is {config.min_characters}"
    return None


def _too_long(text: str, config: CleanConfig) -> str | None:
    if len(text) > config.max_characters:
        return f"{len(text)} characters, but clean.max_characters is {config.max_characters}"
    return None


def _few_letters(text: str, config: CleanConfig) -> str | None:
    visible = "".join(text.split())
    fraction = sum(map(str.isalpha, visible)) / len(visible)
    if fraction < config.min_letter_fraction:
        return f"{fraction:.0%} letters, but clean.min_letter_fraction is {config.min_letter_fraction:.0%}"
    return None


def _repeated_lines(text: str, config: CleanConfig) -> str | None:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    fraction = 1 - len(set(lines)) / len(lines)
    if fraction > config.max_repeated_line_fraction:
        return (
            f"{fraction:.0%} of its lines repeat earlier ones,"
            f" but clean.max_repeated_line_fraction is {config.max_repeated_line_fraction:.0%}"
        )
    return None


_RULES: dict[str, Callable[[str, CleanConfig], str | None]] = {
    "empty": _empty,
    "too_short": _too_short,
    "too_long": _too_long,
    "few_letters": _few_letters,
    "repeated_lines": _repeated_lines,
}
