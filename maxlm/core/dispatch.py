"""Bounds on how far the host dispatches ahead of the devices."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax

# Enough that no device waits for the host. XLA's CPU runtime (jaxlib 0.10.2) admits 32 programs per device, not always
# in the order of their dispatch: if they have collectives, a later one that takes the place of an earlier one waits for
# it forever, and XLA ends the process.
PROGRAMS_IN_FLIGHT = 8


def fetched(outputs: Iterable[Any]) -> Iterator[Any]:
    """Copies in host memory of the outputs of programs, in order.

    Args:
      outputs: pytrees of arrays; taking the next one dispatches its program.
    """
    under_way: collections.deque[Any] = collections.deque()
    for output in outputs:
        under_way.append(output)
        if len(under_way) > PROGRAMS_IN_FLIGHT:
            yield jax.device_get(under_way.popleft())
    yield from map(jax.device_get, under_way)
