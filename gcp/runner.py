"""Run one command: show what it prints, keep what a caller or an error message needs."""

import shutil
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from maxlm.errors import RequestError


@dataclass(frozen=True)
class Result:
    """How a command ended; `stdout` is empty where it was shown instead of captured."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def last_error_line(self) -> str:
        """The last line of standard error that says something."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.returncode}, and no message"


class Runner(Protocol):
    """Whatever runs a command line; tests put a recorder here."""

    def __call__(self, argv: list[str], *, capture: bool) -> Result: ...


def run_command(argv: list[str], *, capture: bool) -> Result:
    """Run a command to its end.

    Args:
      argv: the program and its arguments; no shell reads them.
      capture: keep standard output and show nothing; otherwise both streams are shown as they come.

    Raises:
      RequestError: the program is not installed.
    """
    if shutil.which(argv[0]) is None:
        where = "; install it from https://cloud.google.com/sdk/docs/install" if argv[0] == "gcloud" else ""
        raise RequestError(f"{argv[0]} is not installed or not on PATH{where}")
    if capture:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        return Result(done.returncode, done.stdout, done.stderr)
    last_lines = deque(maxlen=50)
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stderr:
            sys.stderr.write(line)
            last_lines.append(line)
    return Result(process.returncode, "", "".join(last_lines))
