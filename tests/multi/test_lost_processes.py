"""A process of a run dies, or processes have different settings."""

import json
import shutil

import pytest
from processes import run_all, run_members, write_config

from maxlm.checkpoint.folder import find_checkpoint
from maxlm.errors import FaultError
from maxlm.train.metrics import read_metrics

pytestmark = pytest.mark.exhaustive


def test_killed_process_stops_the_others_and_supervisors_restart_all(tmp_path, tiny_data_folder):
    run = tmp_path / "run"
    config = write_config(tmp_path / "two.yaml", run, tiny_data_folder, mesh={"data": 2})
    supervised = ["--supervise", "3"]
    killed = ["--at", "8", "SIGKILL", "--once", str(tmp_path / "killed")]
    first, second = run_all([config] * 2, actions={0: supervised, 1: [*killed, *supervised]})

    [restart] = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert restart["exit_code"] == FaultError.exit_code
    # The save of step 6 begins when that of step 3 is complete, and may be interrupted itself.
    resumed = restart["step_resumed"]
    assert resumed in (3, 6)
    assert restart["step_reached"] in (7, 8)

    assert "process 1 (" in first.errors
    assert "lost: its connection closed" in first.errors
    reported = f"restart 1 of 3, from step {resumed}, in 0.1 s"
    assert f"training ended by the loss of a process, machine or storage; {reported}" in first.errors
    assert f"resuming {run} at step {resumed}" in first.errors
    assert f"training ended by signal SIGKILL; {reported}" in second.errors
    assert find_checkpoint(run).name == "10"
    assert read_metrics(run)[-1]["step"] == 10


def test_error_in_one_process_ends_all(tmp_path, tiny_data_folder):
    config = write_config(tmp_path / "two.yaml", tmp_path / "run", tiny_data_folder, mesh={"data": 2})
    first, second = run_members([config] * 2, actions={1: ["--at", "2", "raise"]})
    assert (first.code, second.code) == (FaultError.exit_code, FaultError.exit_code), first.errors
    assert "process 1 (" in first.errors
    assert "KeyError: 'planted'" in first.errors
    assert "Traceback" in second.errors
    assert "Traceback" not in first.errors


def test_differing_processes_are_named_before_training(tmp_path, tiny_data_folder, tiny_tokenizer_folder):
    """Two machines: one has another setting, and other data at the same path."""
    run = tmp_path / "run"
    machines = [tmp_path / "machine0", tmp_path / "machine1"]
    for machine in machines:
        shutil.copytree(tiny_data_folder, machine / "data")
    manifest = machines[1] / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    settings = {"mesh": {"data": 2}, "tokenizer": tiny_tokenizer_folder}
    same = write_config(tmp_path / "same.yaml", run, "data", **settings)
    other = write_config(tmp_path / "other.yaml", run, "data", **settings, seed=7)
    first, second = run_members([same, other], folders=machines)
    assert (first.code, second.code) == (2, 2), (first.errors, second.errors)
    assert "process 1 (" in first.errors
    assert "differs from process 0 (" in first.errors
    assert "in config seed (7, not 0), data data (" in first.errors
    assert not run.exists()
