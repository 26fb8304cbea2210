"""Run Python code that nobody has read, such as a model's, within bounds of time, memory, processes, output and files.

Isolated by default: Linux namespaces without network, whose file system holds the Python installation, read-only, and
an empty folder in memory. docs/rewards.md says what this protects from, and what not.
"""

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from maxlm.errors import ConfigError
from maxlm.runtime import bounded_child

_SETUP_SECONDS = 60.0  # to start Python and build the namespaces, on a busy machine


@dataclass(frozen=True)
class Limits:
    """Bounds of one program.

    seconds: of wall time. cpu_seconds: whole seconds of a process, all its threads together.
    memory_mb: address space of a process; all together have at most `processes` times as much, and their files.
    processes: and threads, at once. output_bytes: of standard output and error together.
    file_mb: of all files together if isolated, else of each.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mb: int = 512
    processes: int = 4
    output_bytes: int = 64 << 10
    file_mb: int = 16


@dataclass(frozen=True)
class Program:
    """A Python program: its main module, its standard input, and the files next to it, by name."""

    code: str
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it wrote: at most `output_bytes`, invalid UTF-8 replaced.

    ended: "exit" by itself; by a bound: "time", "cpu", "memory" (an uncaught MemoryError), "output"; by a "signal".
    exit_code: of its main process, minus the signal's number; None if a bound of time or output ended it.
    """

    ended: Literal["exit", "signal", "time", "cpu", "memory", "output"]
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


class IsolationError(ConfigError):
    """This machine does not permit what isolates a program."""


def run_program(program: Program, limits: Limits = Limits(), *, isolated: bool = True) -> Outcome:
    """Run a program to its end, and end all that it started.

    Args:
      isolated: False accepts that the program can read and write the files of this user, and reach the network.

    Raises:
      IsolationError: it cannot be isolated, or limited, on this machine.
    """
    if sys.platform != "linux":
        raise IsolationError([f"code of a model is only run on Linux, not on {sys.platform}"])
    # The program may have removed all rights to what it wrote.
    with tempfile.TemporaryDirectory(prefix="maxlm-code-", ignore_cleanup_errors=True) as folder:
        return _Run(program, limits, folder, isolated=isolated).outcome()


def run_programs(
    programs: Sequence[Program], limits: Limits = Limits(), *, isolated: bool = True, workers: int | None = None
) -> list[Outcome]:
    """`run_program` for several, at most `workers` at a time (None: one for each CPU), in their order."""
    run = functools.partial(run_program, limits=limits, isolated=isolated)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(run, programs))


@functools.cache
def isolation_problem() -> str | None:
    """Why programs cannot be isolated on this machine; None if they can."""
    try:
        outcome = run_program(Program("print('ready')"))
    except IsolationError as error:
        return str(error)
    return (
        None if outcome.stdout == "ready\n" else f"a test program ended with {outcome.ended}: {outcome.stderr[-200:]}"
    )


