"""What the drivers of recipes share: a `maxlm` command, and a figure with its interval."""

import subprocess
import sys
from pathlib import Path


def maxlm(*arguments: str) -> str:
    """What a `maxlm` command printed on standard output; the command is shown on standard error."""
    command = [sys.executable, "-m", "maxlm.cli", *arguments]
    print("maxlm", *arguments, file=sys.stderr)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def once(result: Path, *arguments: str) -> None:
    """Run a `maxlm` command unless its result is there."""
    if not result.exists():
        maxlm(*arguments)


def shown(accuracy: dict[str, float]) -> str:
    """A share with its 95 % interval, as `maxlm eval` gives it: {value, low, high}."""
    return f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]"


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    for row in (header, ("---",) * len(header), *rows):
        print(f"| {' | '.join(row)} |")
