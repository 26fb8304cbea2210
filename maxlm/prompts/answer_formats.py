"""Where the answer stands in a text that reasons first."""

import re

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# How the references of GSM8K end (arXiv:2110.14168).
_FINAL_LINE = re.compile(r"(?:^|\n)####[ \t]*(\S.*)\s*$")


def tagged_answers(text: str) -> list[str]:
    """What stands in each <answer>...</answer>."""
    return _TAGGED.findall(text)


def final_line(text: str) -> str:
    """What a last line `#### 18` says; the whole text where it has none."""
    found = _FINAL_LINE.search(text)
    return found[1].strip() if found else text
