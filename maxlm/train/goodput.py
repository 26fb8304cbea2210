"""Goodput: how a run spends its time, over all its attempts.

Exactly one part of the clock runs at any time, so the parts add up to the elapsed time. Intervals are
stored in `goodput.jsonl`, each with the steps that it covers; an interval that begins before the end of an earlier one
means that the steps between were lost: repeated after a restart, or rolled back.
"""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import jax
from etils import epath

from maxlm.runtime.distributed import is_primary
from maxlm.runtime.storage import LineLog, read_lines

FILE_NAME = "goodput.jsonl"
# The parts. Only `step` is productive. The last three are not measured by the clock:
# lost work, and the time between two attempts.
PARTS = (
    "step",
    "data_wait",
    "compile",
    "checkpoint",
    "validation",
    "start_up",
    "rolled_back",
    "redone_after_restart",
    "between_attempts",
)
_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Stopwatch:
    """Counts seconds by part. A context manager; it starts with `start_up`.

    The time that JAX traces and compiles, in this thread, always counts as `compile`.
    """

    def __enter__(self) -> Self:
        self._part, self._since = "start_up", time.perf_counter()
        self._seconds: Any = Counter()  # of floats, which its type does not know
        self._compiles: list[tuple[float, float]] = []
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *error) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    @contextlib.contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Count the time in this context as `part`, except in nested contexts."""
        outer = self._part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self._switch(self._part)
        taken, self._seconds = self._seconds, Counter()
        return dict(taken)

    def _switch(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now
        self._compiles.clear()

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event not in _COMPILE_EVENTS or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        begin = max(end - duration_secs, self._since)
        # Tracing a function traces those that it calls: their time is already counted.
        known = 0.0
        while self._compiles and self._compiles[-1][1] > begin:
            inner_begin, inner_end = self._compiles.pop()
            known += inner_end - max(inner_begin, begin)
            begin = min(begin, inner_begin)
        self._compiles.append((begin, end))
        self._seconds["compile"] += end - begin - known
        self._seconds[self._part] -= end - begin - known


class Goodput:
    """Seconds of a run by part, over all its attempts."""

    def __init__(self):
        self.seconds: Any = Counter()  # of floats, which its type does not know
        self.attempts = 0
        self._ended = 0.0
        # Intervals whose steps the run builds on: (step at the end, seconds by part).
        self._intervals: list[tuple[int, dict[str, float]]] = []

    @property
    def total(self) -> float:
        """Seconds of all attempts."""
        return sum(self.seconds.values()) - self.seconds["between_attempts"]

    @property
    def productive(self) -> float:
        """Fraction of the time, including that between attempts, spent on steps that the result builds on."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def add(self, interval: dict[str, Any]) -> None:
        """Count an interval: {attempt, start and step: its first and last step, time: when it ended, seconds}."""
        is_restart = interval["attempt"] > self.attempts
        if is_restart and self.attempts:
            began = interval["time"] - sum(interval["seconds"].values())
            self.seconds["between_attempts"] += max(0.0, began - self._ended)
        while self._intervals and self._intervals[-1][0] > interval["start"]:
            _, lost = self._intervals.pop()
            self.seconds.subtract(lost)
            self.seconds["redone_after_restart" if is_restart else "rolled_back"] += sum(lost.values())
        self._intervals.append((interval["step"], interval["seconds"]))
        self.seconds.update(interval["seconds"])
        self.attempts, self._ended = interval["attempt"], interval["time"]

    def summary(self) -> dict[str, Any]:
        """For a manifest: seconds by part, and the productive fraction."""
        parts = {part: round(self.seconds[part], 2) for part in PARTS if self.seconds[part] >= 0.005}
        return {"productive": round(self.productive, 4), "seconds": parts}


class GoodputLog:
    """Writes the intervals of a run to disk as they end. Only process 0 writes."""

    def __init__(self, folder: epath.Path, stopwatch: Stopwatch):
        self.goodput = read_goodput(folder)
        self._attempt = self.goodput.attempts + 1
        self._stopwatch = stopwatch
        self._lines = LineLog(folder / FILE_NAME)
        self._start = 0

    def begin(self, step: int) -> None:
        """Start an interval at `step`; steps recorded after it count as lost."""
        self._start = step
        self.close(step)

    def close(self, step: int) -> dict[str, float]:
        """End the interval at `step`, and return its seconds by part."""
        seconds = self._stopwatch.take()
        interval = {
            "attempt": self._attempt,
            "start": self._start,
            "step": step,
            "time": time.time(),
            "seconds": {part: round(value, 6) for part, value in seconds.items()},
        }
        self._start = step
        self.goodput.add(interval)
        if is_primary():
            self._lines.append(json.dumps(interval))
        return seconds


def read_goodput(folder: str | os.PathLike) -> Goodput:
    """The goodput of a run so far; empty for a run that has not started."""
    goodput = Goodput()
    for line in read_lines(epath.Path(folder) / FILE_NAME):
        goodput.add(json.loads(line))
    return goodput
