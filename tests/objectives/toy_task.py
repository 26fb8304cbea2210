"""A toy task for post-training: chats, files of them, and configurations of small runs.

`sky` is answered with `blue`, `grass` with `green`, ...; `coin N` with `yes` or `no`, with equal frequency.
"""

import json
from pathlib import Path

from model_section import uniform

from maxlm.config.load import parse_config

COLORS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "sun": "yellow"}

SIZES = {"embed_dim": 32, "mlp_dim": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
EXECUTION = {"max_length": 64, "activation_dtype": "float32", "matmul_dtype": "float32"}


def toy_model(**changes) -> dict:
    """A `model:` section of two layers."""
    return uniform(**{**SIZES, **changes})


def question(text):
    return [{"role": "user", "content": text}]


def chat(text, answer):
    return {"messages": [*question(text), {"role": "assistant", "content": answer}]}


def write_lines(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_config(output, **settings):
    """A small run on one device."""
    tree = {
        "kind": "train",
        "output": str(output),
        "execution": EXECUTION,
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "optim": {"learning_rate": 5e-3, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}},
        "checkpoint": {"every": 1000},
        "batch_size": 8,
        "row_length": 32,
        "eval_every": 0,
        **settings,
    }
    return parse_config(tree)
