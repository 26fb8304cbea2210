"""One progress bar for every long step."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

# Results go to standard output; what is for the eye alone goes to standard error. Sentences are not broken into lines:
# a path or a step that is cut in two cannot be copied or searched for.
console = Console(stderr=True, soft_wrap=True)


@contextmanager
def progress_bar(label: str, total: float | None) -> Iterator[tuple[Progress, TaskID]]:
    """A bar with count, elapsed and remaining time; where standard error is no terminal, one line at the end."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        task = progress.add_task(label, total=total, note="")
        yield progress, task


def track(items: Iterable[Item], label: str, total: float | None = None) -> Iterator[Item]:
    """Iterate with a progress bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with progress_bar(label, total) as (progress, task):
        for item in items:
            yield item
            progress.advance(task)
