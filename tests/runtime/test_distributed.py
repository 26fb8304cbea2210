"""Detection of multi-process runs from the environment, and handling of signals."""

import os
import signal

import pytest

from maxlm.errors import ConfigError
from maxlm.runtime.distributed import Cluster, find_cluster, initialize_distributed, is_primary, stop_on_signal

_LAUNCHERS = ("MAXLM_", "TPU_", "MEGASCALE_", "SLURM_", "OMPI_", "JOBSET_", "JOB_COMPLETION_", "KUBERNETES_")
_OF_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, after removing the machine's own variables about other processes."""
    for name in list(os.environ):
        if name.startswith(_LAUNCHERS) or name in _OF_JAX:
            monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[007-010],big1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TPU_WORKER_HOSTNAMES": "localhost", "JOB_COMPLETION_INDEX": "0"},
        {"JOB_COMPLETION_INDEX": "0", "JAX_NUM_PROCESSES": "1"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {**SLURM, "JAX_NUM_PROCESSES": "1"},
    ],
)
def test_single_process_does_not_connect(variables, environment):
    environment(variables)
    assert initialize_distributed() is None
    assert is_primary()


@pytest.mark.parametrize(
    ("variables", "cluster"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            Cluster("host:1234", 4, 3),
        ),
        (
            {"MAXLM_COORDINATOR": "host:1234", "MAXLM_NUM_PROCESSES": "4", "MAXLM_PROCESS_ID": "3"},
            Cluster("host:1234", 4, 3),
        ),
        # The first node runs process 0; the port is derived from the job number.
        (SLURM, Cluster("node007:61447", 4, 2, [0])),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}, Cluster("10.0.0.1:99", 4, 2)),
        (OPEN_MPI, Cluster(f"10.96.0.1:{1531576320 // 2**12 % 2**12 + 61440}", 8, 5, [1])),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"},
            Cluster("a:1", 8, 5),
        ),
    ],
)
def test_cluster_is_found_from_the_environment(variables, cluster, environment):
    environment(variables)
    assert find_cluster(1) == cluster


def test_slices_of_a_tpu_on_gke(environment, monkeypatch):
    """The second host of the second of two slices: JAX's own detection, made to assume a TPU machine."""
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    environment(
        {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "host-2,host-3",
            "TPU_WORKER_ID": "1",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": "1",
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        }
    )
    assert find_cluster(1) == Cluster("localhost:8482", 4, 3)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES: None must be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2"}, "'host' must be host:port"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"},
            "JAX_PROCESS_ID: 'x' must be a number",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID: 2 is not among 2 processes",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "start it with `srun maxlm train"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI 5 does not give"),
        ({"JOB_COMPLETION_INDEX": "1"}, "pip install 'jax\\[k8s\\]'"),
        ({"MAXLM_DISTRIBUTED": "auto"}, "JAX cannot detect the other processes from it"),
    ],
)
def test_incomplete_environment_is_reported(variables, message, environment):
    environment(variables)
    with pytest.raises(ConfigError, match=message):
        initialize_distributed()


def test_signal_requests_a_stop_and_a_second_interrupt_raises():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
        with pytest.raises(KeyboardInterrupt):
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
