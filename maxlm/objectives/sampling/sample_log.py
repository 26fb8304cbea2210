"""`samples.jsonl` of a run folder: some of the answers that were sampled during training, with their rewards."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from maxlm.runtime.distributed import is_primary
from maxlm.runtime.storage import LineLog
from maxlm.train.objective import RunContext

# Answers of a round that are written.
LOGGED_ANSWERS = 4


class SampleLog:
    """Writes the samples of as many rounds as there are records of metrics; only the first process writes.

    Args:
      start_step: samples of later steps are removed, since these are repeated.
    """

    def __init__(self, context: RunContext, start_step: int):
        self._every = context.config.log_every
        self._multiple = context.config.objective.resume_multiple
        self._log = None
        if context.folder is not None and is_primary():
            path = context.folder / "samples.jsonl"
            self._log = LineLog(path, keep=lambda line: json.loads(line)["step"] < start_step)

    def is_due(self, step: int) -> bool:
        """Whether the round that begins at this step is written."""
        return self._log is not None and -step % self._every < self._multiple

    def write(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append samples of a round that is due."""
        assert self._log is not None
        for sample in samples:
            self._log.append(json.dumps(sample, ensure_ascii=False))
