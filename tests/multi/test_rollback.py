"""Two processes go back together, pass over the same batches, and share local checkpoints."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm.data.quarantine import read_quarantine
from maxlm.train.goodput import read_goodput

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "train" / "toy_run.py"
MESH = {"data": 2, "fsdp": 1, "tensor": 1}

pytestmark = pytest.mark.slow


def run_two(folder: Path, **settings) -> list[dict]:
    """What both print at the end: the weights that they hold, and where they began."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    argv = [sys.executable, str(TOY), str(folder), json.dumps({"mesh": MESH, **settings})]
    processes = [
        subprocess.Popen(
            argv,
            env={**environment, "JAX_PROCESS_ID": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_two_processes_go_back_as_one(tmp_path):
    bad = [6, 7, 8]
    local = {"folder": str(tmp_path / "disk"), "every": 2, "keep": 1}
    went_back = run_two(tmp_path / "run", objective={"poison": bad}, checkpoint={"every": 6, "keep": 2, "local": local})
    never_met = run_two(tmp_path / "other", objective={"leave_out": bad})
    assert len({end["weights"] for end in went_back + never_met}) == 1
    assert [record["batch"] for record in read_quarantine(tmp_path / "run")] == bad
    assert read_goodput(tmp_path / "run").attempts == 1
    assert read_goodput(tmp_path / "run").seconds["rolled_back"] > 0
    # It went on from the local checkpoint of step 6 or 4, and has no use for one at its end.
    assert list((tmp_path / "disk").iterdir()) == []
