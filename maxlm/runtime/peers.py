"""The processes of a run keep in touch: they meet before JAX starts, and each knows at once when one of them is gone.

All connect to process 0, at the address where JAX's own service listens afterwards: no other port is needed. A process
that ends closes its connection, so the others know within milliseconds; one that is cut off or hangs is given up after
`heartbeat_seconds`. JAX has a watch of its own, which is slower, names nobody and aborts.

Messages are JSON, one a line, with a `kind`:
  hello     to process 0: who I am                 welcome   from it: all have come
  beat      still here                             record    to process 0: what `compare` was given
  left      about to end, and well                 answer    from it: what `compare` returns
  failed    to process 0: my error                 verdict   from it: what ended the run
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
# How long a process waits to be told what is behind an error of its own, and process 0 for all to have heard.
_GRACE_SECONDS = 2.0

INTERRUPTED = 130


@dataclass(frozen=True)
class Verdict:
    """What ended the run: the process that is gone or failed, and whether its error is the user's to mend."""

    process: int
    host: str
    sentence: str
    exit_code: int


class _Link:
    """A connection that carries messages."""

    def __init__(self, connection: socket.socket, process: int, host: str):
        self.connection, self.process, self.host = connection, process, host
        self.heard = time.monotonic()
        self.left = False
        self._received = b""
        self._sending = threading.Lock()

    def send(self, kind: str, **content: Any) -> None:
        """Send a message; that the other is gone is noticed where messages are received."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(_line({"kind": kind, **content}))

    def receive(self) -> list[dict] | None:
        """The messages that have come; waits for a part of one at least. None: the connection has ended."""
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
        """The next message, later ones being kept; None: none came in time, or what came is no message."""
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
        """Whether the other has ended."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


class Peers:
    """This process's place among the processes of a run. Made by `meet`."""

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
        _wait_before_an_abort()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def compare(self, record: Any, decide: Callable[[list[Any]], Any], *, timeout: float) -> Any:
        """Give all processes' records, in their order, to `decide` on process 0, and its result to all.

        Raises:
          FaultError: some process has sent no record in time.
        """
        if self.process:
            self._links[0].send("record", value=record)
            try:
                # Process 0 waits that long for the records, and then says so.
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
        """Tell the others that this process cannot go on, say so here, and end it. Does not return.

        Where the error is only what another's end looks like from here, that one is named instead.
        """
        # A collective, or a save, breaks a moment before the news of why arrives, which ends this process.
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
        """Say goodbye at the end of a run: what comes now is no fault."""
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
                        self._lost(link, "its connection broke, so it was killed or its machine is down")
                    for message in messages or []:
                        self._take(link, message)
                now = time.monotonic()
                if now >= beat + interval:
                    beat = now
                    for link in self._links.values():
                        link.send("beat")
                        if now - link.heard > self.heartbeat_seconds:
                            self._lost(link, f"it has said nothing for {self.heartbeat_seconds:g} s")

    def _lost(self, link: _Link, why: str) -> None:
        if link.left or self._closed.is_set():
            # It owes no further sign of life.
            link.heard = float("inf")
            return
        self._end(Verdict(link.process, link.host, f"gone: {why}", FaultError.exit_code))

    def _take(self, link: _Link, message: dict) -> None:
        match message["kind"]:
            case "left":
                link.left = True
            case "record":
                self._records.put((link.process, message["value"]))
            case "answer":
                self._answers.put(message["value"])
            case "failed":
                # What all find wrong is told by process 0, which may be about to find it too.
                verdict = Verdict(link.process, link.host, message["sentence"], message["exit_code"])
                threading.Timer(_GRACE_SECONDS / 2, self._end, [verdict]).start()
            case "verdict":
                self._end(Verdict(**message["verdict"]))

    def _end(self, verdict: Verdict) -> None:
        """End this process; process 0 tells the others first, and waits until they have ended."""
        with self._ending:
            if self.process == 0:
                for link in self._links.values():
                    link.send("verdict", verdict=asdict(verdict))
            self._say(verdict)
            if self.process == 0:
                deadline = time.monotonic() + _GRACE_SECONDS
                for link in self._links.values():
                    link.connection.settimeout(max(deadline - time.monotonic(), 0.001))
                    while time.monotonic() < deadline and link.receive() is not None:
                        pass
            sys.stdout.flush()
            sys.stderr.flush()
            # Not sys.exit: at the end of a process JAX waits for the others, which will never come.
            os._exit(verdict.exit_code)

    def _say(self, verdict: Verdict) -> None:
        """A user's mistake is told once, and what happened to a machine on every other."""
        if verdict.exit_code != FaultError.exit_code and self.process not in (0, verdict.process):
            return
        who = "" if verdict.process == self.process == 0 else f"process {verdict.process} ({verdict.host}): "
        console.show_cursor(True)
        print(f"maxlm: {who}{verdict.sentence}", file=sys.stderr)


@contextlib.contextmanager
def ending_together(peers: Peers | None) -> Iterator[None]:
    """An error in here ends all processes of the run, where there are others."""
    try:
        yield
    except BaseException as error:
        if peers is None:
            raise
        peers.fail(error)


def meet(address: str, *, process: int, count: int, timeout: float, heartbeat_seconds: float) -> Peers:
    """Wait until all `count` processes have come to `address` (host:port of process 0).

    Raises:
      FaultError: some have not come in time; process 0 names them.
      ConfigError: two processes have one number, or count the processes differently.
    """
    place = _hear(address, count, timeout) if process == 0 else _call(address, process, count, timeout)
    return Peers(process, count, place, heartbeat_seconds)


def _hear(address: str, count: int, timeout: float) -> list[_Link]:
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
                _greet(connection, links, count)
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
        f"{process} {numbers} of {count} did not come to {address} within {timeout:g} s; look at what {it} printed, and"
        " whether that address can be reached from there"
    )


def _listen(port: int, deadline: float) -> socket.socket:
    """The port, which a run that is just ending may hold still. JAX's own variable can bind it to one interface."""
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


def _greet(connection: socket.socket, links: dict[int, _Link], count: int) -> None:
    """Add a process that says hello to `links`; whatever else connects is sent away.

    Raises:
      ConfigError: it counts the processes differently, or there is one with its number.
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


def _call(address: str, process: int, count: int, timeout: float) -> list[_Link]:
    """Any other process: its link to process 0, once all have come.

    Tries again until the time is over: process 0 may start later, or another run may be ending at that address.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5))
            link = _Link(connection, 0, host)
            link.send("hello", process=process, count=count, host=socket.gethostname())
            # Process 0 may have begun to wait later than this one.
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
        f"process {process} of {count} found no process 0 at {address} within {timeout:g} s; start it, and see that the"
        " address can be reached from here"
    )


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _wait_before_an_abort() -> None:
    """Let the watch speak first where JAX aborts because process 0 is gone: both learn of it in the same moment.

    SIGABRT calls the C library's `sleep` with its own number, six seconds, on the thread that aborts. A handler in
    Python would not do: it runs on the main thread, which may never return from a collective.
    """
    library = ctypes.CDLL(None)
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
