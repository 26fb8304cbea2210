"""Processes that start fast: forked from a server with all modules loaded, as imports dominate short runs.

As a script: `forked.py MODULE...` loads these, reads lines of JSON, each a list of calls, makes each call in a separate
process, and answers with a list of exit codes. SIGINT and SIGTERM end it and these processes.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[1]
TIMEOUT = 400
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Call:
    """A call of a module's function in a separate process, which exits with its return value."""

    function: str
    arguments: list
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = str(ROOT)
    output: str = os.devnull
    errors: str = os.devnull


class Forked:
    """Starts processes. Use as a context manager.

    Args:
      modules: loaded once for all; scripts may be in `paths`.
      environment: variables of all processes that differ from this one's.
    """

    def __init__(self, modules: Sequence[str], *, paths: Sequence[Path], environment: dict[str, str] | None = None):
        path = os.pathsep.join(map(str, [ROOT, *paths]))
        self._start = functools.partial(
            subprocess.Popen,
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        )
        self._server = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def run(self, calls: Sequence[Call]) -> list[int]:
        """Run these calls concurrently; returns the exit codes, -N for a process killed by signal N."""
        if self._server.poll() is not None:
            self._server = self._start()
        answer = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._server.stdin.write(json.dumps([asdict(call) for call in calls]) + "\n")
                self._server.stdin.flush()
                answer = self._server.stdout.readline()
            assert answer, "the process that forks has ended; its standard error says why"
        except BaseException:
            # Its answer would be read as that of the next calls.
            self._stop()
            raise
        return json.loads(answer)

    def _stop(self) -> None:
        """Stop the server and its running processes."""
        self._server.terminate()
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.close()
        self._server.stdout.close()


def _fork(call: dict) -> int:
    """Fork a process that makes the call and exits normally; returns its id."""
    if process := os.fork():
        return process
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, call["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, call["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags), number)
    os.chdir(call["folder"])
    os.environ.update(call["environment"])
    module, _, name = call["function"].partition(":")
    sys.exit(getattr(importlib.import_module(module), name)(*call["arguments"]))


def _wait(processes: list[int]) -> list[int]:
    """Wait for processes and return how they ended; after the timeout or a signal, kill them and their children."""
    deadline, ended = time.monotonic() + TIMEOUT, {}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while len(ended) < len(processes):
            for process in processes:
                if process in ended:
                    continue
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    ended[process] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            # A process that was just forked has no group yet.
            with contextlib.suppress(ProcessLookupError):
                if process not in ended:
                    os.kill(process, signal.SIGKILL)
    return [ended[process] for process in processes]


def _end(number, frame) -> None:
    # A second signal would prevent it from killing all.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(1)


def main() -> None:
    for number in SIGNALS:
        signal.signal(number, _end)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    # Otherwise each process would garbage-collect all loaded objects at exit.
    gc.freeze()
    for line in sys.stdin:
        # Not before the processes to stop are known.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        print(json.dumps(_wait([_fork(call) for call in json.loads(line)])), flush=True)


if __name__ == "__main__":
    main()
