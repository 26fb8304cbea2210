"""Transient storage errors, and checkpoints in two places."""

import errno
import os
import shutil
import sys
import time

import pytest
from etils import epath
from test_checkpoint import assert_equal, make_small_state
from tiny_run import tiny_config
from toy_run import ToyData, toy_run, weights

from maxlm.checkpoint.checkpointer import Checkpointer, restore_newest
from maxlm.checkpoint.folder import find_checkpoint
from maxlm.checkpoint.saving import RunCheckpoints
from maxlm.cli import main
from maxlm.config.fault import CheckpointConfig
from maxlm.config.load import dump_yaml
from maxlm.errors import CheckpointError, FaultError, TrainingError
from maxlm.runtime.retry import Retries, is_disk_full, is_storage_error, storage_faults
from maxlm.runtime.supervise import LOCAL_ID_FILE
from maxlm.train.metrics import read_metrics

QUICK = {"retries": 3, "retry_seconds": 0.01}


class FailingDisk:
    """Makes file operations under a folder fail with real errors, for any caller, a few times or forever."""

    def __init__(self, folder):
        self._folder = str(folder)
        self._operation, self._where, self._error, self._left = "", "", None, 0
        self.failures = 0
        # Audit hooks run before an operation and cannot be removed.
        sys.addaudithook(self._before)

    def fail(self, operation: str, error: Exception, *, times: int, where: str = ""):
        self._operation, self._where, self._error, self._left = operation, where, error, times

    def _before(self, event: str, arguments: tuple) -> None:
        if self._left and event == self._operation and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if path.startswith(self._folder) and self._where in path:
                self._left -= 1
                self.failures += 1
                raise self._error


@pytest.fixture
def disk(tmp_path):
    disk = FailingDisk(tmp_path)
    yield disk
    disk.fail("", None, times=0)


@pytest.fixture
def waits(monkeypatch):
    """Records sleep durations without sleeping."""
    slept = []
    monkeypatch.setattr("maxlm.runtime.retry.time.sleep", slept.append)
    return slept


def io_error():
    return OSError(errno.EIO, "Input/output error")


def test_retry_waits_double_with_jitter(waits):
    def fails():
        raise io_error()

    for _ in range(20):
        with pytest.raises(OSError, match="Input/output"):
            Retries(4, 2.0).call(fails, "it")
    assert len(waits) == 80
    for attempt in range(4):
        of_attempt = waits[attempt::4]
        assert 2**attempt <= min(of_attempt) < max(of_attempt) <= 3 * 2**attempt
        assert len(set(of_attempt)) == 20


@pytest.mark.parametrize(
    ("error", "is_storage", "is_full"),
    [
        (io_error(), True, False),
        (PermissionError(errno.EACCES, "Permission denied"), True, False),
        (TimeoutError("timed out"), True, False),
        (ConnectionResetError("reset"), True, False),
        (ValueError("UNAVAILABLE: Error reading gs://bucket/key"), True, False),
        (ValueError("DEADLINE_EXCEEDED: 503"), True, False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False, False),
        (ValueError("NOT_FOUND: Error opening zarr array"), False, False),
        (ValueError("DATA_LOSS: checksum"), False, False),
        (OSError(errno.ENOSPC, "No space left on device"), True, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True, True),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), False, True),
    ],
)
def test_errors_are_classified(error, is_storage, is_full):
    assert is_storage_error(error) == is_storage
    assert is_disk_full(error) == is_full
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert is_storage_error(wrapped) == is_storage
    assert is_disk_full(wrapped) == is_full


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET])
def test_unreachable_storage_is_a_fault(number):
    reported = r"^/disk/metrics\.jsonl: cannot be read or written: .*; run the same command"
    with pytest.raises(FaultError, match=reported), storage_faults():
        raise OSError(number, os.strerror(number), "/disk/metrics.jsonl")


@pytest.mark.parametrize(
    "number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT]
)
def test_bad_path_permissions_and_full_disk_are_user_errors(number):
    error = OSError(number, os.strerror(number), "/disk/metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl") as raised, storage_faults():
        raise error
    assert raised.value is error


