"""Regression traces of training, decoding, export and evaluation: record before a refactoring, compare after it.

    python tools/traces.py record FILE [--only TEXT]
    python tools/traces.py compare FILE [--only TEXT] [--rtol X]

Everything uses the commands and `maxlm.load`, so that internals may change. Small models are trained for 30
steps with every objective, optimizer and kind of mesh, on texts from the Python installation; then they generate,
score, and are exported and evaluated. `compare` expects identical bits, or with --rtol numbers that close, and exits
with 1 if something differs.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from maxlm.runtime.platform import prepare_platform, use_virtual_devices

STEPS = 30
# Keys of values that depend on the machine or the time, or contain a path.
NOT_COMPARED = {
    *("time", "seconds", "data_wait", "tokens_per_second", "mfu", "goodput", "created", "attempts", "versions"),
    *("path", "folder", "absolute", "hash", "model", "output", "inputs", "start", "config"),
}

MIXER = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MLP = {"dim": 64}
MODEL = {"embed_dim": 32, "layers": {"repeat": 2, "mixer": MIXER, "mlp": MLP}}
EXECUTION = {"max_length": 64, "matmul_dtype": "float32", "activation_dtype": "float32"}
FOUR_LAYERS = MODEL | {"layers": {"repeat": 4, "mixer": MIXER, "mlp": MLP}}

BASE = "optimizer adamw"
LENGTH = ("--max-new-tokens", "24", "--seed", "3")

# Runs by name: their changes to `configuration`.
PRETRAINING: dict[str, dict[str, Any]] = {
    **{f"optimizer {kind}": {"optim.kind": kind} for kind in ("adamw", "adam8bit", "adafactor", "lion", "sgd", "soap")},
    "optimizer muon": {"optim.kind": "muon", "optim.muon_learning_rate": 0.02},
    "running mean": {"optim.ema_decay": 0.9},
    "accumulation": {"accumulate": 4},
    "bfloat16": {"execution.matmul_dtype": "bfloat16", "execution.activation_dtype": "bfloat16"},
    "int8 products": {"execution.eight_bit": "int8"},
    "windows": {
        "model.layers": {
            "repeat": 1,
            "pattern": [{"mixer": MIXER | {"qk_norm": True, "window": window}, "mlp": MLP} for window in (16, None)],
        }
    },
    "untied": {
        "model.tie_embeddings": False,
        "model.logit_soft_cap": 30.0,
        "model.layers": {"repeat": 2, "mixer": MIXER | {"soft_cap": 50.0}, "mlp": MLP},
    },
    "experts": {
        "model.layers": {
            "repeat": 2,
            "mixer": MIXER,
            "mlp": {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "dim": 32},
        }
    },
    "prediction modules": {"model.multi_token": {"modules": 2}, "objective.kind": "multi_token"},
    "mesh of rows and heads": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "mesh of context": {"mesh": {"fsdp": 1, "context": 2}},
    "stages, gpipe": {"mesh": {"fsdp": 1, "stage": 2}, "model": FOUR_LAYERS},
    "stages, 1f1b": {
        "mesh": {"fsdp": 1, "stage": 2},
        "model": FOUR_LAYERS,
        "execution.pipeline": {"schedule": "1f1b"},
    },
}
LORA = {"kind": "lora", "rank": 4}
POST_TRAINING: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"kind": "sft", "train_file": "chats.jsonl", "valid_file": "chats.jsonl"}},
    "sft, adapters": {"objective": {"kind": "sft", "train_file": "chats.jsonl"}, "adapters": LORA},
    "reward": {"objective": {"kind": "reward", "train_file": "pairs.jsonl", "valid_file": "pairs.jsonl"}},
    "process reward": {
        "objective": {"kind": "process_reward", "train_file": "solutions.jsonl", "valid_file": "solutions.jsonl"}
    },
    "dpo": {"objective": {"kind": "preference", "train_file": "pairs.jsonl", "valid_file": "pairs.jsonl"}},
    "dpo, all terms": {
        "objective": {
            "kind": "preference",
            "train_file": "pairs.jsonl",
            "loss": {"kind": "dpo", "label_smoothing": 0.1},
            "sft_weight": 0.3,
        },
        "adapters": LORA,
    },
    "grpo": {"objective": {"kind": "policy", "train_file": "prompts.jsonl", "group_size": 4, "max_new_tokens": 8}},
    "grpo, all terms": {
        "objective": {
            "kind": "policy",
            "train_file": "prompts.jsonl",
            "valid_file": "prompts.jsonl",
            "group_size": 4,
            "max_new_tokens": 8,
            "kl": {"beta": 0.05},
            "updates_per_rollout": 2,
        }
    },
    "distill": {
        "objective": {"kind": "distill", "teacher": BASE, "sources": [{"path": "rows"}], "alpha": 0.8},
        "model": MODEL | {"embed_dim": 16},
        "init_from": None,
    },
}
FROM_BASE = {"init_from": BASE, "model": None, "optim.learning_rate": 2e-3}
# Runs whose logits are kept.
SEEN = (BASE, "windows", "untied", "experts", "sft, adapters")
RUNS = PRETRAINING | {name: FROM_BASE | changes for name, changes in POST_TRAINING.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="traces whose name contains this text")
    parser.add_argument("--rtol", type=float, default=0.0, help="allowed relative difference")
    given = parser.parse_args(arguments)
    prepare_platform()
    use_virtual_devices(8)
    file = given.file.resolve()
    recorded = json.loads(file.read_text()) if given.action == "compare" else None
    found: dict[str, Any] = {"environment": environment()}
    differ = []
    if recorded is not None and not given.rtol and recorded["environment"] != found["environment"]:
        print(f"{file}: recorded with {recorded['environment']}, this is {found['environment']}: bits will differ")
        return 2
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, trace in traces(given.only):
            found[name] = trace
            verdict = ""
            if recorded is not None:
                problems = list(differences(recorded.get(name), trace, rtol=given.rtol))
                differ += [name] if problems else []
                verdict = "same" if not problems else f"DIFFERS in {len(problems)} places: {'; '.join(problems[:3])}"
            print(f"{name}: {verdict or 'recorded'}", flush=True)
    if recorded is None:
        file.write_text(json.dumps(found, indent=1))
    else:
        lost = [name for name in recorded if given.only in name and name not in found]
        differ += lost
        print(f"{len(found) - 1} traces, {len(differ)} differ", *lost)
    return 1 if differ else 0


def environment() -> dict[str, str]:
    """What the bits depend on besides the code."""
    import jax

    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def traces(only: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, result) of every trace, run in the working folder."""
    make_data()
    every: dict[str, Callable[[], Any]] = {
        **{f"run: {name}": partial(trained, name) for name in RUNS},
        **{
            f"logits: {name}": partial(logits, name) for name in (BASE, "windows", "untied", "experts", "sft, adapters")
        },
        "greedy text": partial(json_of, "generate", BASE, "The value of", *LENGTH),
        "sampled text": partial(json_of, "generate", BASE, "The", "--temperature", "0.9", *LENGTH),
        "evaluation: text": partial(json_of, "eval", BASE),
        "evaluation: task": partial(json_of, "eval", BASE, "--task", "tasks.jsonl", "--max-new-tokens", "4"),
        "receipt: text": partial(json_of, "export", BASE, "int8"),
        "receipt: chats": partial(json_of, "export", "sft", "int8-sft"),
        "greedy text: int8": greedy_int8,
        "scores: reward": partial(json_of, "score", "reward", "pairs.jsonl"),
        "scores: process reward": partial(json_of, "score", "process reward", "solutions.jsonl"),
    }
    for name, trace in every.items():
        if only in name:
            yield name, trace()


