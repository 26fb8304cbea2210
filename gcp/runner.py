"""Run one command: show its output, and keep what the caller or an error message needs."""

import itertools
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from maxlm.errors import RequestError

# The details of an API error start with one of these.
_DETAILS = ("- '@type'", '- "@type"', "'@type'", "details:")


@dataclass(frozen=True)
class Result:
    """Result of a command; `stdout` is empty if it was shown instead of captured."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error_message(self) -> str:
        """The error on one line: gcloud's whole message without its details, else the last line of stderr.

        gcloud's message starts with ERROR:, may span several lines, and may end with details in YAML.
        """
        lines = [line.strip() for line in self.stderr.splitlines()]
        starts = [index for index, line in enumerate(lines) if line.startswith("ERROR:")]
        if not any(lines):
            return f"exit code {self.returncode}, no message"
        if not starts:
            return next(line for line in reversed(lines) if line)
        message = list(itertools.takewhile(lambda line: not line.startswith(_DETAILS), lines[starts[-1] :]))
        if "exited with return code" in message[0]:
            # For ssh and scp gcloud knows only the exit code: the reason is in the output before.
            message += next(([f"({line})"] for line in reversed(lines[: starts[-1]]) if line), [])
        return " ".join(line for line in message if line)


class Runner(Protocol):
    """Runs a command line; tests substitute a recorder."""

    def __call__(self, argv: list[str], *, capture: bool) -> Result: ...


def run_command(argv: list[str], *, capture: bool) -> Result:
    """Run a command to completion.

    Args:
      argv: the program and its arguments; no shell reads them.
      capture: keep standard output and show nothing; otherwise both streams are shown as they arrive.

    Raises:
      RequestError: the program is not installed.
    """
    if shutil.which(argv[0]) is None:
        where = "; install it from https://cloud.google.com/sdk/docs/install" if argv[0] == "gcloud" else ""
        raise RequestError(f"{argv[0]} is not installed or not on PATH{where}")
    if capture:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        return Result(done.returncode, done.stdout, done.stderr)
    last_lines: deque[str] = deque(maxlen=50)
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stderr:
            sys.stderr.write(line)
            last_lines.append(line)
    return Result(process.returncode, "", "".join(last_lines))