def test_failed_append_to_a_log_asks_for_a_restart(disk, tmp_path, tiny_data_folder, capsys):
    run, config = tmp_path / "run", tmp_path / "train.yaml"
    config.write_text(dump_yaml(tiny_config(run, tiny_data_folder, eval_every=0, log_every=2)), encoding="utf-8")
    disk.fail(
        "open", OSError(errno.EIO, "Input/output error", str(run / "metrics.jsonl")), times=1, where="metrics.jsonl"
    )
    assert main(["train", str(config)]) == FaultError.exit_code
    assert capsys.readouterr().err.endswith(
        f"maxlm: {run}/metrics.jsonl: cannot be read or written: Input/output error;"
        " run the same command to resume when the storage is available again\n"
    )
    assert disk.failures == 1
    assert main(["train", str(config)]) == 0
    assert [record["step"] for record in read_metrics(run) if "loss" in record][-1] == 12


# In the order of a save: at its start, while writing in the background, when finalizing, when removing the previous
# checkpoint.
PLACES = [
    ("os.mkdir", "2.orbax-checkpoint-tmp"),
    ("open", "_METADATA"),
    ("open", "commit_success.txt"),
    ("os.rename", "weights.orbax"),
    ("os.rename", "2.orbax-checkpoint-tmp"),
    ("shutil.rmtree", "checkpoints/1"),
]


@pytest.mark.parametrize(("operation", "where"), PLACES)
def test_failing_save_is_reported_and_retried(operation, where, disk, tmp_path, capsys):
    with Checkpointer(tmp_path, keep=1, **QUICK) as checkpointer:
        checkpointer.save(make_small_state(1), {}, wait=True)
        disk.fail(operation, io_error(), times=2, where=where)
        checkpointer.save(make_small_state(2), {"note": "two"}, wait=True)
    # Files that could not be removed stay until the next save, and the new checkpoint is valid.
    assert disk.failures == (1 if operation == "shutil.rmtree" else 2)
    reported = capsys.readouterr().err
    assert "saving a checkpoint failed (" in reported
    assert "Input/output error" in reported
    assert "retrying in" in reported
    assert "(1 of 3)" in reported
    with Checkpointer(tmp_path, keep=1, **QUICK) as checkpointer:
        restored, metadata = checkpointer.restore(make_small_state(0))
    assert_equal(restored, make_small_state(2))
    assert metadata["note"] == "two"


def test_save_that_fails_after_all_retries_is_an_error(disk, tmp_path, capsys):
    with Checkpointer(tmp_path, keep=2, **QUICK) as checkpointer:
        checkpointer.save(make_small_state(1), {}, wait=True)
        disk.fail("os.mkdir", io_error(), times=10**6)
        with pytest.raises(TrainingError) as error:
            checkpointer.save(make_small_state(2), {}, wait=True)
    assert "a checkpoint could not be saved: [Errno 5] Input/output error" in str(error.value)
    assert "the newest complete checkpoint is of step 1; run the same command to resume from there" in str(error.value)
    assert capsys.readouterr().err.count("retrying") == 3


def test_full_disk_is_not_retried(disk, tmp_path, capsys):
    with Checkpointer(tmp_path, keep=2, **QUICK) as checkpointer:
        disk.fail("os.mkdir", OSError(errno.ENOSPC, "No space left on device"), times=10**6)
        with pytest.raises(
            TrainingError, match="could not be saved: the disk is full; there is no complete checkpoint yet"
        ):
            checkpointer.save(make_small_state(1), {}, wait=True)
    assert "retrying" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "raised"),
    [(io_error(), FaultError), (OSError(errno.ENOSPC, "No space left on device"), TrainingError)],
)
def test_failure_to_start_a_save_with_several_processes_asks_for_a_restart(
    error, raised, tmp_path, monkeypatch, capsys
):
    """The others wait for it, so it cannot retry. The exit code makes a supervisor restart it."""

    def start(self, state, metadata):
        # Not earlier, because there is no other process to agree with.
        patch.setattr("jax.process_count", lambda: 2)
        raise error

    with Checkpointer(tmp_path, keep=2, **QUICK) as checkpointer, monkeypatch.context() as patch:
        checkpointer.save(make_small_state(1), {}, wait=True)
        patch.setattr(Checkpointer, "_start", start)
        with pytest.raises(raised, match=r"could not be saved: .*; the newest complete checkpoint is of step 1;"):
            checkpointer.save(make_small_state(2), {})
    assert (FaultError.exit_code, TrainingError.exit_code) == (3, 2)
    assert "retrying" not in capsys.readouterr().err