@cache
def trained(name: str) -> dict[str, Any]:
    """The record of every step of a run, and its final metrics; its folder has its name."""
    import yaml

    tree = configuration(RUNS[name]) | {"output": name}
    if tree["objective"]["kind"] not in ("pretrain", "multi_token"):
        trained(BASE)
    Path("config.yaml").write_text(yaml.safe_dump(tree))
    final = json.loads(run("train", "config.yaml", "--json"))
    lines = (Path(name) / "metrics.jsonl").read_text().splitlines()
    return {"steps": [comparable(json.loads(line)) for line in lines], "final": comparable(final)}


def make_data() -> None:
    """A tokenizer, packed rows, chats, pairs, prompts and a task, from the help texts of Python."""
    from pydoc_data.topics import topics

    import yaml

    Path("text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)[:40]), encoding="utf-8")
    tokenizer = {"kind": "tokenizer", "input": "text.txt", "output": "tokenizer", "vocab_size": 512}
    rows = {
        "kind": "data",
        "output": "rows",
        "tokenizer": "tokenizer",
        "sources": [{"uri": "text.txt", "split_on_blank_lines": 400}],
        "valid_fraction": 0.1,
        "row_length": 64,
        "workers": 1,
    }
    for command, config in ((["tokenizer", "train"], tokenizer), (["data", "build"], rows)):
        Path("config.yaml").write_text(yaml.safe_dump(config))
        run(*command, "config.yaml")
    questions = [(f"{a} and {b}?", str(a + b)) for a in range(4) for b in range(4)]
    asked = [[{"role": "user", "content": question}] for question, _ in questions]
    answers = [answer for _, answer in questions]
    records = {
        "chats": [{"messages": [*q, {"role": "assistant", "content": a}]} for q, a in zip(asked, answers)],
        "pairs": [{"prompt": q, "chosen": a, "rejected": a + "0"} for q, a in zip(asked, answers)],
        "prompts": [{"prompt": q, "answer": a} for q, a in zip(asked, answers)],
        "solutions": [{"prompt": q, "steps": [a, a + "0"], "labels": [1, 0]} for q, a in zip(asked, answers)],
        "tasks": [{"kind": "sum", "prompt": q, "answer": a} for q, a in zip(asked, answers)],
    }
    for name, lines in records.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def configuration(changes: dict[str, Any]) -> dict[str, Any]:
    """A pretraining run with some keys changed, by path; None removes a key."""
    tree = {
        "kind": "train",
        "model": dict(MODEL),
        "execution": dict(EXECUTION),
        "objective": {"kind": "pretrain", "sources": [{"path": "rows"}], "z_loss": 1e-4},
        "optim": {"kind": "adamw", "learning_rate": 1e-2, "schedule": {"kind": "cosine", "warmup_steps": 3}},
        "mesh": {"fsdp": 1},
        "checkpoint": {"every": 1000},
        "steps": STEPS,
        "batch_size": 8,
        "row_length": 64,
        "log_every": 1,
        "eval_every": 15,
        "eval_batches": 2,
    }
    for path, value in changes.items():
        section, *keys = path.split(".")
        if keys:
            tree[section] = {**tree[section], keys[0]: value}
        else:
            tree[section] = value
    return {key: value for key, value in tree.items() if value is not None}


def logits(name: str) -> dict[str, Any]:
    """The logits of two rows: their hash, and a few of them."""
    import numpy as np

    import maxlm

    trained(name)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 48)).astype(np.int32)
    found = np.asarray(maxlm.load(name).logits(tokens), np.float32)
    return {
        "sha256": hashlib.sha256(found.tobytes()).hexdigest(),
        "some": [float(x) for x in found[:, ::8, ::64].ravel()],
    }


