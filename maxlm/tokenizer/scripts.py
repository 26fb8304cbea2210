"""Which characters belong to a script, by their names in the Unicode character database."""

import functools
import re
import unicodedata
from collections.abc import Iterable

from maxlm.errors import TokenizerError

# All scripts are in the first four planes of Unicode.
_CODES = range(0x40000)
# Names of characters begin with that of their script, but for these.
_NAMES = {
    "Han": ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC ITERATION", "IDEOGRAPHIC NUMBER")
}
# Chinese, Japanese and Korean share their punctuation: CJK symbols, and the wide forms of ASCII punctuation.
_EAST_ASIAN = ("Han", "Hiragana", "Katakana", "Hangul", "Bopomofo")
_EAST_ASIAN_PUNCTUATION = (
    *(range(0x3001, 0x3004), range(0x3008, 0x3012), range(0x3014, 0x3020), range(0xFF01, 0xFF10)),
    *(range(0xFF1A, 0xFF21), range(0xFF3B, 0xFF41), range(0xFF5B, 0xFF66)),
)


@functools.cache
def runs_of(*scripts: str) -> re.Pattern[str]:
    """A pattern of runs of characters of these scripts, with the space before them.

    Args:
      scripts: names such as Han, Cyrillic or Arabic. Their punctuation counts as theirs. None at all: all letters, with
        their marks, and all punctuation and symbols but those of ASCII.

    Raises:
      TokenizerError: Unicode has no such script.
    """
    members: set[int] = set()
    for script in map(_title, scripts):
        found = {*_named(_NAMES.get(script, (f"{script.upper()} ",)))}
        if not found:
            raise TokenizerError(
                f"--script {script}: Unicode has no such script; examples are Han, Hangul and Cyrillic"
            )
        members |= found
    if {*_EAST_ASIAN} & {*map(_title, scripts)}:
        members.update(*_EAST_ASIAN_PUNCTUATION)
    return re.compile(f" ?[{_ranges(members if scripts else _letters_and_symbols())}]+")


def _title(script: str) -> str:
    return script.replace("_", " ").capitalize()


def _named(beginnings: tuple[str, ...]) -> Iterable[int]:
    return (code for code in _CODES if unicodedata.name(chr(code), "").startswith(beginnings))


def _letters_and_symbols() -> Iterable[int]:
    for code in _CODES:
        kind = unicodedata.category(chr(code))[0]
        if kind in "LM" or (kind in "PS" and code >= 0x80):
            yield code


def _ranges(codes: Iterable[int]) -> str:
    """The inside of a character class."""
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