def test_failing_restore_is_retried(disk, tmp_path, capsys):
    with Checkpointer(tmp_path, keep=2, **QUICK) as checkpointer:
        checkpointer.save(make_small_state(1), {}, wait=True)
    with Checkpointer(tmp_path, keep=2, **QUICK) as checkpointer:
        disk.fail("open", PermissionError(errno.EACCES, "Permission denied"), times=2, where="metadata")
        restored, _ = checkpointer.restore(make_small_state(0))
    assert disk.failures == 2
    assert_equal(restored, make_small_state(1))
    assert "reading it failed ([Errno 13] Permission denied); retrying in" in capsys.readouterr().err


def test_unreadable_checkpoint_is_not_treated_as_corrupt(disk, tmp_path):
    with Checkpointer(tmp_path, keep=2, **QUICK) as checkpointer:
        for step in (1, 2):
            checkpointer.save(make_small_state(step), {}, wait=True)
    with Checkpointer(tmp_path, keep=2, **QUICK) as checkpointer:
        disk.fail("open", io_error(), times=10**6, where="metadata")
        with pytest.raises(
            CheckpointError, match=r"cannot be read: .*; nothing was changed: run the same command when"
        ):
            checkpointer.restore(make_small_state(0))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert not list(tmp_path.glob("broken*"))


def test_run_continues_after_a_failed_background_save(disk, tmp_path, capsys):
    """It saves again at once, not when the next checkpoint is due."""
    uninterrupted = toy_run(tmp_path / "uninterrupted")

    def slow(number):
        # Give background saves time to finish.
        time.sleep(0.1)
        if number == 2:
            disk.fail("os.rename", io_error(), times=1, where="4.orbax-checkpoint-tmp")

    checkpoint = {"every": 4, "keep": 9, **QUICK}
    result = toy_run(tmp_path / "run", data=ToyData(at_batch=slow), checkpoint=checkpoint, log_every=1)
    assert weights(result) == weights(uninterrupted)
    assert disk.failures == 1
    assert "saving a checkpoint failed" in capsys.readouterr().err
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 4 < steps[0] < 8
    assert steps[1:] == [8, 12]


LOCAL = {"every": 6, "keep": 2, "local": {"folder": "", "every": 2, "keep": 1}}


class Crash(BaseException):
    pass


def run_with_local(folder, local, *, crash=None, **settings):
    def at_batch(number):
        # Give background saves time to finish.
        time.sleep(0.1)
        if number == crash:
            raise Crash

    checkpoint = {**LOCAL, "local": {**LOCAL["local"], "folder": str(local)}}
    return toy_run(folder, data=ToyData(at_batch=at_batch), checkpoint=checkpoint, **settings)


def test_run_resumes_from_the_newer_of_two_places(tmp_path, capsys):
    uninterrupted = toy_run(tmp_path / "uninterrupted")
    with pytest.raises(Crash):
        run_with_local(tmp_path / "run", tmp_path / "disk", crash=11)
    assert find_checkpoint(tmp_path / "run").name == "6"
    assert [path.name for path in (tmp_path / "disk").glob("*/checkpoints/*")] == ["10"]
    result = run_with_local(tmp_path / "run", tmp_path / "disk")
    assert result.start == 10
    assert weights(result) == weights(uninterrupted)
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record][-1] == 12
    # The last step is saved in the run folder, and the local checkpoints are removed.
    assert find_checkpoint(tmp_path / "run").name == "12"
    assert list((tmp_path / "disk").iterdir()) == []


def test_losing_the_local_disk_only_costs_steps(tmp_path):
    with pytest.raises(Crash):
        run_with_local(tmp_path / "run", tmp_path / "disk", crash=11)
    shutil.rmtree(tmp_path / "disk")
    result = run_with_local(tmp_path / "run", tmp_path / "disk")
    assert result.start == 6
    assert weights(result) == weights(toy_run(tmp_path / "uninterrupted"))


