"""Heartbeats between the processes of a run: they connect before JAX starts, and detect at once when one is lost.

All connect to process 0, at the address where JAX's own service listens afterwards: no other port is needed. A process
that ends closes its connection, so the others know within milliseconds; one that is unreachable or hangs counts as lost
after `heartbeat_seconds`. JAX has its own heartbeat, which is slower, does not name the lost process, and aborts.

Messages are JSON, one per line, with a `kind`:
  hello     to process 0: who I am                 welcome   from process 0: all are connected
  beat      heartbeat                              record    to process 0: the argument of `compare`
  left      about to exit normally                 answer    from process 0: the result of `compare`
  failed    to process 0: my error                 verdict   from process 0: what ended the run
"""

import contextlib
import ctypes
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from maxlm.errors import ConfigError, FaultError, MaxlmError
from maxlm.runtime.progress import console

_RETRY_SECONDS = 0.2
# How long a process waits to learn the cause of its own error, and process 0 for all to receive the verdict.
_GRACE_SECONDS = 2.0

INTERRUPTED = 130


@dataclass(frozen=True)
class Verdict:
    """What ended the run: the process that was lost or failed, and the exit code, which marks user errors."""

    process: int
    host: str
    sentence: str
    exit_code: int


class _Link:
    """A connection that sends and receives messages."""

    def __init__(self, connection: socket.socket, process: int, host: str):
        self.connection, self.process, self.host = connection, process, host
        self.heard = time.monotonic()
        self.left = False
        self._received = b""
        self._sending = threading.Lock()

    def send(self, kind: str, **content: Any) -> None:
        """Send a message; a lost connection is detected when receiving."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(_line({"kind": kind, **content}))

    def receive(self) -> list[dict] | None:
        """The messages that have arrived; waits for at least part of one. None: the connection is closed."""
        try:
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def receive_one(self, deadline: float) -> dict | None:
        """The next message, keeping later ones; None: none arrived in time, or the data is not a message."""
        with contextlib.suppress(ValueError):
            while time.monotonic() < deadline:
                self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
                messages = self.receive()
                if messages is None or (self._received and not self._received.startswith(b"{")):
                    return None
                if messages:
                    self._received = b"".join(_line(m) for m in messages[1:]) + self._received
                    self.connection.settimeout(None)
                    return messages[0] if isinstance(messages[0], dict) else None
        return None

    def is_closed(self) -> bool:
        """Whether the other side has closed the connection."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


