"""The other side of `bounded.py`: confines itself, then executes a program. Runs as a script; standard library only.

Three processes: the launcher unshares the namespaces; its child, the first process in them, builds the file system and
reaps; its child becomes the program. The kernel ends all in the namespace when the first process ends.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import socket
import sys
import time

# linux/sched.h, linux/mount.h, linux/prctl.h
_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mnt uts ipc user pid net
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
# Flags of a mount that a user namespace must keep: those of statvfs, and of mount.
_KEPT = {1: _RDONLY, 2: _NOSUID, 4: _NODEV, 8: _NOEXEC, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_SET_DEATH_SIGNAL, _DROP_BOUND, _SET_SUBREAPER, _NO_NEW_PRIVILEGES = 1, 24, 36, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}

NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)


def main(control_number: int, request_number: int) -> None:
    """Both are inherited file descriptors."""
    control = socket.socket(fileno=control_number)
    control.set_inheritable(False)
    with os.fdopen(request_number, "rb") as file:
        request = json.load(file)
    os.umask(0o022)
    try:
        _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if request["isolated"]:
            _launch_isolated(request, control)
        else:
            _launch_limited(request, control)
    except OSError as error:
        _send(control, error=f"{error.filename or 'a system call'}: {error.strerror}")


def _launch_isolated(request: dict, control: socket.socket) -> None:
    _call("unshare", _NAMESPACES)
    _send(control, unshared=True)
    control.recv(1)  # until the parent has mapped the users
    first = os.fork()
    if first == 0:
        try:
            _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
            with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
                file.write("0")  # no namespaces within, whose privileges would widen what the program reaches
            _build_root(request)
            _run(request, control, folder="/tmp", extra_processes=0 if request["is_root"] else 2)
        except OSError as error:
            _send(control, error=f"{error.filename or 'a system call'}: {error.strerror}")
        finally:
            os._exit(0)
    os.waitpid(first, 0)


def _launch_limited(request: dict, control: socket.socket) -> None:
    """Without namespaces: adopt what the program leaves behind, and end it."""
    _libc.prctl(_SET_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: _end_descendants(os._exit, 0))
    user = NOBODY if request["is_root"] else os.getuid()
    _run(request, control, folder=request["folder"], extra_processes=_num_tasks(user))
    _end_descendants()


def _run(request: dict, control: socket.socket, *, folder: str, extra_processes: int) -> None:
    """Execute the program and report how it ended."""
    for name, text in request["files"].items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as file:
            file.write(text)
    _send(control, started=True)
    start = time.monotonic()
    program = os.fork()
    if program == 0:
        try:
            _become_program(request, folder, extra_processes)
        except OSError as error:
            _send(control, error=f"{error.filename or 'a system call'}: {error.strerror}")
        finally:
            os._exit(127)
    while True:
        process, status, usage = os.wait4(-1, 0)
        if process == program:
            break
    seconds = time.monotonic() - start
    code = os.waitstatus_to_exitcode(status)
    _send(control, exit_code=code, seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime)


def _become_program(request: dict, folder: str, extra_processes: int) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # in an isolated process there is no /proc any more
    os.setpgid(0, 0)
    os.chdir(folder)
    limits = request["limits"]
    memory, file_bytes = limits["memory_mb"] << 20, limits["file_mb"] << 20
    cpu = int(limits["cpu_seconds"])
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    for capability in range(64):
        _libc.prctl(_DROP_BOUND, capability, 0, 0, 0)
    if request["is_root"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # After the change of users, which would count the processes of root.
    processes = limits["processes"] + extra_processes
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    environment = {"HOME": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    os.execve(request["python"], ["python", "-s", "-S", "-B", "-X", "utf8", *request["arguments"]], environment)


def _build_root(request: dict) -> None:
    """Replace the file system by an empty one with the Python installation, read-only, and a folder /tmp in memory."""
    root = request["folder"]
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    os.mkdir(f"{root}/dev")
    # Before the others: Python may be installed below /tmp.
    size = request["limits"]["file_mb"]
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={size}m,nr_inodes=1024,mode=1777")
    for path in request["readable"]:
        _bind(path, root + path, _RDONLY | _NOSUID | _NODEV)
    for name in ("null", "zero", "urandom"):
        _bind(f"/dev/{name}", f"{root}/dev/{name}", _NOSUID | _NOEXEC)
    _mount(None, root, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    _call("syscall", _PIVOT_ROOT[platform.machine()], b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/")


def _bind(source: str, target: str, flags: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(source, target, None, _BIND | _REC)
    has = os.statvfs(target).f_flag
    kept = sum(flag for bit, flag in _KEPT.items() if has & bit)
    _mount(None, target, None, _REMOUNT | _BIND | flags | kept)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3], what=f"mount of {target}")


def _call(name: str, *arguments, what: str | None = None) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what or name)


def _end_descendants(then=None, *arguments) -> None:
    """Kill every descendant, stopped first so that none starts others meanwhile."""
    while descendants := _descendants():
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in descendants:
                with contextlib.suppress(OSError):
                    os.kill(process, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)
    if then is not None:
        then(*arguments)


def _descendants() -> list[int]:
    """Processes below this one that are no zombies waiting for their parent."""
    parents = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            parents[int(process)] = (int(parent), state)
    found, level = [], {os.getpid()}
    while level:
        level = {process for process, (parent, _) in parents.items() if parent in level}
        found += [process for process in level if parents[process][1] != "Z" or parents[process][0] == os.getpid()]
    return found


def _num_tasks(user: int) -> int:
    """Threads of a user, which the kernel counts together outside of namespaces."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == user:
                count += len(os.listdir(f"/proc/{process}/task"))
    return count


def _send(control: socket.socket, **message) -> None:
    # The parent may have gone.
    with contextlib.suppress(OSError):
        control.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
