"""A working folder with the recipes, a configuration for every kind of record, and no model."""

import io
import sys

import pytest
import yaml
from odd_values import RECIPES


@pytest.fixture(scope="session")
def place(tmp_path_factory, tiny_tokenizer_folder):
    folder = tmp_path_factory.mktemp("fuzz")
    train = {
        "kind": "train",
        "output": "run",
        "init_from": "none",
        "tokenizer": tiny_tokenizer_folder,
        "row_length": 64,
    }
    kinds = ("sft", "preference", "reward", "process_reward", "policy")
    objectives = {kind: {"kind": kind, "train_file": "records.jsonl"} for kind in kinds}
    for kind, objective in objectives.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump({**train, "objective": objective}))
    for name, text in RECIPES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "model").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MAXLM_TRACEBACK", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
