"""Programs that nobody has read are bounded in time, memory, processes, output, files and network."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maxlm.runtime import bounded_child
from maxlm.runtime.bounded import IsolationError, Limits, Program, isolation_problem, run_program, run_programs

SHORT = Limits(seconds=30.0, cpu_seconds=2, memory_mb=256, processes=4, output_bytes=10_000, file_mb=1)

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="bounds are those of Linux")]
isolates = pytest.mark.skipif(
    sys.platform != "linux" or isolation_problem() is not None, reason="this machine does not permit namespaces"
)


def run(code, *, limits=SHORT, **program):
    return run_program(Program(code, **program), limits)


@isolates
def test_program_gets_input_and_files_and_gives_output_and_exit_code():
    code = "import sys, helper\nprint(helper.double(input()))\nprint('é', file=sys.stderr)\nsys.exit(7)"
    outcome = run(code, stdin="ab\n", files={"helper.py": "def double(x): return 2 * x"})
    assert (outcome.ended, outcome.exit_code, outcome.stdout, outcome.stderr) == ("exit", 7, "abab\n", "é\n")
    assert run("raise ValueError('no')").stderr.endswith("ValueError: no\n")
    assert run("import os; os.abort()").exit_code == -signal.SIGABRT


# What is tried, and how it ends.
BOUNDED = {
    "endless loop": ("while True: pass", {"cpu"}),
    "sleep": ("import time; time.sleep(1000)", {"time"}),
    "ignores signals": (
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except Exception: pass\n"
        "while True: pass",
        {"cpu"},
    ),
    "memory": ("x = bytearray(10**9)", {"memory"}),
    "memory, piece by piece": ("x = []\nwhile True: x.append(bytearray(10**6))", {"memory"}),
    "output flood": ("while True: print('x' * 1000)", {"output"}),
    "errors flood": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", {"time", "cpu"}),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        {"exit"},
    ),
    "deep recursion": ("def f(): f()\nf()", {"exit"}),
    "recursion without a limit": (
        "import sys; sys.setrecursionlimit(10**9)\nf = lambda x: repr(x)\nx = []\nfor _ in range(10**6): x = [x]\nf(x)",
        {"signal", "exit", "memory", "cpu"},
    ),
}


def limits_of(name):
    """Little wall time only for what uses no CPU time: on a busy machine the others take long."""
    seconds = 0.5 if name == "sleep" else 60.0
    return Limits(seconds=seconds, cpu_seconds=1, memory_mb=256, processes=4, output_bytes=10_000, file_mb=1)


@isolates
@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_end_a_program(name):
    code, expected = BOUNDED[name]
    outcome = run(code, limits=limits_of(name))
    assert outcome.ended in expected, outcome
    assert outcome.exit_code != 0
    assert len(outcome.stdout) + len(outcome.stderr) <= 10_000


@isolates
def test_number_of_processes_is_that_of_one_program():
    """Each runs in a namespace of its own: those of another do not count."""
    code = (
        "import os, time\nn = 0\n"
        "for _ in range(20):\n"
        "  try:\n    if os.fork() == 0: time.sleep(1); os._exit(0)\n    n += 1\n"
        "  except OSError: pass\n"
        "time.sleep(0.3); print(n)"
    )
    outcomes = run_programs([Program(code)] * 3, SHORT, workers=3)
    assert [outcome.stdout for outcome in outcomes] == ["3\n"] * 3


@isolates
def test_files_outside_are_neither_read_nor_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (tmp_path, Path(__file__), Path.home(), Path("/etc/passwd"), Path("/proc/self/environ"), Path("/sys")):
        outcome = run(f"import os; print(os.path.exists({str(path)!r}))")
        readable = str(path) == "/" or sys.base_prefix.startswith(f"{path}/")  # above the installation of Python
        assert outcome.stdout == ("True\n" if readable else "False\n"), path
    writes = [str(secret), str(tmp_path / "new"), "/new", "/dev/new", f"{sys.base_prefix}/lib/new", os.__file__]
    code = f"for path in {writes!r}:\n  try: open(path, 'a')\n  except OSError: continue\n  print('wrote', path)"
    outcome = run(code)
    assert (outcome.exit_code, outcome.stdout) == (0, ""), outcome
    assert secret.read_text() == "secret"
    assert not (tmp_path / "new").exists()


@isolates
def test_its_own_folder_is_empty_limited_and_removed():
    code = (
        "import os, tempfile\nprint(os.getcwd(), os.listdir('.'), tempfile.gettempdir())\n"
        "total = 0\n"
        "try:\n  for n in range(99):\n    total += open(str(n), 'wb').write(bytes(100_000))\n"
        "except OSError as e: print(e.strerror)\nprint(total <= 1 << 20)"
    )
    for _ in range(2):
        lines = run(code).stdout.splitlines()
        assert lines == ["/tmp ['main.py'] /tmp", "No space left on device", "True"]
    assert "File too large" in run("import os; open('f', 'wb').truncate(1 << 30)").stderr


@isolates
def test_no_network():
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        port = server.getsockname()[1]
        stack.callback(server.close)
        thread = threading.Thread(target=lambda: contextlib.suppress(OSError) and _accept(server, reached), daemon=True)
        thread.start()
        name = f"\0maxlm-{os.getpid()}"
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        local.bind(name)
        local.listen()
        code = (
            "import socket\n"
            f"for kind, place in ((2, ('127.0.0.1', {port})), (1, {name!r}), (2, ('10.0.0.1', 80))):\n"
            "  try:\n    s = socket.socket(kind); s.settimeout(1); s.connect(place); print('reached', place)\n"
            "  except OSError as e: print('no')\n"
        )
        assert run(code).stdout == "no\n" * 3
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            thread.join(5)
    assert reached == [1], "only the connection of this test"


def _accept(server, reached):
    with contextlib.suppress(OSError):
        server.accept()[0].close()
        reached.append(1)


@isolates
def test_other_processes_are_out_of_reach():
    """Also processes of the same user: not even their numbers are known."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        try:
            code = (
                "import os, signal\n"
                f"for pid in ({os.getpid()}, {os.getppid()}, {victim.pid}, os.getppid(), 1, -1):\n"
                "  try: os.kill(pid, signal.SIGKILL)\n  except OSError: pass\n"
                "print('done')"
            )
            outcome = run(code)
            assert victim.poll() is None
            assert outcome.ended in ("exit", "signal")
        finally:
            victim.kill()


