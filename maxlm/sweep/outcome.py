"""Outcomes of settings: the mean over seeds, and their ranking."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from maxlm.sweep.records import Record
from maxlm.sweep.space import Setting


@dataclass(frozen=True)
class Outcome:
    """A setting at one size, trained for a given number of steps with each seed."""

    scale: int
    setting: Setting
    records: tuple[Record, ...]
    values: tuple[float, ...]

    @property
    def value(self) -> float | None:
        """The mean over seeds; None if any of them has not finished, as leaving it out would bias the mean."""
        whole = len(self.values) == len(self.records)
        return sum(self.values) / len(self.values) if whole and self.values else None

    @property
    def steps(self) -> int:
        return self.records[0].steps


def outcome_of(records: Sequence[Record], metric: str) -> Outcome:
    """The outcome of one setting's trials."""
    values = [value for record in records if (value := record.value(metric)) is not None]
    return Outcome(records[0].scale, records[0].setting, tuple(records), tuple(values))


def ranked(outcomes: Sequence[Outcome], goal: Literal["minimize", "maximize"]) -> list[Outcome]:
    """The outcomes with a value, best first; ties in trial order."""
    sign = 1 if goal == "minimize" else -1
    return sorted((o for o in outcomes if o.value is not None), key=lambda o: sign * o.value)
