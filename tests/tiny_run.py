"""Configurations of small runs, and processes that run them."""

import functools
import os
import signal
import subprocess
from pathlib import Path

from forked import Call, Forked
from model_section import uniform

from maxlm.config.load import dump_yaml, parse_config

SIZES = {"embed_dim": 32, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
EXECUTION = {"max_length": 64, "activation_dtype": "float32", "matmul_dtype": "float32"}


def tiny_model(**changes) -> dict:
    """A `model:` section of two layers."""
    return uniform(**{**SIZES, **changes})


def tiny_config(output, data, **settings):
    """A run of 12 steps on one device; `settings` replace top-level keys."""
    tree = {
        "kind": "train",
        "output": str(output),
        "model": tiny_model(),
        "execution": EXECUTION,
        "objective": {"kind": "pretrain", "sources": [{"path": str(data)}]},
        "optim": {"learning_rate": 1e-2, "schedule": {"warmup_steps": min(2, settings.get("steps", 12))}},
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


def train_process(config, *, signal_at: tuple[str, int] | None = None) -> subprocess.CompletedProcess:
    """Run `maxlm train` in a separate process, with the configuration as a file."""
    file = Path(config.output).with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_yaml(config), encoding="utf-8")
    output, errors = file.with_suffix(".out"), file.with_suffix(".err")
    call = Call("tiny_run:maxlm", [["train", str(file)], signal_at], output=str(output), errors=str(errors))
    [code] = _forked().run([call])
    return subprocess.CompletedProcess(call.arguments, code, output.read_text(), errors.read_text())


def maxlm(arguments: list[str], signal_at: tuple[str, int] | None) -> int:
    """Run `maxlm ARGUMENTS`, with a signal to itself after a step, so that it is interrupted at the same place."""
    from maxlm.cli import main

    if signal_at is not None:
        _signal_after_step(*signal_at)
    return main(arguments)


@functools.cache
def _forked() -> Forked:
    modules = ["tiny_run", "maxlm.cli", "maxlm.train.run", "maxlm.objectives.pretrain", "tensorboardX"]
    return Forked(modules, paths=[Path(__file__).parent])


def _signal_after_step(name: str, step: int) -> None:
    from maxlm.train.metrics import StepWindow

    add, count = StepWindow.add, iter(range(1, 1 << 30))

    def add_then_signal(self, *args, **kwargs):
        add(self, *args, **kwargs)
        if next(count) == step:
            os.kill(os.getpid(), getattr(signal, name))

    StepWindow.add = add_then_signal


def poison(batches: set[int]):
    """A replacement of `PackedRowsData.batches`: these batches, counted from 0, have a non-finite loss."""
    from dataclasses import replace
    from itertools import count

    import numpy as np

    from maxlm.core.batch import Batch
    from maxlm.objectives.packed_rows import PackedRowsData

    read = PackedRowsData.batches

    def poisoned(self, start_step, current_model):
        for number, batch in zip(count(start_step), read(self, start_step, current_model)):
            text = batch["text"]
            bad = replace(text, loss_weights=np.full_like(text.loss_weights, np.nan))
            yield Batch({"text": bad}) if number in batches else batch

    return poisoned
