"""Several processes that train as one: start-up, and stopping together."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax

from maxlm.errors import ConfigError

# Each setting, as our own variable and as JAX's.
_COORDINATOR = ("MAXLM_COORDINATOR", "JAX_COORDINATOR_ADDRESS")
_NUM_PROCESSES = ("MAXLM_NUM_PROCESSES", "JAX_NUM_PROCESSES")
_PROCESS_ID = ("MAXLM_PROCESS_ID", "JAX_PROCESS_ID")


def initialize_distributed() -> None:
    """Join the other processes of this run, when the environment says that there are others; else do nothing.

    On a Cloud TPU slice JAX finds the others by itself: where MAXLM_DISTRIBUTED is `auto`, which `maxlm submit` sets,
    or TPU_WORKER_HOSTNAMES names several. Elsewhere JAX_COORDINATOR_ADDRESS (host:port
    of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, or the same with MAXLM_COORDINATOR, MAXLM_NUM_PROCESSES
    and MAXLM_PROCESS_ID. Must be called before JAX looks at its devices.

    Raises:
      ConfigError: some of these variables are missing or are not numbers.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = _first_of(_COORDINATOR)
    if coordinator is not None:
        num_processes, process_id = _number(_NUM_PROCESSES), _number(_PROCESS_ID)
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                [f"{_PROCESS_ID[1]}: {process_id} is not among {num_processes} processes, counted from 0"]
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif os.environ.get("MAXLM_DISTRIBUTED") == "auto" or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def is_primary() -> bool:
    """Whether this process writes what is written once: logs, configuration, manifest."""
    return jax.process_index() == 0


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step: whether SIGTERM (or, once, Ctrl-C) has come, to this or any other process.

    With several processes it must be called at every step by all of them, and all stop at the same step.
    """
    if jax.process_count() > 1:
        # JAX listens for SIGTERM itself, tells the other processes, and agrees with them on the step.
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        reached = []

        def agreed(step: int) -> bool:
            if not reached and reached_preemption_sync_point(step):
                reached.append(step)
            return bool(reached)

        yield agreed
        return

    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_of(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _number(names: tuple[str, ...]) -> int:
    text = _first_of(names)
    if text is None or not text.isdigit():
        raise ConfigError([f"{names[1]}: {text!r} must be a number, because a coordinator is named in the environment"])
    return int(text)