class Peers:
    """This process's connections to the other processes of a run. Created by `connect_all`."""

    def __init__(self, process: int, count: int, links: list[_Link], heartbeat_seconds: float):
        self.process, self.count = process, count
        self.heartbeat_seconds = heartbeat_seconds
        self._links = {link.process: link for link in links}
        self._records: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._ending = threading.Lock()
        self._closed = threading.Event()
        for link in links:
            link.heard = time.monotonic()
        _delay_jax_abort()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def compare(self, record: Any, decide: Callable[[list[Any]], Any], *, timeout: float) -> Any:
        """Gather all processes' records, call `decide` on them in process order on process 0, and broadcast the result.

        Raises:
          FaultError: some process sent no record in time.
        """
        if self.process:
            self._links[0].send("record", value=record)
            try:
                # Process 0 waits for the records for `timeout`, and then reports who is late.
                return self._answers.get(timeout=timeout + _GRACE_SECONDS)
            except queue.Empty:
                raise FaultError(f"process 0 ({self._links[0].host}) has not answered within {timeout:g} s") from None
        records, deadline = {0: record}, time.monotonic() + timeout
        while len(records) < self.count:
            try:
                process, value = self._records.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                late = ", ".join(f"process {n} ({self._links[n].host})" for n in range(self.count) if n not in records)
                raise FaultError(f"{late}: not ready to train within {timeout:g} s") from None
            records[process] = value
        answer = decide([records[n] for n in range(self.count)])
        for link in self._links.values():
            link.send("answer", value=answer)
        return answer

    def fail(self, error: BaseException) -> None:
        """Report to the others that this process cannot continue, print why, and exit. Does not return.

        If the error only follows from the loss of another process, that process is named instead.
        """
        # A collective or a save fails just before the verdict with the cause arrives, which ends this process.
        time.sleep(_GRACE_SECONDS)
        if isinstance(error, MaxlmError):
            sentence, exit_code = str(error), error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            sentence, exit_code = "interrupted", INTERRUPTED
        else:
            traceback.print_exception(error)
            sentence, exit_code = f"{type(error).__name__}: {error}".splitlines()[0], FaultError.exit_code
        verdict = Verdict(self.process, socket.gethostname(), sentence, exit_code)
        if self.process:
            self._links[0].send("failed", sentence=sentence, exit_code=exit_code)
            time.sleep(_GRACE_SECONDS)
        self._end(verdict)

    def leave(self) -> None:
        """Announce a normal exit at the end of a run: a closed connection is no longer a fault."""
        for link in self._links.values():
            link.left = True
            link.send("left")
        self._closed.set()

    def _watch(self) -> None:
        interval = self.heartbeat_seconds / 4
        with selectors.DefaultSelector() as selector:
            for link in self._links.values():
                selector.register(link.connection, selectors.EVENT_READ, link)
            beat = time.monotonic()
            while not self._closed.is_set():
                for key, _ in selector.select(timeout=max(beat + interval - time.monotonic(), 0)):
                    link = key.data
                    messages = link.receive()
                    if messages is None:
                        selector.unregister(link.connection)
                        self._lost(link, "its connection closed, so it was killed or its machine is down")
                    for message in messages or []:
                        self._take(link, message)
                now = time.monotonic()
                if now >= beat + interval:
                    beat = now
                    for link in self._links.values():
                        link.send("beat")
                        if now - link.heard > self.heartbeat_seconds:
                            self._lost(link, f"it sent no heartbeat for {self.heartbeat_seconds:g} s")

    def _lost(self, link: _Link, why: str) -> None:
        if link.left or self._closed.is_set():
            # No further heartbeats are expected.
            link.heard = float("inf")
            return
        self._end(Verdict(link.process, link.host, f"lost: {why}", FaultError.exit_code))

    def _take(self, link: _Link, message: dict) -> None:
        match message["kind"]:
            case "left":
                link.left = True
            case "record":
                self._records.put((link.process, message["value"]))
            case "answer":
                self._answers.put(message["value"])
            case "failed":
                # An error on all processes is reported by process 0, which may be about to find it too.
                verdict = Verdict(link.process, link.host, message["sentence"], message["exit_code"])
                threading.Timer(_GRACE_SECONDS / 2, self._end, [verdict]).start()
            case "verdict":
                self._end(Verdict(**message["verdict"]))

    def _end(self, verdict: Verdict) -> None:
        """Exit this process; process 0 first sends the verdict to the others, and waits until they have exited."""
        with self._ending:
            if self.process == 0:
                for link in self._links.values():
                    link.send("verdict", verdict=asdict(verdict))
            self._print(verdict)
            if self.process == 0:
                deadline = time.monotonic() + _GRACE_SECONDS
                for link in self._links.values():
                    link.connection.settimeout(max(deadline - time.monotonic(), 0.001))
                    while time.monotonic() < deadline and link.receive() is not None:
                        pass
            sys.stdout.flush()
            sys.stderr.flush()
            # Not sys.exit: at exit JAX would wait forever for the others.
            os._exit(verdict.exit_code)

    def _print(self, verdict: Verdict) -> None:
        """Print a user error once, and a fault on every process."""
        if verdict.exit_code != FaultError.exit_code and self.process not in (0, verdict.process):
            return
        who = "" if verdict.process == self.process == 0 else f"process {verdict.process} ({verdict.host}): "
        console.show_cursor(True)
        print(f"maxlm: {who}{verdict.sentence}", file=sys.stderr)


@contextlib.contextmanager
def ending_together(peers: Peers | None) -> Iterator[None]:
    """An error in this context ends all processes of the run."""
    try:
        yield
    except BaseException as error:
        if peers is None:
            raise
        peers.fail(error)


def connect_all(address: str, *, process: int, count: int, timeout: float, heartbeat_seconds: float) -> Peers:
    """Connect all `count` processes at `address` (host:port of process 0), and wait until all are connected.

    Raises:
      FaultError: some did not connect in time; process 0 names them.
      ConfigError: two processes have the same number, or different process counts.
    """
    links = _accept_all(address, count, timeout) if process == 0 else _connect(address, process, count, timeout)
    return Peers(process, count, links, heartbeat_seconds)


