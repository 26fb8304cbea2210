"""Extract the final answer of a text that reasons first."""

import re

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# How the references of GSM8K end (arXiv:2110.14168).
_FINAL_LINE = re.compile(r"(?:^|\n)####[ \t]*(\S.*)\s*$")


def tagged_answers(text: str) -> list[str]:
    """The content of each <answer>...</answer>."""
    return _TAGGED.findall(text)


def final_line(text: str) -> str:
    """The answer in a last line such as `#### 18`; the whole text if there is none."""
    found = _FINAL_LINE.search(text)
    return found[1].strip() if found else text
