"""Real sweeps of a tiny model: killed and resumed, with trials that diverge, crash or hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from xla_flags import one_device

from maxlm.cli import main
from maxlm.config import load_config, parse_config
from maxlm.errors import CheckFailed, ConfigError
from maxlm.runtime.manifest import read_manifest
from maxlm.sweep.records import Record
from maxlm.sweep.run import check_metric, run_sweep
from maxlm.train.metrics import read_metrics

# Run by every Python process at start: kills trials with a marked learning rate, like the OOM killer.
SITE = """\
import os, sys
if "maxlm.sweep.child" in sys.orig_argv and "\\n  learning_rate: 0.02\\n" in open(sys.orig_argv[-1]).read():
    os.kill(os.getpid(), 9)
"""


def environment(folder: Path, *, kills: bool) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    if kills:
        (folder / "sitecustomize.py").write_text(SITE)
    # If torch is installed, tensorboardX would spend seconds of each trial importing it.
    (folder / "torch.py").write_text("raise ImportError")
    return os.environ | {"XLA_FLAGS": one_device(), "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def swept(tmp_path_factory, train_file):
    """A sweep that is killed after its first trial and then resumed; one of its four trials is killed every time."""
    folder = tmp_path_factory.mktemp("swept")
    path = folder / "sweep.yaml"
    rates = [0.01, 0.03, 1e30, 0.02]
    path.write_text(
        yaml.safe_dump(
            {
                "kind": "sweep",
                "output": str(folder / "out"),
                "train": str(train_file),
                "fields": {"optim.learning_rate": rates},
            }
        )
    )
    surroundings = environment(folder / "site", kills=True)
    records = folder / "out" / "trials.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "maxlm.cli", "sweep", str(path)], env=surroundings)
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = records.read_text().splitlines()
    # Its trial ends by itself, and until then the folder is locked.
    summary = run_sweep(load_config(path), environment=surroundings)
    return path, before, summary


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path.parent / "out" / "trials.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_killed_sweep_resumes_and_runs_no_trial_twice(swept):
    path, before, _ = swept
    assert len(before) >= 1
    lines = (path.parent / "out" / "trials.jsonl").read_text().splitlines()
    assert lines[: len(before)] == before
    assert len({record["id"] for record in records(path)}) == len(lines) == 4


@pytest.mark.exhaustive
def test_crashed_and_diverged_trials_are_distinguished_and_do_not_end_the_sweep(swept):
    path, _, summary = swept
    by_rate = {record["setting"]["optim.learning_rate"]: record for record in records(path)}
    assert {rate: record["status"] for rate, record in by_rate.items()} == {
        0.01: "finished",
        0.03: "finished",
        1e30: "diverged",
        0.02: "failed",
    }
    assert "killed by signal 9" in by_rate[0.02]["error"]
    assert "not finite" in by_rate[1e30]["error"] or "nan" in by_rate[1e30]["error"]
    assert summary["trials"] == {"finished": 2, "diverged": 1, "failed": 1}


@pytest.mark.exhaustive
def test_folder_has_the_results(swept):
    path, _, summary = swept
    out = path.parent / "out"
    by_rate = {record["setting"]["optim.learning_rate"]: record for record in records(path)}
    best = min((0.01, 0.03), key=lambda rate: by_rate[rate]["valid"]["loss"])
    assert summary["best"]["setting"] == {"optim.learning_rate": best}
    assert summary["best"]["value"] == by_rate[best]["valid"]["loss"]
    config = load_config(out / "best.yaml", kind="train")
    assert (config.optim.learning_rate, config.output) == (best, str(out / "best"))
    manifest = read_manifest(out)
    assert manifest["stage"] == "sweep"
    assert manifest["metrics"]["best"] == summary["best"]
    assert {"train", "data_0"} == set(manifest["inputs"])
    assert by_rate[0.02]["id"] in (out / "index.html").read_text()
    kept = {file.parent.name for file in (out / "trials").glob("*/checkpoints")}
    assert kept == {by_rate[best]["id"]}
    # A trial is an ordinary run of `maxlm train`.
    run = out / "trials" / by_rate[best]["id"]
    assert read_manifest(run)["metrics"]["valid"]["loss"] == by_rate[best]["valid"]["loss"]
    assert load_config(run.with_suffix(".yaml"), kind="train").optim.learning_rate == best


@pytest.mark.exhaustive
def test_same_command_retries_only_failed_trials(swept, capsys, monkeypatch):
    path, _, _ = swept
    for name, value in environment(path.parent / "calm", kills=False).items():
        monkeypatch.setenv(name, value)
    before = records(path)
    assert main(["sweep", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["trials"] == {"finished": 3, "diverged": 1, "failed": 0}
    after = records(path)
    assert after[:4] == before
    assert [(record["setting"]["optim.learning_rate"], record["status"]) for record in after[4:]] == [
        (0.02, "finished")
    ]
    assert main(["sweep", str(path)]) == 0
    assert "3 finished, 1 diverged" in capsys.readouterr().out
    assert records(path) == after


@pytest.mark.exhaustive
def test_survivors_of_a_round_resume_from_their_checkpoints(sweep_of, tmp_path):
    method = {"kind": "successive_halving", "trials": 2, "eta": 2, "min_steps": 2}
    config = sweep_of(fields={"optim.learning_rate": [0.01, 0.03]}, method=method)
    summary = run_sweep(config, environment=environment(tmp_path / "site", kills=False))
    out = Path(config.output)
    found = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert [(record["steps"], record["since"]) for record in found] == [(2, 0), (2, 0), (4, 2)]
    winner = min(found[:2], key=lambda record: record["valid"]["loss"])
    assert found[2]["id"] == winner["id"] == summary["best"]["trial"]
    steps = [record["step"] for record in read_metrics(out / "trials" / winner["id"]) if "loss" in record]
    assert steps == [1, 2, 3, 4]
    assert load_config(out / "best.yaml").steps == 4


@pytest.mark.exhaustive
def test_trials_fine_tune_an_imported_model(imported_run, tmp_path):
    """With adapters, in a separate process each."""
    chats = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    train = {
        "kind": "train",
        "output": "unused",
        "init_from": str(imported_run),
        "objective": {"kind": "sft", "train_file": str(chats), "valid_file": str(chats)},
        "adapters": {"kind": "lora", "rank": 2},
        "optim": {"schedule": {"warmup_steps": 0}},
        "steps": 3,
        "batch_size": 4,
        "row_length": 32,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    sweep = {"kind": "sweep", "output": str(tmp_path / "out"), "train": str(tmp_path / "train.yaml")}
    config = parse_config({**sweep, "fields": {"optim.learning_rate": [1e-6, 1e-2]}})
    summary = run_sweep(config, environment=environment(tmp_path / "site", kills=False))
    assert summary["trials"] == {"finished": 2, "diverged": 0, "failed": 0}
    assert summary["best"]["setting"] == {"optim.learning_rate": 1e-2}


def test_sweep_exits_with_1_if_all_trials_fail(tmp_path, train_file, capsys, monkeypatch):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"kind: sweep\noutput: {tmp_path}/out\ntrain: {train_file}\nfields: {{optim.beta1: [0.8, 0.9]}}\n"
        "overrides: {optim.learning_rate: 0.02}\n"
    )
    for name, value in environment(tmp_path / "site", kills=True).items():
        monkeypatch.setenv(name, value)
    assert main(["sweep", str(path)]) == 1
    assert "none of 2 trials finished; first error: was killed by signal 9" in capsys.readouterr().err


def test_trial_timeout(sweep_of, tmp_path):
    config = sweep_of(fields={"optim.learning_rate": [0.01]}, trial_seconds=0.3)
    with pytest.raises(CheckFailed, match="took longer than trial_seconds"):
        run_sweep(config, environment=environment(tmp_path / "site", kills=False))


@pytest.mark.parametrize(
    ("valid", "metric", "message"),
    [
        ({"loss": 1.0, "perplexity": 2.7}, "los", "the validation has no los; did you mean loss"),
        ({"loss": 1.0}, "reward", "the validation has no reward; the metrics are loss"),
        ({}, "loss", "has no held-out data to validate on"),
    ],
)
def test_missing_metric_raises(sweep_of, valid, metric, message):
    config = sweep_of(fields={"optim.learning_rate": [0.01]}, metric=metric)
    size = {"parameters": 1, "tokens": 1, "flops": 6.0}
    times = {"steps": 1, "since": 0, "seconds": 1.0}
    record = Record(id="a", scale=0, setting={}, seed=0, **size, **times, status="finished", valid=valid)
    with pytest.raises(ConfigError, match=message):
        check_metric(config, record)


def test_failed_trials_exit_with_1_after_the_summary_of_the_others(monkeypatch, capsys):
    summary = {"trials": {"finished": 3, "diverged": 0, "failed": 1}}
    monkeypatch.setattr("maxlm.sweep.run.run_sweep", lambda config, environment: summary)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["sweep", "configs/sweep/learning_rate.yaml", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == summary
    assert printed.err.startswith("maxlm: 1 trials failed (see runs/sweep/learning_rate/trials/*.log); the same")
