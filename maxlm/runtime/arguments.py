"""Shared command-line argument types. Imports nothing heavy: `maxlm --help` loads all commands."""

import argparse
import math
import re
import sys
from collections.abc import Callable

from maxlm.errors import RequestError


def add_config(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add `config`, a file of this kind, and `overrides`, for `load_config`."""
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file with kind: {kind}")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that override the file's"
    )


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,20}", text) and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{_short(text)} must be a whole number from {low} to {high}")

    return parse


# For `type=`, with the bounds of `Count`, `CountOrZero` and `Seed` in maxlm/config/base.py.
count = _whole(1, 2**31 - 1)
count_or_zero = _whole(0, 2**31 - 1)
seed = _whole(0, 2**32 - 1)
port = _whole(0, 65535)


def at_least_zero(text: str) -> float:
    """For `type=`: a finite non-negative number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{_short(text)} must be a number of at least 0")
    return value


def fraction(text: str) -> float:
    """For `type=`: a number from 0 to 1."""
    if (value := at_least_zero(text)) > 1:
        raise argparse.ArgumentTypeError(f"{_short(text)} must be a number from 0 to 1")
    return value


def text_or_stdin(text: str) -> str:
    """The text of an argument for which `-` reads standard input.

    Raises:
      RequestError: standard input is not text.
    """
    if text != "-":
        return text
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not {error.encoding.upper()} text; give it as UTF-8") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
