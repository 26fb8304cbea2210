"""Start the real processes of a run, on loopback."""

import functools
import json
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

from forked import ROOT, Call, Forked
from model_section import uniform
from xla_flags import one_device

from maxlm.config.load import dump_yaml, parse_config

HERE = Path(__file__).parent


def write_config(path: Path, run: Path, data: str, *, mesh: dict[str, int], **settings) -> Path:
    """A run of ten steps into the folder `run`."""
    tree = {
        "kind": "train",
        "output": str(run),
        "model": uniform(embed_dim=64, mlp_dim=256, num_heads=4, num_kv_heads=2, head_dim=16),
        "execution": {"max_length": 32, "activation_dtype": "float32", "matmul_dtype": "float32"},
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


@dataclass(frozen=True)
class Ended:
    """How a process ended, and its report if it wrote one."""

    code: int
    output: str
    errors: str
    report: dict = field(default_factory=dict)


def by_address(number: int, count: int, port: int) -> dict[str, str]:
    """The variables that a user sets manually."""
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


def run_together(
    function: str, arguments: list[list], folder: Path, *, launcher=by_address, folders: list[Path] | None = None
) -> list[Ended]:
    """Run `function` with each of the arguments, in connected processes with one device each.

    Args:
      function: `module:name` in this folder or tests.
      folder: for their output.
      folders: their working directories.
    """
    port, count = _free_port(), len(arguments)
    address = f"127.0.0.1:{port}"
    printed = [(folder / f"{number}.out", folder / f"{number}.err") for number in range(count)]
    calls = [
        Call(
            function,
            arguments[number],
            {} if count == 1 else {"JAX_COORDINATOR_BIND_ADDRESS": address, **launcher(number, count, port)},
            str(folders[number] if folders else ROOT),
            *map(str, printed[number]),
        )
        for number in range(count)
    ]
    codes = _forked().run(calls)
    return [Ended(code, output.read_text(), errors.read_text()) for code, (output, errors) in zip(codes, printed)]


def run_members(configs: list[Path], *, actions: dict[int, list[str]] | None = None, **options) -> list[Ended]:
    """One process for each configuration; `actions` are arguments of member.py by process."""
    reports = [config.parent / f"report-{config.stem}-{number}.json" for number, config in enumerate(configs)]
    for report in reports:
        report.unlink(missing_ok=True)
    arguments = [
        [*(actions or {}).get(number, []), str(report), "train", str(config)]
        for number, (config, report) in enumerate(zip(configs, reports))
    ]
    ended = run_together("member:main", [[own] for own in arguments], configs[0].parent, **options)
    return [
        replace(one, report=json.loads(report.read_text(encoding="utf-8"))) if report.exists() else one
        for one, report in zip(ended, reports)
    ]


def run_all(configs: list[Path], **options) -> list[Ended]:
    """Like `run_members`, and expect that all succeed."""
    ended = run_members(configs, **options)
    for one in ended:
        assert one.code == 0, one.errors[-4000:]
    return ended


@functools.cache
def _forked() -> Forked:
    environment = {"XLA_FLAGS": one_device()}
    modules = ["member", "toy_run", "maxlm.cli", "maxlm.train.run", "maxlm.objectives.pretrain", "tensorboardX"]
    return Forked(modules, paths=[HERE, HERE.parent], environment=environment)


def _free_port() -> int:
    """A port that JAX could derive from a SLURM job, from the range of this pytest-xdist worker."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
    width = 4096 // workers
    first = 61440 + worker * width
    # Tests of another checkout may run on the same machine.
    for port in range(first + os.getpid() % (width // 2), first + width):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
