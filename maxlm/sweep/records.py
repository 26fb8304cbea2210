"""What became of each trial, one line each in `trials.jsonl`."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from maxlm.errors import DataError
from maxlm.sweep.space import Setting


@dataclass(frozen=True)
class Record:
    """A trial that has ended: `finished`, `diverged` (it lost its way: no finite loss), or `failed` (it broke).

    `steps`, `tokens`, `flops` are those of the whole run, from its first step, and `seconds` those of this command's
    part of it, start-up included; `valid` holds its last validation, null for what is not finite.
    """

    id: str
    scale: int
    setting: Setting
    seed: int
    steps: int
    parameters: int
    tokens: int
    flops: float
    status: Literal["finished", "diverged", "failed"]
    valid: dict[str, float | None]
    since: int
    seconds: float
    error: str | None = None

    @property
    def new_flops(self) -> float:
        """Of the steps after `since`, where the round before had ended."""
        return self.flops * (self.steps - self.since) / self.steps

    def value(self, metric: str) -> float | None:
        """The metric, of a trial that has finished."""
        return self.valid.get(metric) if self.status == "finished" else None


class Records:
    """The lines of the file, the newest of each run and length."""

    def __init__(self, path: Path):
        self.path = path
        self._found: dict[tuple[str, int], Record] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        # The last line of a command that was killed may be cut off.
        self._is_cut = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise DataError(
                    f"{path}, line {number}: is no record of a trial; take the line out, and its trial runs again"
                ) from None
            self._found[record.id, record.steps] = record

    def __iter__(self) -> Iterator[Record]:
        return iter(self._found.values())

    def find(self, name: str, steps: int) -> Record | None:
        """The record of a trial that need not run again; one that failed may fare better the next time."""
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
    """Numbers as JSON knows them: null for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
