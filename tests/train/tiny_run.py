"""Configurations of small runs, and processes that run them.

As a script: `tiny_run.py [--signal NAME STEP] [--poison N,N,...] ARGUMENTS...` is `maxlm ARGUMENTS...`, with a signal
sent to itself after a step, so that a test interrupts at the same place each time, and with batches that give no finite
loss.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from maxlm.config.load import dump_yaml, parse_config

MODEL = {
    "num_layers": 2,
    "embed_dim": 32,
    "mlp_dim": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_length": 64,
    "activation_dtype": "float32",
    "matmul_dtype": "float32",
}


def tiny_config(output, data, **settings):
    """A run of 12 steps on one device; `settings` replace top-level keys."""
    tree = {
        "kind": "train",
        "output": str(output),
        "model": MODEL,
        "objective": {"kind": "pretrain", "sources": [{"path": str(data)}]},
        "optim": {"learning_rate": 1e-2, "schedule": {"warmup_steps": 2}},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "checkpoint": {"every": 4, "keep": 2},
        "steps": 12,
        "batch_size": 8,
        "row_length": 32,
        "log_every": 3,
        "eval_every": 6,
        "eval_batches": 2,
        **settings,
    }
    return parse_config(tree)


def train_process(config, *, signal_at: tuple[str, int] | None = None, overrides=()) -> subprocess.CompletedProcess:
    """`maxlm train` in a process of its own, the configuration given as a file."""
    file = Path(config.output).with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_yaml(config), encoding="utf-8")
    argv = [sys.executable, __file__]
    if signal_at is not None:
        argv += ["--signal", signal_at[0], str(signal_at[1])]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    argv += ["train", str(file), *overrides]
    return subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


def _signal_after_step(name: str, step: int) -> None:
    from maxlm.train.metrics import StepWindow

    add, count = StepWindow.add, iter(range(1, 1 << 30))

    def add_then_signal(self, *args, **kwargs):
        add(self, *args, **kwargs)
        if next(count) == step:
            os.kill(os.getpid(), getattr(signal, name))

    StepWindow.add = add_then_signal


def poison(batches: set[int]):
    """What `Pretrain.batches` is then: these batches, counted from 0, give no finite loss."""
    from dataclasses import replace
    from itertools import count

    import numpy as np

    from maxlm.train.pretrain import Pretrain

    read = Pretrain.batches

    def poisoned(self, start_step, current_model):
        for number, batch in zip(count(start_step), read(self, start_step, current_model)):
            bad = number in batches
            yield replace(batch, loss_weights=np.full_like(batch.loss_weights, np.nan)) if bad else batch

    return poisoned


if __name__ == "__main__":
    from maxlm.cli import main

    arguments = sys.argv[1:]
    if arguments[0] == "--signal":
        _signal_after_step(arguments[1], int(arguments[2]))
        arguments = arguments[3:]
    if arguments[0] == "--poison":
        from maxlm.train.pretrain import Pretrain

        Pretrain.batches = poison({int(number) for number in arguments[1].split(",")})
        arguments = arguments[2:]
    sys.exit(main(arguments))
