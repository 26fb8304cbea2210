"""Restart training from its last complete checkpoint when it dies: `maxlm train --supervise N`.

Each machine of a run has its own supervisor. A process that dies takes the others down within seconds, all supervisors
restart theirs, and these connect as they did the first time.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from maxlm.config.train import TrainConfig
from maxlm.errors import BUG_EXIT_CODE, FaultError
from maxlm.runtime.distributed import find_cluster
from maxlm.runtime.progress import console
from maxlm.runtime.storage import LineLog, is_remote, storage_path

FILE_NAME = "restarts.jsonl"
# Names the run's folder among the local checkpoints: a run started from scratch must not find those of an old one.
LOCAL_ID_FILE = "local_checkpoints.txt"
# Set for a child process, whose standard input is then a pipe that closes when the supervisor ends.
SUPERVISED = "MAXLM_SUPERVISED"
_UNCAUGHT = 1
_LONGEST_WAIT = 60.0


def supervise(command: Sequence[str], config: TrainConfig, *, restarts: int) -> int:
    """Run `command`, which trains with `config`, and restart it when it dies.

    It dies by a signal, by a bug, or because another process, a machine or the storage is lost. A user error (2) and an
    interrupt (130) end the supervisor too. SIGTERM and Ctrl-C are passed on as SIGTERM: training saves and ends.

    Args:
      command: program and arguments.
      config: its run folder gets a line in `restarts.jsonl` for each restart.
      restarts: maximum number of restarts.

    Returns:
      The exit code of the last run; 128 + N if signal N ended it.
    """
    settings, run_folder = config.processes, storage_path(config.output)
    cluster = find_cluster(settings.start_timeout_seconds)
    writes = cluster is None or cluster.process == 0
    child: subprocess.Popen | None = None
    stopping = False

    def stop(number, frame):
        nonlocal stopping
        stopping = True
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    started, idle = 0, 0
    newest = _ignore_errors("the newest checkpoint cannot be determined", newest_anywhere, config) or 0
    try:
        while True:
            # Its input closes when this process ends in any way: then it saves and stops.
            with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, SUPERVISED: "1"}) as child:
                if stopping:
                    child.send_signal(signal.SIGTERM)
                code = child.wait()
            ended = time.time()
            if stopping or (code >= 0 and code not in (FaultError.exit_code, BUG_EXIT_CODE, _UNCAUGHT)):
                return _exit_code(code)
            found = _ignore_errors("the newest checkpoint cannot be determined", newest_anywhere, config)
            if found is not None:
                idle = 0 if found > newest else idle + 1
                newest = found
            why = f"training ended by {_reason(code)}"
            if started == restarts:
                _print(f"{why}, after {started} restarts: not restarting")
                return _exit_code(code)
            if idle == settings.restarts_without_progress:
                _print(f"{why}, and {idle} starts in a row got no further than step {newest}: not restarting")
                return _exit_code(code)
            started += 1
            wait = min(settings.restart_seconds * 2 ** max(idle - 1, 0), _LONGEST_WAIT)
            if writes or code < 0:
                _print(f"{why}; restart {started} of {restarts}, from step {newest}, in {wait:g} s")
            if writes:
                record = {"time": ended, "exit_code": code, "reason": _reason(code), "step_resumed": newest}
                _ignore_errors(f"{run_folder / FILE_NAME} lacks this restart", _append, run_folder, record)
            _sleep(wait, lambda: stopping)
            if stopping:
                return _exit_code(code)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def newest_step(run_folder: str | os.PathLike) -> int:
    """The step of the newest complete checkpoint, by folder names alone; 0 if there is none."""
    checkpoints = storage_path(run_folder) / "checkpoints"
    if not checkpoints.is_dir():
        return 0
    whole = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    if is_remote(run_folder):
        # A bucket has no atomic rename; Orbax marks complete checkpoints.
        whole = [path for path in whole if (path / "commit_success.txt").exists()]
    return max((int(path.name) for path in whole), default=0)


def newest_anywhere(config: TrainConfig) -> int:
    """The newest step in the run folder and on the local disk."""
    run_folder, local = storage_path(config.output), config.checkpoint.local
    steps = [newest_step(run_folder)]
    if local is not None and (name := local_id(run_folder)) is not None:
        steps.append(newest_step(storage_path(local.folder) / name))
    return max(steps)


def local_id(run_folder: epath.Path) -> str | None:
    """The name of the run's folder among the local checkpoints; None if there is no complete one."""
    file = run_folder / LOCAL_ID_FILE
    name = file.read_bytes().decode("utf-8", "replace").strip() if file.exists() else ""
    # An empty name would be the parent folder, which may contain other files of the user.
    return name if re.fullmatch(r"[^/\\\n]*-[0-9a-f]{16}", name) else None


def last_logged_step(run_folder: epath.Path) -> int:
    """The last step in `metrics.jsonl`; 0 if there is none."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # The last line may be truncated.
    return max((json.loads(line)["step"] for line in lines[-2:] if line.endswith("}")), default=0)


def _append(run_folder: epath.Path, record: dict) -> None:
    record = {**record, "step_reached": max(record["step_resumed"], last_logged_step(run_folder))}
    run_folder.mkdir(parents=True, exist_ok=True)
    LineLog(run_folder / FILE_NAME).append(json.dumps(record))


def _ignore_errors(what: str, action: Callable[..., Any], *arguments) -> Any:
    """`action(*arguments)`; None, and a line on the console, if it fails: training does not need it."""
    try:
        return action(*arguments)
    # Each kind of storage has its own errors.
    except Exception as error:
        _print(f"{what}: {type(error).__name__}: {error}")
        return None


def _sleep(seconds: float, stopped) -> None:
    deadline = time.monotonic() + seconds
    while not stopped() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _reason(code: int) -> str:
    if code < 0:
        named = -code in {number.value for number in signal.Signals}
        return f"signal {signal.Signals(-code).name if named else -code}"
    return "the loss of a process, machine or storage" if code == FaultError.exit_code else "an error"


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _print(text: str) -> None:
    console.print(f"maxlm: {text}", markup=False, highlight=False)
