"""What recipes share: a `maxlm` command, files of JSON lines, and a figure with its interval."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def maxlm(*arguments: str) -> str:
    """What a `maxlm` command printed on standard output; the command is shown on standard error."""
    command = [sys.executable, "-m", "maxlm.cli", *arguments]
    print("maxlm", *arguments, file=sys.stderr)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def once(result: Path, *arguments: str) -> None:
    """Run a `maxlm` command unless its result is there."""
    if not result.exists():
        maxlm(*arguments)


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    # Not splitlines: a text may have line separators of Unicode.
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def shown(accuracy: dict[str, float]) -> str:
    """A share with its 95 % interval, as `maxlm eval` gives it: {value, low, high}."""
    return f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]"


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    for row in (header, ("---",) * len(header), *rows):
        print(f"| {' | '.join(row)} |")
