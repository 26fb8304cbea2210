"""Which environments say that several processes train as one."""

import os
import signal

import jax
import pytest

from maxlm.core.distributed import initialize_distributed, is_primary, stop_on_signal
from maxlm.errors import ConfigError


@pytest.fixture
def calls(monkeypatch):
    """What JAX would be asked; nothing of the environment says that there are others."""
    for name in list(os.environ):
        if name.startswith(("MAXLM_", "TPU_")) or name in (
            "JAX_COORDINATOR_ADDRESS",
            "JAX_NUM_PROCESSES",
            "JAX_PROCESS_ID",
        ):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    return calls


def test_one_process_joins_nobody(calls, monkeypatch):
    initialize_distributed()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    initialize_distributed()
    assert calls == []
    assert is_primary()


def test_a_slice_of_several_hosts_finds_itself(calls, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2")
    initialize_distributed()
    assert calls == [()]


@pytest.mark.parametrize("names", [("MAXLM_COORDINATOR", "MAXLM_NUM_PROCESSES", "MAXLM_PROCESS_ID"),
                                   ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")])  # fmt: skip
def test_the_environment_names_the_others(names, calls, monkeypatch):
    for name, value in zip(names, ("host:1234", "4", "3")):
        monkeypatch.setenv(name, value)
    initialize_distributed()
    assert calls == [("host:1234", 4, 3)]


@pytest.mark.parametrize(
    ("processes", "number", "message"),
    [(None, "0", "JAX_NUM_PROCESSES: None must be a number"), ("2", "x", "JAX_PROCESS_ID: 'x' must be a number"),
     ("2", "2", "JAX_PROCESS_ID: 2 is not among 2 processes")],
)  # fmt: skip
def test_half_an_environment_is_told(processes, number, message, calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    if processes is not None:
        monkeypatch.setenv("JAX_NUM_PROCESSES", processes)
    monkeypatch.setenv("JAX_PROCESS_ID", number)
    with pytest.raises(ConfigError, match=message):
        initialize_distributed()


def test_a_signal_asks_to_stop_and_a_second_interrupt_stops():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
        with pytest.raises(KeyboardInterrupt):
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
