"""Batches that a run passes over, because its steps on them went wrong: `quarantine.jsonl` in its folder.

Which batch a step reads is a pure function of the step and of this list, as which rows a batch holds is one of the
seed and the batch.
"""

import os
from collections.abc import Sequence
from typing import Any

from maxlm.runtime.storage import storage_path
from maxlm.runtime.written import read_written_lines

FILE_NAME = "quarantine.jsonl"
# Steps whose update was left out; those that lie alone are in no quarantine.
SKIPPED_FILE_NAME = "skipped.jsonl"


def batch_of_step(step: int, passed_over: Sequence[int]) -> int:
    """The batch that a step reads: batches and steps are counted from 0, and those in `passed_over` are left out."""
    for batch in sorted(set(passed_over)):
        if batch <= step:
            step += 1
    return step


def read_quarantine(run_folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a run: one for each batch that it passes over."""
    return read_written_lines(storage_path(run_folder) / FILE_NAME)