class _Run:
    """One program while it runs."""

    def __init__(self, program: Program, limits: Limits, folder: str, *, isolated: bool):
        self._program, self._limits, self._folder, self._isolated = program, limits, folder, isolated
        self._is_root = os.geteuid() == 0
        self._written: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._messages = bytearray()
        self._result: dict[str, Any] = {}
        self._started: float | None = None

    def outcome(self) -> Outcome:
        ours, theirs = socket.socketpair()
        with (
            ours,
            theirs,
            self._request_file() as request,
            self._stdin_file() as stdin,
            subprocess.Popen(
                [sys.executable, "-I", "-S", bounded_child.__file__, str(theirs.fileno()), str(request.fileno())],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), request.fileno()),
                start_new_session=True,
                env={},
                cwd=self._folder,
            ) as launcher,
        ):
            theirs.close()
            try:
                ended_by = self._watch(launcher, ours)
            finally:
                self._end(launcher)
        if "error" in self._result:
            raise self._unavailable(self._result["error"])
        return self._outcome(ended_by)

    def _watch(self, launcher: subprocess.Popen, control: socket.socket) -> str | None:
        """Read all that is written until everything has ended; the bound that was exceeded."""
        deadline = time.monotonic() + _SETUP_SECONDS
        with selectors.DefaultSelector() as selector:
            assert launcher.stdout is not None
            assert launcher.stderr is not None
            for name, source in (("stdout", launcher.stdout), ("stderr", launcher.stderr), ("control", control)):
                selector.register(source, selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "control":
                        if self._receive(data, launcher, control):
                            deadline = time.monotonic() + self._limits.seconds
                    else:
                        self._written[key.data] += data
                if sum(map(len, self._written.values())) > self._limits.output_bytes:
                    return "output"
                if time.monotonic() >= deadline:
                    return "time"
        return None

    def _receive(self, data: bytes, launcher: subprocess.Popen, control: socket.socket) -> bool:
        """Act on messages of the child; whether one of them says that the program starts."""
        self._messages += data
        *lines, rest = self._messages.split(b"\n")
        self._messages = bytearray(rest)
        starts = False
        for message in map(json.loads, lines):
            if "unshared" in message:
                try:
                    self._map_users(launcher.pid)
                except OSError as error:
                    self._result["error"] = f"{error.filename or 'its user map'}: {error.strerror}"
                    self._end(launcher)
                    return False
                control.sendall(b"m")
            elif "started" in message:
                self._started = time.monotonic()
                starts = True
            else:
                self._result |= message
        return starts

    def _map_users(self, process: int) -> None:
        """Let the namespace know this user, and the user nobody if this is root, whom no number of processes limits."""
        users = {os.geteuid(), bounded_child.NOBODY} if self._is_root else {os.geteuid()}
        groups = {os.getegid(), bounded_child.NOBODY} if self._is_root else {os.getegid()}
        if not self._is_root:
            Path(f"/proc/{process}/setgroups").write_text("deny")
        for name, members in (("uid_map", users), ("gid_map", groups)):
            Path(f"/proc/{process}/{name}").write_text("".join(f"{member} {member} 1\n" for member in sorted(members)))

    def _end(self, launcher: subprocess.Popen) -> None:
        if launcher.poll() is None and not self._isolated:
            # It ends what the program started, also what left its session.
            launcher.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout=10)
        if launcher.poll() is None:
            # The namespace ends with its first process, which is in this group.
            os.killpg(launcher.pid, signal.SIGKILL)

    def _outcome(self, ended_by: str | None) -> Outcome:
        limit = self._limits.output_bytes
        stdout = bytes(self._written["stdout"][:limit])
        stderr = bytes(self._written["stderr"][: limit - len(stdout)])
        output, errors = stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")
        code = self._result.get("exit_code")
        if code is None or ended_by == "output":
            seconds = time.monotonic() - (self._started or time.monotonic())
            return Outcome("output" if ended_by == "output" else "time", None, output, errors, seconds)
        ended: Any = "signal" if code < 0 else "exit"
        if code == -signal.SIGXCPU or (code < 0 and self._result["cpu_seconds"] >= self._limits.cpu_seconds):
            ended = "cpu"
        elif code == 1 and errors.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            ended = "memory"
        return Outcome(ended, code, output, errors, self._result["seconds"])

    def _request_file(self) -> Any:
        work = self._folder
        if not self._isolated:
            work = os.path.join(self._folder, "work")
            os.mkdir(work)
            if self._is_root:
                os.chmod(self._folder, 0o711)
                os.chown(work, bounded_child.NOBODY, bounded_child.NOBODY)
        request = {
            "isolated": self._isolated,
            "is_root": self._is_root,
            "limits": asdict(self._limits),
            "files": {**self._program.files, "main.py": self._program.code},
            "arguments": ["main.py"],
            "folder": work,
            "python": os.path.realpath(sys.executable),
            "readable": _python_paths(),
        }
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the caller
        file.write(json.dumps(request).encode())
        file.seek(0)
        return file

    def _stdin_file(self) -> Any:
        path = os.path.join(self._folder, "stdin")
        Path(path).write_text(self._program.stdin, encoding="utf-8", errors="surrogatepass", newline="")
        file = open(path, "rb")  # noqa: SIM115 - closed by the caller
        os.unlink(path)
        return file

    def _unavailable(self, reason: str) -> IsolationError:
        if self._isolated:
            return IsolationError([f"code cannot be isolated on this machine: {reason}"])
        who = " (started by root, it runs as the user nobody)" if self._is_root else ""
        return IsolationError([f"code cannot be run on this machine{who}: {reason}"])


@functools.cache
def _python_paths() -> list[str]:
    """What Python reads when it starts: itself, its standard library and shared libraries."""
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not those of a virtual environment
    standard = [sysconfig.get_path(name, vars=bases) for name in ("stdlib", "platstdlib")]
    libraries = [f"{prefix}/lib" for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    paths = [*libraries, *standard, *system, os.path.realpath(sys.executable)]
    found: list[str] = []
    for path in dict.fromkeys(paths):
        if os.path.exists(path) and not any(path == other or path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found
