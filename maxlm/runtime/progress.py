"""Progress bars for long steps."""

import sys
from collections.abc import Iterable, Iterator, Sized
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

# Results go to standard output, progress and messages to standard error. Sentences are not wrapped: a path or a step
# that is broken over two lines cannot be copied or searched for.
console = Console(stderr=True, soft_wrap=True)


@contextmanager
def progress_bar(label: str, total: float | None) -> Iterator[tuple[Progress, TaskID]]:
    """A bar with count, elapsed and remaining time; one line at the end if standard error is not a terminal."""
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
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(label, total) as (progress, task):
        for item in items:
            yield item
            progress.advance(task)
