"""Processes that are killed while they save a checkpoint."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from test_checkpoint import make_small_state
from toy_run import toy_run, weights

from maxlm.checkpoint.checkpointer import Checkpointer

# Audit events of file-system operations that change something, raised before the operation.
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Operations:
    """Calls `before(number, name, path)` before each operation that changes files, while active."""

    def __init__(self):
        self._before: Callable[[int, str, str], None] | None = None
        self._lock = threading.Lock()
        self._count = 0
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self, before: Callable[[int, str, str], None]) -> Iterator[None]:
        self._before, self._count = before, 0
        try:
            yield
        finally:
            self._before = None

    def _hook(self, event: str, arguments: tuple) -> None:
        if self._before is None:
            return
        writes = event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _CHANGES:
            with self._lock:
                self._count += 1
                number = self._count
            self._before(number, event, os.fsdecode(arguments[0]))


def kill_before(number: int) -> Callable[[int, str, str], None]:
    def before(n, name, path):
        if n == number:
            os.kill(os.getpid(), signal.SIGKILL)
            # Wait for the signal to arrive.
            time.sleep(60)

    return before


def save(folder: str, step: int, number: int, report: str) -> None:
    """Save a step on top of existing ones; be killed before an operation, or with 0 write their names to `report`."""
    state, names = make_small_state(step), []
    before = kill_before(number) if number else lambda n, name, path: names.append(f"{name} {path}")
    operations = Operations()
    with Checkpointer(folder, keep=1) as checkpointer, operations.watching(before):
        checkpointer.save(state, {"note": f"of step {step}"}, wait=True)
    if report:
        with open(report, "w") as file:
            json.dump(names, file)


def save_until_killed(folder: str, seconds: float) -> None:
    """Save consecutive steps of arrays that take a while to write, and be killed at some moment."""
    with Checkpointer(folder, keep=2) as checkpointer:
        first = max(checkpointer.steps(), default=0) + 1
        for step in range(first, first + 10_000):
            checkpointer.save(make_small_state(step, size=200_000), {"note": f"of step {step}"}, wait=step == first)
            if step == first:
                threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()


def train(folder: str, number: int, report: str) -> None:
    """Run the whole trainer, with its other files; killed before an operation."""
    names = []
    before = kill_before(number) if number else lambda n, name, path: names.append(f"{name} {path}")
    with Operations().watching(before):
        result = toy_run(folder, checkpoint={"every": 4, "keep": 1})
    if report:
        with open(report, "w") as file:
            json.dump({"names": names, "weights": weights(result).hex(), "start": result.start}, file)