def test_corrupt_local_checkpoint_falls_back_to_the_run_folder(tmp_path, capsys):
    with pytest.raises(Crash):
        run_with_local(tmp_path / "run", tmp_path / "disk", crash=11)
    [checkpoint] = (tmp_path / "disk").glob("*/checkpoints/10")
    shutil.rmtree(checkpoint / "rest")
    result = run_with_local(tmp_path / "run", tmp_path / "disk")
    assert "checkpoint 10 is corrupt" in capsys.readouterr().err
    assert result.start == 6


def test_run_started_from_scratch_ignores_old_local_checkpoints(tmp_path):
    with pytest.raises(Crash):
        run_with_local(tmp_path / "run", tmp_path / "disk", crash=11)
    shutil.rmtree(tmp_path / "run")
    assert run_with_local(tmp_path / "run", tmp_path / "disk").start == 0


def test_run_killed_at_its_end_removes_local_checkpoints_on_restart(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "remove_local", lambda self, step: None)
        run_with_local(tmp_path / "run", tmp_path / "disk")
    assert list((tmp_path / "disk").iterdir())
    assert run_with_local(tmp_path / "run", tmp_path / "disk").start == 12
    assert list((tmp_path / "disk").iterdir()) == []


def test_local_checkpoints_are_kept_if_the_run_folder_lacks_their_step(tmp_path):
    """Such as a run that was killed, and whose `steps` was then reduced to the steps it had done."""
    with pytest.raises(Crash):
        run_with_local(tmp_path / "run", tmp_path / "disk", crash=11)
    assert run_with_local(tmp_path / "run", tmp_path / "disk", steps=10).start == 10
    assert [path.name for path in (tmp_path / "disk").glob("*/checkpoints/*")] == ["10"]


def test_failed_local_save_does_not_fail_a_saved_run(disk, tmp_path, capsys):
    disk.fail("os.rename", io_error(), times=10**6, where="10.orbax-checkpoint-tmp")
    result = run_with_local(tmp_path / "run", tmp_path / "disk")
    assert (result.steps, find_checkpoint(tmp_path / "run").name) == (12, "12")
    assert disk.failures
    assert "a checkpoint could not be saved: [Errno 5]" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "\n", "..", "run-0123", "a/run-0123456789abcdef"])
def test_truncated_local_checkpoint_id_is_ignored(text, tmp_path):
    """An empty id would name the parent folder, where the user has other files: those stay."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    for folder in (run, disk):
        folder.mkdir()
    (run / LOCAL_ID_FILE).write_text(text)
    (disk / "precious").write_text("")
    config = CheckpointConfig(local={"folder": str(disk), "every": 1})
    (run / "checkpoints" / "1").mkdir(parents=True)
    with RunCheckpoints(epath.Path(run), config) as checkpoints:
        assert [path.parent.parent for path in disk.glob("run-*/checkpoints")] == [disk]
        (run / LOCAL_ID_FILE).write_text(text)
        checkpoints.remove_local(1)
    assert len(list(disk.iterdir())) == 2
    with RunCheckpoints(epath.Path(run), config) as checkpoints:
        checkpoints.remove_local(1)
    assert (disk / "precious").exists()
    assert len(list(disk.iterdir())) == 2


def test_newest_checkpoint_wins_and_ties_go_to_the_run_folder(tmp_path):
    with Checkpointer(tmp_path / "a", keep=3, **QUICK) as a, Checkpointer(tmp_path / "b", keep=3, **QUICK) as b:
        for place, name, steps in ((a, "a", (1, 3)), (b, "b", (2, 3))):
            for step in steps:
                place.save(make_small_state(step), {"place": name}, wait=True)
        _, metadata = restore_newest([a, b], make_small_state(0))
        assert metadata["place"] == "a"
        b.save(make_small_state(4), {"place": "b"}, wait=True)
        restored, metadata = restore_newest([a, b], make_small_state(0))
        assert metadata["place"] == "b"
        assert_equal(restored, make_small_state(4))
