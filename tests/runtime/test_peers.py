"""Processes connect, compare, and detect lost ones: real processes and connections, without JAX."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxlm.errors import FaultError
from maxlm.runtime.peers import connect_all

ROOT = Path(__file__).parents[2]

# Arguments: address, process, count, action, start timeout in seconds, heartbeat timeout in seconds.
SCRIPT = """
import sys, time
from maxlm.runtime.peers import connect_all
from maxlm.errors import DataError, MaxlmError
address, process, count, action = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
try:
    timeout, heartbeat = map(float, sys.argv[5:])
    peers = connect_all(address, process=process, count=count, timeout=timeout, heartbeat_seconds=heartbeat)
except MaxlmError as error:
    print(f"maxlm: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
print(peers.compare(f"record {process}", lambda records: records, timeout=60), flush=True)
if action == "leave":
    peers.leave()
    sys.exit(0)
if action == "mistake":
    peers.fail(DataError("data/x: there is no such folder"))
if action == "bug":
    try:
        raise KeyError("planted")
    except KeyError as error:
        peers.fail(error)
if action == "abort":
    # As JAX's own watch does: on a thread that does not hold Python's lock.
    import ctypes, threading
    threading.Thread(target=ctypes.CDLL(None).abort).start()
time.sleep(60)
"""


@pytest.fixture
def address(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", address)
    return address


@pytest.fixture
def start(address):
    """Starts processes, and kills those still running at the end."""
    started = []

    def start(process: int, count: int, action: str, *, timeout: float = 60, heartbeat: float = 30) -> subprocess.Popen:
        argv = [sys.executable, "-c", SCRIPT, address, *map(str, (process, count, action, timeout, heartbeat))]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(argv, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_processes_connect_compare_and_leave(start):
    ended = ends([start(n, 3, "leave") for n in (2, 0, 1)])
    for code, output, errors in ended:
        assert (code, output) == (0, "['record 0', 'record 1', 'record 2']\n"), errors


@pytest.mark.parametrize("gone", [0, 1])
def test_killed_process_is_reported_at_once(gone, start):
    processes = [start(n, 3, "wait") for n in range(3)]
    for process in processes:
        assert "record 2" in process.stdout.readline()
    began = time.monotonic()
    processes[gone].kill()
    ended = ends(processes)
    assert time.monotonic() - began < 15
    for process, (code, _, errors) in enumerate(ended):
        if process == gone:
            assert code == -signal.SIGKILL
        else:
            assert code == FaultError.exit_code
            assert f"maxlm: process {gone} ({socket.gethostname()}): lost: its connection closed" in errors


@pytest.mark.parametrize("silent", [0, 1])
def test_hanging_process_counts_as_lost(silent, start):
    processes = [start(n, 2, "wait", heartbeat=3) for n in range(2)]
    for process in processes:
        process.stdout.readline()
    began = time.monotonic()
    os.kill(processes[silent].pid, signal.SIGSTOP)
    [(code, _, errors)] = ends([processes[1 - silent]])
    assert 2 < time.monotonic() - began < 15
    assert code == FaultError.exit_code
    assert f"process {silent} ({socket.gethostname()}): lost: it sent no heartbeat for 3 s" in errors


@pytest.mark.parametrize("process", [0, 1])
def test_user_error_on_one_process_ends_all_and_is_reported_by_it_and_process_0(process, start):
    ended = ends([start(n, 3, "mistake" if n == process else "wait") for n in range(3)])
    assert [code for code, _, _ in ended] == [2, 2, 2]
    for n, (_, _, errors) in enumerate(ended):
        assert ("there is no such folder" in errors) == (n in (0, process)), n
        assert "Traceback" not in errors


def test_bug_in_one_process_ends_all_and_only_it_prints_the_traceback(start):
    ended = ends([start(n, 3, "bug" if n == 2 else "wait") for n in range(3)])
    assert [code for code, _, _ in ended] == [FaultError.exit_code] * 3
    assert ["Traceback" in errors for _, _, errors in ended] == [False, False, True]
    assert all("KeyError: 'planted'" in errors for _, _, errors in ended)


def test_jax_abort_leaves_time_to_report_the_lost_process(start):
    processes = [start(0, 2, "wait"), start(1, 2, "abort")]
    for process in processes:
        process.stdout.readline()
    time.sleep(0.3)
    processes[0].kill()
    code, _, errors = ends(processes)[1]
    assert code == FaultError.exit_code
    assert "process 0" in errors


def test_processes_that_do_not_connect_are_named(start):
    ended = ends([start(n, 4, "wait", timeout=6) for n in (0, 2)])
    assert [code for code, _, _ in ended] == [FaultError.exit_code] * 2
    for _, _, errors in ended:
        assert "processes 1, 3 of 4 did not connect to 127.0.0.1:" in errors


def test_conflicting_process_number_or_count_is_reported(start):
    ended = ends([start(0, 2, "wait"), start(1, 3, "wait")])
    assert [code for code, _, _ in ended] == [2, 2]
    assert all("is one of 3, and process 0" in errors for _, _, errors in ended)
    ended = ends([start(0, 3, "wait"), start(1, 3, "wait"), start(1, 3, "wait")])
    assert [code for code, _, _ in ended] == [2, 2, 2]
    assert "two processes have the number 1" in ended[0][2]


def test_missing_process_0_is_reported(address):
    with pytest.raises(FaultError, match=r"could not connect to process 0 at .* within 0\.5 s"):
        connect_all(address, process=1, count=2, timeout=0.5, heartbeat_seconds=1)


def test_foreign_connections_are_closed(address, start):
    """Another program connects to the port, and another server still holds process 0's port."""
    place, _, port = address.rpartition(":")
    with socket.create_server((place, int(port))) as server:
        caller = start(1, 3, "leave")
        connection, _ = server.accept()
        connection.sendall(b"\x00\x00\x12\x04 as gRPC would begin")
        server.close()
        connection.close()
    hub = start(0, 3, "leave")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((place, int(port)), timeout=1) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        time.sleep(0.02)
    else:
        pytest.fail("process 0 does not listen")
    # Process 0 still waits for this one.
    late = start(2, 3, "leave")
    assert [code for code, _, _ in ends([hub, caller, late])] == [0, 0, 0]


@pytest.mark.parametrize("process", [0, 1])
def test_error_caused_by_a_lost_process_is_not_reported_as_the_cause(process, start):
    """A save that fails because a process was killed looks like a user error here, which would prevent a restart."""
    others = [start(n, 3, "mistake" if n == process else "wait") for n in range(2)]
    dying = start(2, 3, "wait")
    for one in [*others, dying]:
        one.stdout.readline()
    dying.kill()
    for code, _, errors in ends(others):
        assert code == FaultError.exit_code
        assert "process 2 (" in errors
        assert "no such folder" not in errors
