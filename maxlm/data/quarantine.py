"""Batches that a run skips after bad steps: `quarantine.jsonl` in its folder.

The batch of a step is a pure function of the step and this list, as the rows of a batch are one of the seed and the
batch.
"""

import os
from collections.abc import Sequence
from typing import Any

from maxlm.runtime.storage import storage_path
from maxlm.runtime.written import read_written_lines

FILE_NAME = "quarantine.jsonl"
# Steps whose update was skipped; isolated ones are not quarantined.
SKIPPED_FILE_NAME = "skipped.jsonl"


def batch_of_step(step: int, excluded: Sequence[int]) -> int:
    """The batch that a step reads: batches and steps are counted from 0, and batches in `excluded` are skipped."""
    for batch in sorted(set(excluded)):
        if batch <= step:
            step += 1
    return step


def read_quarantine(run_folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The quarantine records of a run: one per skipped batch."""
    return read_written_lines(storage_path(run_folder) / FILE_NAME)
