"""Numbers of policy optimization that follow from the rounds before: a Lagrange multiplier, a KL coefficient.

They are kept in the run folder, a line for each round, so that a resumed run continues with the same numbers.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Self

from etils import epath

from maxlm.errors import CheckpointError
from maxlm.runtime.agree import from_primary
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.storage import LineLog, read_lines

FILE_NAME = "controls.jsonl"


@dataclass(frozen=True)
class Controls:
    """What holds in one round of sampling.

    multiplier: of the cost of answers under a constraint. kl_beta: weight of the divergence within the reward.
    """

    multiplier: float = 0.0
    kl_beta: float = 0.0

    def after_costs(self, mean_cost: float, *, limit: float, rate: float, largest: float) -> Self:
        """The next round's, from the mean cost of the answers of this one (arXiv:2310.12773, appendix B.4).

        ln multiplier += rate * multiplier * (mean cost - limit)
        """
        log = math.log(self.multiplier) + rate * self.multiplier * (mean_cost - limit)
        return replace(self, multiplier=min(math.exp(min(log, 700.0)), largest))

    def after_divergence(self, kl: float, *, target: float, rate: float) -> Self:
        """The next round's, from the mean divergence of the answers of this one (arXiv:1909.08593, section 2.2).

        kl_beta *= 1 + rate * clip(kl / target - 1, -0.2, 0.2)
        """
        error = min(max(kl / target - 1, -0.2), 0.2)
        return replace(self, kl_beta=self.kl_beta * (1 + rate * error))


class ControlsLog:
    """The controls of each round, in the run folder if there is one.

    Args:
      start: of the first round.
    """

    def __init__(self, folder: epath.Path | None, start: Controls):
        self._file, self._start = None if folder is None else folder / FILE_NAME, start
        self._log: LineLog | None = None

    def open(self, number: int) -> Controls:
        """The controls of a round, from which training begins or goes on.

        Raises:
          CheckpointError: the run was there before, and its line is missing.
        """
        found = self._start
        if number and self._file is not None:
            found = from_primary(self._read(number) if is_primary() else None)
            if found is None:
                raise CheckpointError(
                    f"{self._file}: has no line for round {number}, so the run cannot go on exactly; put the file back,"
                    " or start a new run"
                )
            found = Controls(**found)
        if self._file is not None and is_primary():
            self._log = LineLog(self._file, keep=lambda line: json.loads(line)["round"] <= number)
        return found

    def write(self, number: int, controls: Controls) -> None:
        """Keep the controls of a round before anything is trained with them."""
        if self._log is not None:
            self._log.append(json.dumps({"round": number, **asdict(controls)}))

    def _read(self, number: int) -> dict[str, float] | None:
        for record in map(json.loads, read_lines(self._file)):
            if record.pop("round") == number:
                return record
        return None
