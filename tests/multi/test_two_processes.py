"""Two processes that train as one give what one process gives."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm.config.load import dump_yaml, parse_config
from maxlm.core.tree import flatten
from maxlm.train.checkpoint import find_checkpoint
from maxlm.train.metrics import read_metrics
from maxlm.train.run import load_model

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tests" / "train" / "tiny_run.py"

pytestmark = pytest.mark.slow


def write_config(folder: Path, data: str) -> Path:
    tree = {
        "kind": "train",
        "output": str(folder / "run"),
        "model": {
            "num_layers": 2,
            "embed_dim": 32,
            "mlp_dim": 48,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "max_length": 32,
            "activation_dtype": "float32",
            "matmul_dtype": "float32",
        },
        "objective": {"kind": "pretrain", "sources": [{"path": data}], "z_loss": 1e-3},
        "optim": {"kind": "muon", "schedule": {"warmup_steps": 2}},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "checkpoint": {"every": 4},
        "steps": 8,
        "batch_size": 8,
        "row_length": 32,
        "log_every": 2,
        "eval_every": 4,
        "eval_batches": 2,
    }
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(dump_yaml(parse_config(tree)), encoding="utf-8")
    return path


def start(config: Path, *, devices: int, extra: dict | None = None, signal_at: tuple[str, int] | None = None):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **(extra or {}),
    }
    signals = ["--signal", signal_at[0], str(signal_at[1])] if signal_at else []
    argv = [sys.executable, str(RUNNER), *signals, "train", str(config)]
    return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_two(config: Path, *, signal_at: tuple[str, int] | None = None) -> list[tuple[str, str]]:
    """Both processes with four devices each; returns what they print. The signal goes to the second alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        start(config, devices=4, extra={**common, "JAX_PROCESS_ID": str(n)}, signal_at=signal_at if n == 1 else None)
        for n in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors[-4000:]
    return outputs


def run_one(config: Path) -> None:
    process = start(config, devices=8)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-4000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_data_folder):
    folder = tmp_path_factory.mktemp("one") / "x"
    run_one(write_config(folder, tiny_data_folder))
    return folder / "run"


def assert_same_run(folder, other):
    left, right = (flatten(jax.device_get(load_model(path)[0])) for path in (folder, other))
    for path, value in left.items():
        np.testing.assert_allclose(value, right[path], rtol=2e-4, atol=2e-5, err_msg=path)
    left, right = read_metrics(folder), read_metrics(other)
    assert [record["step"] for record in left] == [record["step"] for record in right]
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "z_loss", "grad_norm", "valid_loss", "valid_bits_per_byte"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])


def test_two_processes_train_as_one(one, tmp_path, tiny_data_folder):
    outputs = run_two(write_config(tmp_path / "two", tiny_data_folder))
    assert_same_run(tmp_path / "two" / "run", one)
    # Only the first writes and tells.
    assert "step 8/8" in outputs[0][1]
    assert "step 8/8" not in outputs[1][1]
    names = {path.name for path in (tmp_path / "two" / "run").iterdir()}
    assert names == {
        *("config.yaml", "manifest.json", "metrics.jsonl", "goodput.jsonl"),
        *("tensorboard", "checkpoints", "tokenizer"),
    }


def test_a_signal_to_one_stops_both_at_one_step(one, tmp_path, tiny_data_folder):
    """And one process goes on from what two have saved, to the same end."""
    config = write_config(tmp_path / "two", tiny_data_folder)
    began = time.monotonic()
    outputs = run_two(config, signal_at=("SIGTERM", 3))
    assert "stopped by a signal" in outputs[0][1], outputs[0][1]
    assert time.monotonic() - began < 200
    assert 3 <= int(find_checkpoint(tmp_path / "two" / "run").name) < 8
    run_one(config)
    left, right = (flatten(jax.device_get(load_model(path)[0])) for path in (tmp_path / "two" / "run", one))
    for path, value in left.items():
        np.testing.assert_allclose(value, right[path], rtol=2e-4, atol=2e-5, err_msg=path)