@isolates
def test_daemons_end_with_their_program():
    marker, python = f"marker-{os.getpid()}", os.path.realpath(sys.executable)
    code = (
        "import os, sys, time\n"
        "for _ in range(2):\n"
        "  if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"      os.execv({python!r}, ['python', '-c', 'import time; time.sleep(60)', {marker!r}])\n"
        "    os._exit(0)\n"
        "time.sleep(0.2); print('left')"
    )
    outcome = run(code)
    assert (outcome.ended, outcome.stdout) == ("exit", "left\n")
    assert not [line for line in _command_lines() if marker in line]


def _command_lines():
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                yield (process / "cmdline").read_text(errors="replace")


@isolates
def test_it_has_no_privileges():
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(os.getuid() != 0, [libc.unshare(flag) for flag in (0x10000000, 0x40000000)],"
        " libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None), libc.chroot(b'/tmp'))\n"
        "try: os.setuid(0)\nexcept OSError: print('refused')\n"
        "print(sorted(os.environ), [n for n in range(3, 64) if os.path.exists(f'/proc/self/fd/{n}')])"
    )
    lines = run(code).stdout.splitlines()
    assert lines[1] == "refused"
    is_root = os.getuid() == 0
    assert lines[0].endswith(" -1 -1"), lines
    assert lines[0].startswith("True") or not is_root
    assert lines[2] == "['HOME', 'LANG', 'MALLOC_ARENA_MAX', 'PYTHONHASHSEED'] []"


@isolates
def test_programs_do_not_disturb_each_other():
    good = [Program(f"print({n})") for n in range(4)]
    bad = [Program(code) for code, _ in (BOUNDED["fork bomb"], BOUNDED["memory"], BOUNDED["output flood"])]
    limits = Limits(seconds=60.0, cpu_seconds=1, memory_mb=256, output_bytes=10_000)
    mixed = [program for pair in zip(good, bad) for program in pair] + good[3:]
    outcomes = run_programs(mixed, limits, workers=4)
    assert [outcomes[place].stdout for place in (0, 2, 4, 6)] == ["0\n", "1\n", "2\n", "3\n"]
    assert all(outcomes[place].exit_code != 0 for place in (1, 3, 5))


@isolates
def test_no_process_is_left_when_this_one_is_killed(tmp_path):
    code = (
        "from maxlm.runtime.bounded import *\n"
        "run_program(Program(\"print('x', flush=True)\\nimport time; time.sleep(60)\", files={'a': ''}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        children: set[int] = set()
        deadline = time.monotonic() + 30
        while len(children) < 3 and time.monotonic() < deadline:
            children = _descendants(process.pid)
            time.sleep(0.02)
        assert len(children) >= 3, "launcher, first process, program"
        process.kill()
    while (left := [pid for pid in children if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def _descendants(root):
    parents = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    found, level = set(), {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found |= level
    return found


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _nobody_may_run_python():
    """Started by root, a program without isolation runs as the user nobody."""
    return os.geteuid() != 0 or all(
        os.stat(path).st_mode & 0o005 == 0o005 for path in [*Path(os.path.realpath(sys.executable)).parents]
    )


def test_without_isolation_it_is_still_limited():
    if not _nobody_may_run_python():
        with pytest.raises(IsolationError, match=r"started by root, it runs as the user nobody\): .*Permission denied"):
            run_program(Program("print(1)"), SHORT, isolated=False)
        return
    for name, (code, expected) in BOUNDED.items():
        if "recursion" not in name:
            assert run_program(Program(code), limits_of(name), isolated=False).ended in expected, name
    daemon = (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)\n"
        "print('left')"
    )
    outcome = run_program(Program(daemon), limits_of("daemon"), isolated=False)
    assert (outcome.ended, outcome.stdout) == ("exit", "left\n")


def test_machine_without_namespaces_refuses(monkeypatch, tmp_path):
    """A launcher that asks for a namespace that does not exist gets the answer of a kernel without them."""
    text = Path(bounded_child.__file__).read_text()
    changed = tmp_path / "child.py"
    changed.write_text(text.replace("_NAMESPACES = 0x", "_NAMESPACES = -1 + 0 * 0x"))
    assert changed.read_text() != text
    monkeypatch.setattr(bounded_child, "__file__", str(changed))
    with pytest.raises(IsolationError, match=r"code cannot be isolated on this machine: unshare: Invalid argument"):
        run("print(1)")
