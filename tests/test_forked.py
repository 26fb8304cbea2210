"""Processes forked by tests end with them, and errors are reported."""

import os
import signal
import threading
import time

import pytest
from forked import Call, Forked

SLEEPS = Call("time:sleep", [60])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_server_ends_its_forked_processes(number):
    with Forked([], paths=[]) as forked:
        server = forked._server.pid
        children = []

        def send():
            while len(children) < 2:
                time.sleep(0.05)
                with open(f"/proc/{server}/task/{server}/children") as file:
                    children[:] = map(int, file.read().split())
            os.kill(server, number)

        sender = threading.Thread(target=send)
        sender.start()
        with pytest.raises(AssertionError, match="the process that forks has ended"):
            forked.run([SLEEPS, SLEEPS])
        sender.join()
        # Killed processes are reparented, and their new parent may take a moment to reap them.
        deadline = time.monotonic() + 10
        while any(map(_runs, children)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert forked.run([Call("time:sleep", [0])]) == [0], "it starts again"


def test_module_that_cannot_be_imported_is_reported(capfd):
    with Forked(["no_such_module"], paths=[]) as forked, pytest.raises(AssertionError, match="has ended"):
        forked.run([SLEEPS])
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
