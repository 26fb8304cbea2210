"""Counters, gauges and histograms in the Prometheus text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from typing import Any

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A monotonic counter for each set of labels."""

    def __init__(self, name: str, description: str):
        self.name, self.description = name, description
        self._values: dict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1, **labels: str) -> None:
        self._values[tuple(sorted(labels.items()))] += amount

    def lines(self) -> list[str]:
        values = self._values or {(): 0.0}
        return [*_header(self, "counter"), *(_line(self.name, labels, value) for labels, value in values.items())]


class Gauge:
    """A number that is read on each scrape."""

    def __init__(self, name: str, description: str, read: Callable[[], float]):
        self.name, self.description, self._read = name, description, read

    def lines(self) -> list[str]:
        return [*_header(self, "gauge"), _line(self.name, (), self._read())]


class Histogram:
    """Counts of observations at or below each bound."""

    def __init__(self, name: str, description: str, bounds: tuple[float, ...]):
        self.name, self.description, self._bounds = name, description, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> list[str]:
        lines, total = _header(self, "histogram"), 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts):
            total += count
            lines.append(_line(f"{self.name}_bucket", (("le", bound),), total))
        return [*lines, _line(f"{self.name}_sum", (), self._sum), _line(f"{self.name}_count", (), total)]


class ServerMetrics:
    """All metrics of `/metrics`. Updated only from the event loop."""

    def __init__(self, *, slots: Callable[[], float], active: Callable[[], float], waiting: Callable[[], float]):
        self.requests = Counter("maxlm_http_requests_total", "HTTP requests answered, by path and status.")
        self.finished = Counter("maxlm_generations_total", "Generations ended, by reason.")
        self.prompt_tokens = Counter("maxlm_prompt_tokens_total", "Prompt tokens processed.")
        self.generated_tokens = Counter("maxlm_generated_tokens_total", "Tokens sampled.")
        self.first_token = Histogram(
            "maxlm_time_to_first_token_seconds",
            "From submission to the first token, queueing included.",
            (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )
        self.token_interval = Histogram(
            "maxlm_time_per_output_token_seconds",
            "Mean time between the tokens of a generation, after the first.",
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
        )
        self.duration = Histogram(
            "maxlm_generation_seconds",
            "From submission to the last token.",
            (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
        )
        self._all: list[Any] = [
            self.requests,
            self.finished,
            self.prompt_tokens,
            self.generated_tokens,
            self.first_token,
            self.token_interval,
            self.duration,
            Gauge("maxlm_slots", "Generations that can run concurrently.", slots),
            Gauge("maxlm_slots_active", "Generations running.", active),
            Gauge("maxlm_queue_length", "Generations waiting for a slot.", waiting),
        ]

    def render(self) -> str:
        return "\n".join(line for metric in self._all for line in metric.lines()) + "\n"


def _header(metric, kind: str) -> list[str]:
    return [f"# HELP {metric.name} {metric.description}", f"# TYPE {metric.name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