def _accept_all(address: str, count: int, timeout: float) -> list[_Link]:
    """Process 0: a link to each other process."""
    deadline = time.monotonic() + timeout
    links: dict[int, _Link] = {}
    try:
        with _listen(int(address.rpartition(":")[2]), deadline) as listener:
            while len(links) < count - 1:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    raise _missing([n for n in range(1, count) if n not in links], count, address, timeout) from None
                _handshake(connection, links, count)
    except MaxlmError as error:
        for link in links.values():
            _refuse(link, error)
        raise
    for link in links.values():
        link.send("welcome", host=socket.gethostname())
    return list(links.values())


def _missing(missing: list[int], count: int, address: str, timeout: float) -> FaultError:
    numbers = ", ".join(map(str, missing))
    process, it = ("processes", "they") if len(missing) > 1 else ("process", "it")
    return FaultError(
        f"{process} {numbers} of {count} did not connect to {address} within {timeout:g} s; see what {it} printed, and"
        " whether that address is reachable from there"
    )


def _listen(port: int, deadline: float) -> socket.socket:
    """Listen on the port, retrying while a previous run still holds it. JAX's variable can bind it to one interface."""
    host = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0]
    while True:
        try:
            if host and host != "[::]":
                return socket.create_server((host, port), backlog=1024)
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    [f"port {port} of process 0 cannot be used ({error.strerror}); choose another"]
                ) from None
            time.sleep(_RETRY_SECONDS)


def _handshake(connection: socket.socket, links: dict[int, _Link], count: int) -> None:
    """Add a process that sends `hello` to `links`; other connections are closed.

    Raises:
      ConfigError: its process count differs, or another process has its number.
    """
    link = _Link(connection, -1, "")
    hello = link.receive_one(time.monotonic() + _GRACE_SECONDS)
    if hello is None or hello.get("kind") != "hello":
        connection.close()
        return
    link.process, link.host = hello["process"], hello["host"]
    problem = None
    if hello["count"] != count or not 0 < link.process < count:
        problem = (
            f"process {link.process} ({link.host}) is one of {hello['count']}, and process 0 ({socket.gethostname()})"
            f" one of {count}; start all with the same number of processes"
        )
    elif link.process in links and not links[link.process].is_closed():
        problem = (
            f"two processes have the number {link.process}, on {links[link.process].host} and {link.host};"
            " number them 0, 1, ..."
        )
    if problem:
        _refuse(link, ConfigError([problem]))
        raise ConfigError([problem])
    links[link.process] = link


def _refuse(link: _Link, error: MaxlmError) -> None:
    link.send("verdict", verdict=asdict(Verdict(0, socket.gethostname(), str(error), error.exit_code)))


def _connect(address: str, process: int, count: int, timeout: float) -> list[_Link]:
    """Any other process: its link to process 0, once all are connected.

    Retries until the timeout: process 0 may start later, or another run may be ending at that address.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5))
            link = _Link(connection, 0, host)
            link.send("hello", process=process, count=count, host=socket.gethostname())
            # Process 0 may have started waiting later than this one.
            answer = link.receive_one(time.monotonic() + timeout + _GRACE_SECONDS) or {}
            if answer.get("kind") == "welcome":
                link.host = answer["host"]
                return [link]
            connection.close()
            if answer.get("kind") == "verdict":
                verdict = Verdict(**answer["verdict"])
                raise ConfigError([verdict.sentence]) if verdict.exit_code == 2 else FaultError(verdict.sentence)
        time.sleep(_RETRY_SECONDS)
    raise FaultError(
        f"process {process} of {count} could not connect to process 0 at {address} within {timeout:g} s; start it, and"
        " check that the address is reachable from here"
    )


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _delay_jax_abort() -> None:
    """Delay JAX's abort when process 0 is lost, so that our verdict prints first: both detect the loss together.

    SIGABRT calls the C library's `sleep` with its own number, six seconds, on the thread that aborts. A handler in
    Python would not do: it runs on the main thread, which may never return from a collective.
    """
    library = ctypes.CDLL(None)
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
