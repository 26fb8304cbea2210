"""Multi-process training: start-up, and stopping together."""

import atexit
import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

# The only private JAX API in use: cluster detection on TPU slices, GKE, SLURM and Open MPI has no public API, and JAX
# keeps it up to date. tests/runtime/test_distributed.py fails when it changes.
from jax._src.clusters import ClusterEnv

from maxlm.config.processes import ProcessesConfig
from maxlm.errors import ConfigError
from maxlm.runtime.peers import Peers, connect_all
from maxlm.runtime.progress import console

# Environment variables of each setting: our own, JAX's, and those of the launchers that count processes.
_COORDINATOR = ("MAXLM_COORDINATOR", "JAX_COORDINATOR_ADDRESS")
_NUM_PROCESSES = ("MAXLM_NUM_PROCESSES", "JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
_PROCESS_ID = ("MAXLM_PROCESS_ID", "JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")

# How much longer JAX's own heartbeat timeout is than ours, which gives better messages.
_JAX_EXTRA_SECONDS = 60


@dataclass(frozen=True)
class Cluster:
    """A multi-process run: the address of process 0 (host:port), the number of processes, and this process's id.

    local_devices: the devices of the machine that belong to this process; None is all.
    """

    address: str
    num_processes: int
    process: int
    local_devices: list[int] | None = None


_peers: Peers | None = None


def initialize_distributed(settings: ProcessesConfig = ProcessesConfig()) -> Peers | None:  # noqa: B008 - immutable
    """Connect to the other processes of this run, if the environment names any; else do nothing.

    Must be called before JAX initializes its devices.

    Returns:
      The connection to the other processes; None if there are none.

    Raises:
      ConfigError: the environment is incomplete, or the processes are numbered wrongly.
      FaultError: not all of them connected within `settings.start_timeout_seconds`.
    """
    global _peers
    if _peers is not None or (cluster := find_cluster(settings.start_timeout_seconds)) is None:
        return _peers
    _peers = connect_all(
        cluster.address,
        process=cluster.process,
        count=cluster.num_processes,
        timeout=settings.start_timeout_seconds,
        heartbeat_seconds=settings.heartbeat_seconds,
    )
    slower = int(settings.heartbeat_seconds) + _JAX_EXTRA_SECONDS
    jax.distributed.initialize(
        cluster.address,
        cluster.num_processes,
        cluster.process,
        cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=slower,
        heartbeat_timeout_seconds=slower,
        shutdown_timeout_seconds=slower,
    )
    # Registered after JAX's own handler, so that it runs before that one waits for the others.
    atexit.register(_peers.leave)
    if cluster.process:
        # Only process 0 prints progress; errors are still printed.
        console.quiet = True
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    return _peers


def find_cluster(timeout: float) -> Cluster | None:
    """The multi-process run that the environment describes; None if it describes none, or a single process.

    JAX_COORDINATOR_ADDRESS is the host:port of process 0; JAX_NUM_PROCESSES and JAX_PROCESS_ID give the rest (also
    as MAXLM_COORDINATOR, MAXLM_NUM_PROCESSES and MAXLM_PROCESS_ID). If it is not set, JAX detects them from Cloud TPU,
    GKE, SLURM and Open MPI. MAXLM_DISTRIBUTED=auto, which `maxlm submit` sets, forces this detection;
    JAX_NUM_PROCESSES=1 makes a process run alone under any launcher.

    Raises:
      ConfigError: some of these variables are missing or are not numbers.
    """
    address = _first_of(_COORDINATOR)
    if _first_of(_NUM_PROCESSES[:2]) == "1":
        return None
    if address is not None:
        if not address.rpartition(":")[2].isdigit():
            raise ConfigError([f"{_COORDINATOR[1]}: {address!r} must be host:port, such as 10.0.0.2:8476"])
        cluster = Cluster(address, _number(_NUM_PROCESSES), _number(_PROCESS_ID))
    elif (launcher := _launcher()) is not None:
        cluster = _detect_with_jax(launcher, timeout)
    else:
        return None
    if not 0 <= cluster.process < cluster.num_processes:
        count = cluster.num_processes
        raise ConfigError([f"{_PROCESS_ID[1]}: {cluster.process} is not among {count} processes, counted from 0"])
    return cluster if cluster.num_processes > 1 else None


def _launcher() -> str | None:
    """The launcher that started several processes here, detected by the variables that it sets.

    Raises:
      ConfigError: its variables do not say how to find the other processes.
    """
    variables = os.environ
    if variables.get("MAXLM_DISTRIBUTED") == "auto":
        return "MAXLM_DISTRIBUTED=auto"
    if variables.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "Cloud TPU with several slices"
    workers = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES")
    if workers:
        return "Cloud TPU" if "," in workers else None
    by_hand = "or set JAX_COORDINATOR_ADDRESS to the host:port of process 0"
    if variables.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        if "OMPI_MCA_orte_hnp_uri" not in variables:
            raise ConfigError([f"Open MPI 5 does not give the address of process 0: use version 4, {by_hand}"])
        return "Open MPI"
    if variables.get("SLURM_NTASKS", "1") != "1":
        if "SLURM_STEP_NODELIST" not in variables:
            tasks = variables["SLURM_NTASKS"]
            raise ConfigError(
                [
                    f"SLURM_NTASKS: this job has {tasks} tasks, but this process was not started as one of them; start"
                    " it with `srun maxlm train ...`, or with JAX_NUM_PROCESSES=1 to run it alone"
                ]
            )
        return "SLURM"
    if "JOBSET_NAME" in variables or "JOB_COMPLETION_INDEX" in variables:
        try:
            import kubernetes  # noqa: F401
        except ImportError:
            raise ConfigError(
                [
                    "JOB_COMPLETION_INDEX: this is a pod of a Kubernetes job, and JAX asks the cluster for the others"
                    f" with a package that is missing: pip install 'jax[k8s]', {by_hand}, or JAX_NUM_PROCESSES=1 to"
                    " run it alone"
                ]
            ) from None
        return "Kubernetes"
    return None


def _detect_with_jax(launcher: str, timeout: float) -> Cluster:
    """Let JAX detect the cluster from the launcher's variables or the machine's metadata."""
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
    except Exception as error:
        found, why = (None, None, None, None), f" ({type(error).__name__}: {error})"
    else:
        why = ""
    if None in found[:3]:
        raise ConfigError(
            [
                f"{launcher}: JAX cannot detect the other processes from it{why}; set JAX_COORDINATOR_ADDRESS,"
                " JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ]
        )
    address, num_processes, process, local_devices = found
    return Cluster(address, num_processes, process, None if local_devices is None else list(local_devices))


def is_primary() -> bool:
    """Whether this process writes the shared files: logs, configuration, manifest."""
    return jax.process_index() == 0


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Yield a function of the step: whether this or any other process got SIGTERM (or a first Ctrl-C).

    With several processes, all of them must call it at every step, and all stop at the same step.
    """
    if jax.process_count() > 1:
        # JAX handles SIGTERM itself, notifies the other processes, and agrees with them on the step.
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        reached: list[int] = []
        # The first Ctrl-C acts like SIGTERM; a second one interrupts.
        previous = signal.signal(signal.SIGINT, lambda number, frame: _terminate_self())

        def agreed(step: int) -> bool:
            if not reached and reached_preemption_sync_point(step):
                reached.append(step)
            return bool(reached)

        try:
            yield agreed
        finally:
            signal.signal(signal.SIGINT, previous)
        return

    asked: list[int] = []

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


def _terminate_self() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)


def stop_with_parent() -> None:
    """Stop as on SIGTERM when standard input, a pipe from the parent process, reaches end of file.

    This works however the parent ends, also if it ended before this call.
    """

    def watch_stdin():
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch_stdin, daemon=True).start()


def _first_of(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _number(names: tuple[str, ...]) -> int:
    text = _first_of(names)
    if text is None or not text.isdigit():
        raise ConfigError([f"{names[1]}: {text!r} must be a number, because the environment names a coordinator"])
    return int(text)
