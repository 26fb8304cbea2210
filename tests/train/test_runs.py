"""Runs from a configuration to a finished folder, and recovery of killed runs."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from tiny_run import tiny_config, train_process

from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.interop.load import load_model
from maxlm.runtime.manifest import manifest_chain, read_manifest
from maxlm.runtime.storage import locked
from maxlm.train import run
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train

# Values in which two equal runs may differ.
TIMING = ("time", "tokens_per_second", "data_wait", "goodput")


def parameters(folder) -> dict[str, np.ndarray]:
    return flatten(jax.device_get(load_model(folder)[0]))


def records(folder) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMING} for record in read_metrics(folder)]


def assert_same_run(folder, other):
    for path, value in parameters(folder).items():
        np.testing.assert_array_equal(value, parameters(other)[path], err_msg=path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_data_folder):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = train_process(tiny_config(folder, tiny_data_folder))
    assert result.returncode == 0, result.stderr
    return folder


def test_run_folder_is_complete(uninterrupted, tiny_data_folder):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        *("config.yaml", "manifest.json", "metrics.jsonl", "goodput.jsonl", ".lock"),
        *("tensorboard", "checkpoints", "tokenizer"),
    }
    assert list((uninterrupted / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["12", "8"]
    manifest = read_manifest(uninterrupted)
    assert manifest["stage"] == "train/pretrain"
    assert manifest["metrics"]["steps"] == 12
    assert manifest["metrics"]["finished"]
    assert manifest["metrics"]["valid"]["bits_per_byte"] > 0
    assert [link["stage"] for link in manifest_chain(uninterrupted)][-1] == "train/pretrain"
    assert "data" in [link["stage"] for link in manifest_chain(uninterrupted)]


def test_metrics_record_every_window_and_validation(uninterrupted):
    train = [record["step"] for record in records(uninterrupted) if "loss" in record]
    valid = [record["step"] for record in records(uninterrupted) if "valid_loss" in record]
    assert {3, 6, 9, 12} <= set(train)
    assert valid == [6, 12]
    losses = [record["loss"] for record in records(uninterrupted) if "loss" in record]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [3, 10])
def test_killed_run_resumes_to_the_same_result(step, uninterrupted, tmp_path, tiny_data_folder):
    """Killed before the first checkpoint, and between two: weights and metrics match an uninterrupted run."""
    config = tiny_config(tmp_path / "run", tiny_data_folder)
    killed = train_process(config, signal_at=("SIGKILL", step))
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()
    resumed = train_process(config)
    assert resumed.returncode == 0, resumed.stderr
    assert ("resuming" in resumed.stderr) == (step > 4)
    assert_same_run(tmp_path / "run", uninterrupted)
    assert records(tmp_path / "run") == records(uninterrupted)


@pytest.mark.slow
def test_signal_saves_and_exits_cleanly(uninterrupted, tmp_path, tiny_data_folder):
    config = tiny_config(tmp_path / "run", tiny_data_folder)
    stopped = train_process(config, signal_at=("SIGTERM", 6))
    assert stopped.returncode == 0, stopped.stderr
    assert "step 6 is saved" in stopped.stderr
    assert "stopped" in stopped.stdout
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["metrics"]["steps"], manifest["metrics"]["finished"]) == (6, False)
    resumed = train_process(config)
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 6" in resumed.stderr
    assert_same_run(tmp_path / "run", uninterrupted)
    steps = [record["step"] for record in records(tmp_path / "run") if "loss" in record]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_finished_run_is_unchanged_by_rerun(uninterrupted, tiny_data_folder):
    """Running the command again neither trains nor loses metrics."""
    before = (uninterrupted / "manifest.json").read_text(), (uninterrupted / "metrics.jsonl").read_text()
    again = train_process(tiny_config(uninterrupted, tiny_data_folder))
    assert again.returncode == 0, again.stderr
    assert ((uninterrupted / "manifest.json").read_text(), (uninterrupted / "metrics.jsonl").read_text()) == before
    assert "12 of 12 steps, finished" in again.stdout


def test_run_in_use_by_another_process_is_rejected(uninterrupted, tiny_data_folder, monkeypatch):
    monkeypatch.setattr(run, "_ENDING_SECONDS", 0.1)
    wanted = rf"{uninterrupted}: another process is training there; wait until it ends"
    with locked(epath.Path(uninterrupted), seconds=0), pytest.raises(CheckpointError, match=wanted):
        train(tiny_config(uninterrupted, tiny_data_folder))


def test_metrics_are_json_lines(uninterrupted):
    for line in (uninterrupted / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] >= 1
