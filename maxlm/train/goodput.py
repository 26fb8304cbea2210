"""Where a run's time goes, over all its attempts.

At every moment exactly one part of the clock is counted, so the parts add up to the time that has passed. Intervals are
kept in `goodput.jsonl`, each with the steps that it covers; an interval that begins before the end of an earlier one
says that the steps between were lost: done again after a restart, or rolled back.
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
# What a second may have gone to. `step` alone is productive. The last three are not what the clock counts:
# work that was lost, and the time between two attempts.
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
    """Counts seconds by part. Use as a context manager; it begins with `start_up`.

    What JAX takes to trace and compile, in this thread, counts as `compile`, whatever it was for.
    """

    def __enter__(self) -> Self:
        self._part, self._since = "start_up", time.perf_counter()
        self._seconds: Counter[str] = Counter()
        self._compiles: list[tuple[float, float]] = []
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *error) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    @contextlib.contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Time in here counts as `part`, but for what is counted as another in turn."""
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

    def _on_event(self, event: str, duration: float, **_: Any) -> None:
        if event not in _COMPILE_EVENTS or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        begin = max(end - duration, self._since)
        # Tracing a function traces those that it calls: what they took is counted already.
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
        self.seconds: Counter[str] = Counter()
        self.attempts = 0
        self._ended = 0.0
        # Those whose steps the run stands on: (step at the end, seconds by part).
        self._intervals: list[tuple[int, dict[str, float]]] = []

    @property
    def total(self) -> float:
        """Seconds of all attempts."""
        return sum(self.seconds.values()) - self.seconds["between_attempts"]

    @property
    def productive(self) -> float:
        """Share of the time, that between attempts included, that went to steps which the result stands on."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def add(self, interval: dict[str, Any]) -> None:
        """Count an interval: {attempt, start, step: where it began and ended, time: when it ended, seconds}."""
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
        """For a manifest: seconds by part, and the productive share."""
        parts = {part: round(self.seconds[part], 2) for part in PARTS if self.seconds[part] >= 0.005}
        return {"productive": round(self.productive, 4), "seconds": parts}


class GoodputLog:
    """Keeps the intervals of a run on disk as they end. Of several processes the first alone writes."""

    def __init__(self, folder: epath.Path, stopwatch: Stopwatch):
        self.goodput = read_goodput(folder)
        self._attempt = self.goodput.attempts + 1
        self._stopwatch = stopwatch
        self._lines = LineLog(folder / FILE_NAME)
        self._start = 0

    def begin(self, step: int) -> None:
        """Training is about to go on from `step`; what was lost after it is counted as lost."""
        self._start = step
        self.close(step)

    def close(self, step: int) -> dict[str, float]:
        """End an interval at `step`; its seconds by part."""
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
    """What a run has taken so far; nothing at all for one that has not begun."""
    goodput = Goodput()
    for line in read_lines(epath.Path(folder) / FILE_NAME):
        goodput.add(json.loads(line))
    return goodput
