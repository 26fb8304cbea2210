"""Starting the processes of a run: real ones, on loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from maxlm.config.load import dump_yaml, parse_config

ROOT = Path(__file__).parents[2]
MEMBER = Path(__file__).parent / "member.py"
TIMEOUT = 400


def write_config(path: Path, run: Path, data: str, *, mesh: dict[str, int], **settings) -> Path:
    """A run of ten steps into the folder `run`."""
    tree = {
        "kind": "train",
        "output": str(run),
        "model": {
            "num_layers": 2,
            "embed_dim": 64,
            "mlp_dim": 256,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "max_length": 32,
            "activation_dtype": "float32",
            "matmul_dtype": "float32",
        },
        "objective": {"kind": "pretrain", "sources": [{"path": data}], "z_loss": 1e-3},
        "optim": {"kind": "muon", "schedule": {"warmup_steps": 2}},
        "mesh": {"fsdp": 1, **mesh},
        "checkpoint": {"every": 3},
        "processes": {"start_timeout_seconds": 200, "heartbeat_seconds": 60, "restart_seconds": 0.1},
        "steps": 10,
        "batch_size": 8,
        "row_length": 32,
        "log_every": 1,
        "eval_every": 0,
        "eval_batches": 2,
        **settings,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(parse_config(tree)), encoding="utf-8")
    return path


@dataclass
class Ended:
    """How a process ended, and its report where it wrote one."""

    code: int
    output: str
    errors: str
    report: dict = field(default_factory=dict)


def by_address(number: int, count: int, port: int) -> dict[str, str]:
    """The variables that somebody sets by hand."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }


def by_slurm(number: int, count: int, port: int) -> dict[str, str]:
    """The variables that `srun` sets; JAX derives the port from the job's number."""
    return {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
    }


def start(
    configs: list[Path],
    *,
    actions: dict[int, list[str]] | None = None,
    launcher=by_address,
    folders: list[Path] | None = None,
) -> list:
    """One process for each configuration, each with one device.

    `actions` are arguments of member.py by process; `folders` are what paths are relative to.
    """
    port, count = _free_port(), len(configs)
    processes = []
    for number, config in enumerate(configs):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            **({} if count == 1 else {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}),
            **({} if count == 1 else launcher(number, count, port)),
        }
        report = config.parent / f"report-{config.stem}-{number}.json"
        report.unlink(missing_ok=True)
        argv = [sys.executable, str(MEMBER), *(actions or {}).get(number, []), str(report), "train", str(config)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            argv,
            cwd=folders[number] if folders else ROOT,
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )
        process.report = report
        processes.append(process)
    return processes


def finish(processes: list) -> list[Ended]:
    """Wait for all; what still runs after the timeout, or is left of a supervisor's, is killed."""
    ended = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=TIMEOUT)
            report = json.loads(process.report.read_text(encoding="utf-8")) if process.report.exists() else {}
            ended.append(Ended(process.returncode, output, errors, report))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return ended


def run_all(configs: list[Path], **options) -> list[Ended]:
    """Start, wait, and expect that all end well."""
    ended = finish(start(configs, **options))
    for one in ended:
        assert one.code == 0, one.errors[-4000:]
    return ended


def _free_port() -> int:
    """One that JAX could derive from a SLURM job."""
    for port in range(61440 + os.getpid() % 2048, 65536):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