def json_of(command: str, name: str, *arguments: str) -> Any:
    """The JSON output of a command on the model of a run."""
    trained(name)
    return comparable(json.loads(run(command, name, *arguments, "--json")))


def greedy_int8() -> Any:
    receipt = json_of("export", BASE, "int8")
    return {"receipt": receipt, "text": comparable(json.loads(run("generate", "int8", "The", *LENGTH, "--json")))}


def run(*command: str) -> str:
    """The output of a command."""
    from maxlm.cli import main

    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(list(command))
    if code:
        raise SystemExit(f"maxlm {' '.join(command)}: exit code {code}: {errors.getvalue()[-500:]}")
    return printed.getvalue()


def comparable(value: Any) -> Any:
    """The value without what depends on the machine."""
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in NOT_COMPARED}
    return [comparable(item) for item in value] if isinstance(value, list) else value


def differences(old: Any, new: Any, *, rtol: float, where: str = "") -> Iterator[str]:
    """Places where two traces differ. Hashes are ignored if a difference is allowed."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if key not in old or key not in new:
                yield f"{where}/{key} is only in one of them"
            elif not (rtol and key == "sha256"):
                yield from differences(old[key], new[key], rtol=rtol, where=f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new)):
            yield from differences(one, other, rtol=rtol, where=f"{where}/{index}")
    elif rtol and isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=rtol, abs_tol=rtol * 1e-3):
            yield f"{where}: {old} and {new}"
    elif old != new:
        yield f"{where}: {old} and {new}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
