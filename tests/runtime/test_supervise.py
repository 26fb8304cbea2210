"""A supervisor restarts training only after faults, not user errors. Its child here is a script."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from tiny_run import tiny_config

from maxlm.checkpoint.saving import local_folder
from maxlm.config.load import dump_yaml
from maxlm.runtime.storage import locked
from maxlm.runtime.supervise import last_logged_step, newest_anywhere, newest_step, supervise

# A fake trainer. Each start reads and removes the first line of the file `plan`: checkpoints to create, steps to log,
# and how to end: an exit code, or minus a signal number.
CHILD = """
import json, os, sys
from pathlib import Path
run = Path(sys.argv[1])
plan = run / "plan"
lines = plan.read_text().splitlines()
plan.write_text("\\n".join(lines[1:]))
checkpoint, logged, code = json.loads(lines[0])
if checkpoint:
    (run / "checkpoints" / str(checkpoint)).mkdir(parents=True)
(run / "checkpoints" / f"{checkpoint + 1}.orbax-checkpoint-tmp-0").mkdir(parents=True)
(run / "metrics.jsonl").write_text(json.dumps({"step": logged}) + "\\n" + '{"step": 9')
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def run(tmp_path):
    """Supervises a child that follows a plan; returns the exit code, the log, and the rest of the plan."""
    settings = {"processes": {"restart_seconds": 0.01, "restarts_without_progress": 2}}
    folder = tmp_path / "run"
    folder.mkdir()

    def run(plan, *, restarts):
        (folder / "plan").write_text("\n".join(map(json.dumps, plan)))
        config = tiny_config(folder, "no-data", **settings)
        code = supervise([sys.executable, "-c", CHILD, str(folder)], config, restarts=restarts)
        log = folder / "restarts.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return code, records, (folder / "plan").read_text().splitlines()

    return run


def test_supervisor_restarts_after_signal_fault_and_error_until_training_ends(run):
    code, records, left = run([[4, 6, -9], [8, 9, 3], [12, 12, 1], [0, 12, 0]], restarts=5)
    assert (code, left) == (0, [])
    reported = [(r["exit_code"], r["step_reached"], r["step_resumed"]) for r in records]
    assert reported == [(-9, 6, 4), (3, 9, 8), (1, 12, 12)]
    assert [record["reason"] for record in records] == [
        "signal SIGKILL",
        "the loss of a process, machine or storage",
        "an error",
    ]
    times = [record["time"] for record in records]
    assert times == sorted(times)
    assert time.time() - 60 < times[0] < time.time()


@pytest.mark.parametrize("code", [0, 2, 130])
def test_success_user_error_and_interrupt_end_the_supervisor(run, code):
    assert run([[4, 4, code], [8, 8, 0]], restarts=5) == (code, [], ["[8, 8, 0]"])


def test_number_of_restarts_is_limited(run, capfd):
    code, records, left = run([[1, 1, -9], [2, 2, -9], [3, 3, -15], [4, 4, 0]], restarts=2)
    assert (code, len(records), len(left)) == (128 + 15, 2, 1)
    assert "training ended by signal SIGTERM, after 2 restarts: not restarting" in capfd.readouterr().err


def test_supervisor_gives_up_without_progress(run, capfd):
    code, records, left = run([[4, 6, -9], [0, 6, 1], [0, 7, 1], [8, 8, 0]], restarts=9)
    assert (code, len(records), len(left)) == (1, 2, 1)
    assert "2 starts in a row got no further than step 4: not restarting" in capfd.readouterr().err


def test_unnamed_signal_is_reported_by_number(run):
    code, records, _ = run([[4, 4, -signal.SIGRTMIN - 1], [8, 8, 0]], restarts=5)
    assert (code, records[0]["reason"]) == (0, f"signal {signal.SIGRTMIN + 1}")


def test_unwritable_or_unreadable_logs_do_not_end_the_supervisor(run, tmp_path, capfd, monkeypatch):
    (tmp_path / "run" / "restarts.jsonl.tmp").mkdir()
    monkeypatch.setattr("maxlm.runtime.supervise.newest_step", lambda folder: 1 / 0)
    assert run([[1, 1, -9], [2, 2, 3], [3, 3, 1], [4, 4, 0]], restarts=9) == (0, [], [])
    reported = capfd.readouterr().err
    assert "restarts.jsonl lacks this restart: IsADirectoryError" in reported
    assert "the newest checkpoint cannot be determined: ZeroDivisionError" in reported


# Saves and ends on SIGTERM, as training does. os.write, because a signal may arrive during the other print.
TRAINER = """
import os, signal, sys, time
from maxlm.runtime.distributed import stop_with_parent
from maxlm.runtime.supervise import SUPERVISED
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"saved\\n"), os._exit(0)))
assert os.environ.pop(SUPERVISED)
stop_with_parent()
os.write(1, b"training\\n")
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_sigterm_is_passed_on_to_the_child(name, tmp_path):
    """As on preemption of a machine: the child saves, exits with 0, and is not restarted."""
    supervisor = tmp_path / "supervisor.py"
    supervisor.write_text(
        "import sys\n"
        "from tiny_run import tiny_config\n"
        "from maxlm.runtime.supervise import supervise\n"
        f"config = tiny_config({str(tmp_path / 'run')!r}, 'no-data')\n"
        f"sys.exit(supervise([sys.executable, '-c', {TRAINER!r}], config, restarts=9))\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [here.parents[1], here.parent, here]))}
    with subprocess.Popen(
        [sys.executable, str(supervisor)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(getattr(signal, name))
        # The child has this pipe too: it closes when both have ended.
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0 if name == "SIGTERM" else -9, "saved\n")


def test_run_folder_is_locked_until_its_process_ends_even_if_killed(tmp_path):
    holder = (
        "import sys, time; from etils import epath; from maxlm.runtime.storage import locked\n"
        "with locked(epath.Path(sys.argv[1]), seconds=0) as alone: print(alone, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "True\n"
        with locked(epath.Path(tmp_path), seconds=0.2) as alone:
            assert not alone
        process.kill()
        with locked(epath.Path(tmp_path), seconds=10) as alone:
            assert alone


def test_steps_are_read_from_folder_names_and_complete_lines(tmp_path):
    assert (newest_step(tmp_path), last_logged_step(tmp_path)) == (0, 0)
    for name in ("100", "20", "300.orbax-checkpoint-tmp-1", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 100}\n{"step": 110, "loss": 1.0}\n{"step": 12')
    assert (newest_step(tmp_path), last_logged_step(tmp_path)) == (100, 110)


def test_local_checkpoints_count_as_progress(tmp_path):
    base = tmp_path / "local"
    config = tiny_config(tmp_path / "run", "no-data", checkpoint={"every": 10, "local": {"folder": str(base)}})
    assert newest_anywhere(config) == 0
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    (local_folder(epath.Path(tmp_path / "run"), base) / "checkpoints" / "15").mkdir(parents=True)
    assert newest_anywhere(config) == 15


def test_user_error_on_the_command_line_is_reported_once_and_ends_the_supervisor(tmp_path):
    """The child is the same command without `--supervise`, including settings."""
    root = Path(__file__).parents[2]
    file = tmp_path / "train.yaml"
    file.write_text(dump_yaml(tiny_config(tmp_path / "run", tmp_path / "none")), encoding="utf-8")
    argv = [sys.executable, "-m", "maxlm.cli", "train", str(file), f"tokenizer={tmp_path}/absent", "--supervise", "3"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("maxlm:") == 1
    assert f"{tmp_path}/absent" in done.stderr
