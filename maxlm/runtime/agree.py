"""Decisions that all processes must agree on."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All processes must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag, np.int32))))


def from_primary(value: Any) -> Any:
    """Broadcast the JSON-serializable value of process 0. All processes must call it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(text.size, np.int32)))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, text.size)] = text[:size]
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)).decode())
