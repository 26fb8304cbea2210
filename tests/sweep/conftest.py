"""A training configuration that runs in seconds, and sweeps of it."""

from pathlib import Path

import pytest
import yaml

from maxlm.config import SweepConfig, parse_config

TRAIN = {
    "kind": "train",
    "output": "unused",
    "model": {
        "embed_dim": 16,
        "layers": {
            "repeat": 1,
            "mixer": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            "mlp": {"dim": 32},
        },
    },
    "execution": {"max_length": 32},
    "optim": {"schedule": {"kind": "constant", "warmup_steps": 1}},
    "guard": {"max_rollbacks": 0, "max_skipped_in_a_row": 2},
    "batch_size": 8,
    "row_length": 32,
    "steps": 4,
    "eval_batches": 2,
    "eval_every": 0,
    "log_every": 1,
}


@pytest.fixture(scope="session")
def train_file(tmp_path_factory, tiny_data_folder) -> Path:
    path = tmp_path_factory.mktemp("train") / "train.yaml"
    objective = {"kind": "pretrain", "sources": [{"path": tiny_data_folder}]}
    path.write_text(yaml.safe_dump(TRAIN | {"objective": objective}), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sweep_of(tmp_path_factory, train_file):
    """Make a sweep's configuration from overrides; each has its own folder."""

    def make(**settings) -> SweepConfig:
        output = str(tmp_path_factory.mktemp("sweep") / "out")
        return parse_config({"kind": "sweep", "output": output, "train": str(train_file), **settings})

    return make
