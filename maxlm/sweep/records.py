"""Results of the trials, one line each in `trials.jsonl`."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from maxlm.errors import DataError
from maxlm.sweep.space import Setting

Status = Literal["finished", "diverged", "failed"]


@dataclass(frozen=True)
class Record:
    """A trial that has ended: `finished`, `diverged` (no finite loss), or `failed` (an error).

    `steps`, `tokens`, `flops` are of the whole run, from its first step; `seconds` only of this command's
    part of it, start-up included; `valid` is its last validation, null for values that are not finite.
    """

    id: str
    scale: int
    setting: Setting
    seed: int
    steps: int
    parameters: int
    tokens: int
    flops: float
    status: Status
    valid: dict[str, float | None]
    since: int
    seconds: float
    error: str | None = None

    @property
    def new_flops(self) -> float:
        """FLOPs of the steps after `since`, where the previous round ended."""
        return self.flops * (self.steps - self.since) / self.steps

    def value(self, metric: str) -> float | None:
        """The metric of a finished trial, else None."""
        return self.valid.get(metric) if self.status == "finished" else None


class Records:
    """The records of the file: the newest for each run and number of steps."""

    def __init__(self, path: Path):
        self.path = path
        self._found: dict[tuple[str, int], Record] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        # The last line may be truncated if the command was killed.
        self._is_cut = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise DataError(
                    f"{path}, line {number}: is not a record of a trial; delete the line, and its trial runs again"
                ) from None
            self._found[record.id, record.steps] = record

    def __iter__(self) -> Iterator[Record]:
        return iter(self._found.values())

    def find(self, name: str, steps: int) -> Record | None:
        """The record of a trial that need not run again; a failed one is retried."""
        record = self._found.get((name, steps))
        return record if record is not None and record.status != "failed" else None

    def add(self, record: Record) -> None:
        self._found[record.id, record.steps] = record
        if self._is_cut:
            whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
            self.path.write_text(whole + "\n" if whole else "", encoding="utf-8")
            self._is_cut = False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def finite(values: dict[str, Any]) -> dict[str, float | None]:
    """Numbers as valid JSON: null for values that are not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
