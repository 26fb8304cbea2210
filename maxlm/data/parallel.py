"""An ordered map over processes with a bounded number of pending items."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from maxlm.errors import DataError

In = TypeVar("In")
Out = TypeVar("Out")

# With fewer batches than this, starting processes takes longer than the work.
_BATCHES_WORTH_PROCESSES = 32
_PENDING_PER_WORKER = 4


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(make: Callable[[], Callable[[In], Out]], items: Iterable[In], *, workers: int) -> Iterator[Out]:
    """`make()(item)` for each item, in order.

    Args:
      make: picklable; called once per process, so that its resources are loaded once.
      items: read only slightly ahead of the consumed results.
      workers: number of processes. 0 uses one per core if there are many items, else none; 1 uses none.

    Raises:
      DataError: if a process dies, for example out of memory.
    """
    items = iter(items)
    if workers == 0:
        first = list(islice(items, _BATCHES_WORTH_PROCESSES))
        workers = 1 if len(first) < _BATCHES_WORTH_PROCESSES else num_cores()
        items = chain(first, items)
    if workers == 1:
        yield from map(make(), items)
        return
    pending: deque = deque()
    # "spawn", because forking a process with threads, which JAX starts, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_call, item))
                if len(pending) >= _PENDING_PER_WORKER * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} worker processes died, most likely out of memory; set workers lower"
            ) from None
        finally:
            for future in pending:
                future.cancel()


_function: Callable[[Any], Any]


def _start(make: Callable[[], Callable]) -> None:
    global _function
    _function = make()


def _call(item: Any) -> Any:
    return _function(item)
