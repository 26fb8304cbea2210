"""Run a trial in its own process."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from maxlm.config.load import dump_yaml
from maxlm.errors import DataError
from maxlm.runtime.manifest import read_manifest
from maxlm.runtime.storage import acquire
from maxlm.sweep.child import DIVERGED
from maxlm.sweep.records import Record, Status, finite
from maxlm.sweep.trials import Trial

# Polling interval of a running trial.
_POLL_SECONDS = 0.2
# Timeout for a stopping trial to save, and for an earlier sweep's last trial to end.
_STOP_SECONDS = 120.0


def run_trial(
    trial: Trial,
    *,
    environment: Mapping[str, str],
    lock: int,
    seconds: float | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Record:
    """Train in a separate process, resuming a run that is in the folder, and return the trial's record.

    Args:
      trial: its configuration is written next to its folder, so that `maxlm train` can repeat it.
      environment: of the process; the trial uses the accelerator, this process does not.
      lock: file descriptor of the sweep's lock, which the process holds until it exits.
      seconds: timeout of the trial.
      on_step: called with the step that the trial has reached.
    """
    folder = Path(trial.config.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config_file, log_file = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    config_file.write_text(dump_yaml(trial.config), encoding="utf-8")
    began = time.monotonic()
    with log_file.open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "maxlm.sweep.child", str(config_file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(environment),
            pass_fds=(lock,),
            start_new_session=True,
        )
        code = _wait(process, folder / "metrics.jsonl", began, seconds, on_step)
    elapsed = round(time.monotonic() - began, 2)
    log_text = log_file.read_bytes()[log_start:].decode("utf-8", "replace")
    status, valid, error = _outcome(trial, folder, code, log_text, seconds)
    return Record(
        id=trial.id,
        scale=trial.scale,
        setting=trial.setting,
        seed=trial.config.seed,
        steps=trial.config.steps,
        parameters=trial.size.parameters,
        tokens=trial.size.tokens,
        flops=trial.size.flops,
        status=status,
        valid=valid,
        since=trial.since,
        seconds=elapsed,
        error=error,
    )


def _wait(
    process: subprocess.Popen,
    metrics: Path,
    began: float,
    seconds: float | None,
    on_step: Callable[[int], None],
) -> int | None:
    """The exit code; None if the trial timed out."""
    try:
        while process.poll() is None:
            if seconds is not None and time.monotonic() - began > seconds:
                return None
            on_step(last_record(metrics).get("step", 0))
            time.sleep(_POLL_SECONDS)
        return process.returncode
    finally:
        # Also when this process is interrupted: end of input makes the trial save and stop.
        process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcome(
    trial: Trial, folder: Path, code: int | None, log: str, seconds: float | None
) -> tuple[Status, dict[str, float | None], str | None]:
    """Status, last validation, and the error, if any."""
    if code == 0:
        with contextlib.suppress(DataError):
            metrics = read_manifest(folder)["metrics"]
            if metrics["finished"] and metrics["steps"] == trial.config.steps:
                valid = finite(metrics["valid"])
                lost = next((name for name, value in valid.items() if value is None), None)
                return ("diverged", valid, f"{lost} is not finite") if lost else ("finished", valid, None)
        return "failed", {}, "was stopped from outside before its last step"
    if code is None:
        return "failed", {}, f"took longer than trial_seconds ({seconds:g} s)"
    if code < 0:
        return "failed", {}, f"was killed by signal {-code}" + (", perhaps out of memory" if code == -9 else "")
    message = (log.strip().splitlines() or [f"exit code {code}"])[-1].removeprefix("maxlm: ")
    return ("diverged" if code == DIVERGED else "failed"), {}, message


def last_record(path: Path) -> dict[str, Any]:
    """The last complete record of a metrics file; empty if there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    with contextlib.suppress(IndexError, ValueError):
        return json.loads(lines[-1])
    return {}


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[int]:
    """Lock the folder for this sweep and its trials; the lock is released with the last process that holds it.

    Raises:
      DataError: another sweep runs there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        waiting = f"{folder}: waiting for a trial of another sweep to end there"
        if not acquire(file, seconds=_STOP_SECONDS, waiting=waiting):
            raise DataError(f"{folder}: another sweep is running there; wait for it, or give another output")
        yield file.fileno()
