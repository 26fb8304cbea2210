import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import make_text, read_jsonl, write_jsonl

from maxlm.config import dump_yaml, load_config, parse_config
from maxlm.data import cli
from maxlm.data.loader import open_mixture
from maxlm.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def call(capsys):
    """Runs `maxlm data WORDS...` and returns its output."""

    def run(*words) -> str:
        parser = argparse.ArgumentParser()
        cli.register(parser.add_subparsers())
        args = parser.parse_args(["data", *map(str, words)])
        capsys.readouterr()
        assert args.func(args) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def built(tmp_path, data_config, call):
    """A built folder, and the configuration it was built with."""
    rows = [{"text": make_text(n)} for n in range(30)] + [{"text": make_text(3)}, {"body": ""}]
    path = tmp_path / "data.yaml"
    path.write_text(dump_yaml(data_config(write_jsonl(tmp_path / "a.jsonl", rows))))
    call("build", path)
    return tmp_path / "data", path


def test_build_prints_a_summary(built, call):
    folder, path = built
    said = call("build", path)
    assert "30 documents of 32 records" in said
    assert "rejected: 1 exact_duplicate, 1 no_text" in said
    assert "characters per token, rows of 32 tokens" in said
    assert json.loads(call("build", path, "--json"))["stage"] == "data"
    assert json.loads(call("build", path, "--stop-after", "documents", "--json"))["stage"] == "data/documents"
    said = call("build", path, f"output={folder}2", "row_length=8")
    assert "rows of 8 tokens" in said


def test_show_prints_documents_rows_and_rejects(built, call):
    folder, _ = built
    assert f"== a.jsonl:1 (source: {folder.parent / 'a.jsonl'}; licence: unknown)" in call("show", folder).replace(
        ", l", "; l"
    )
    documents = [json.loads(line) for line in call("show", folder, "-n", 2, "--json").splitlines()]
    assert [d["text"] for d in documents] == [make_text(0), make_text(1)]
    rows = [json.loads(line) for line in call("show", folder, "--rows", "-n", 3, "--json").splitlines()]
    assert rows[0]["text"].startswith("<|bos|>" + make_text(0)[:20])
    assert rows[0]["documents"] == ["a.jsonl:1"]
    assert "".join(row["text"] for row in rows)[7:].startswith(make_text(0)[:60])
    assert "<|bos|>" in call("show", folder, "--rows", "--split", "valid", "-n", 1)
    rejects = [json.loads(line) for line in call("show", folder, "--rejects", "--json").splitlines()]
    assert rejects == read_jsonl(folder / "rejects.jsonl")
    assert "reason: exact_duplicate" in call("show", folder, "--rejects")


def test_at_step_prints_the_documents_of_a_step(built, call):
    folder, _ = built
    expected = [d.id for d in open_mixture([(folder, 1.0)], seed=5, batch_size=4).documents(6)]
    said = call("at-step", 7, "--data", folder, "--seed", 5, "--batch-size", 4, "--json")
    assert [json.loads(line)["id"] for line in said.splitlines()] == expected
    assert expected[0] in call("at-step", 7, "--data", folder, "--seed", 5, "--batch-size", 4)


def test_steps_are_counted_from_one(built, call, capsys):
    with pytest.raises(SystemExit, match="2"):
        call("at-step", 0, "--data", built[0])
    assert "'0' must be a whole number from 1 to" in capsys.readouterr().err


def test_at_step_reads_the_configuration_of_a_run(built, call, tmp_path):
    folder, _ = built
    tree = {
        "kind": "train",
        "output": str(tmp_path / "run"),
        "model": {},
        "objective": {"kind": "pretrain", "sources": [{"path": str(folder), "weight": 2.0}]},
        "row_length": 32,
        "batch_size": 4,
        "seed": 5,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(parse_config(tree)))
    expected = [d.id for d in open_mixture([(folder, 2.0)], seed=5, batch_size=4).documents(6)]
    said = call("at-step", 7, "--run", tmp_path / "run", "--json")
    assert [json.loads(line)["id"] for line in said.splitlines()] == expected

    other = tree | {"objective": {"kind": "sft", "train_file": "a.jsonl"}, "init_from": "x"}
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(parse_config(other)))
    with pytest.raises(DataError, match="sft, which reads no packed rows"):
        call("at-step", 7, "--run", tmp_path / "run")


@pytest.mark.parametrize(
    "words", [("show", "nowhere"), ("show", "nowhere", "--rows"), ("at-step", "1", "--data", "nowhere")]
)
def test_incomplete_folder_is_reported_in_one_sentence(call, words):
    with pytest.raises(DataError, match=r"has no manifest.json; the stage that writes it has not finished"):
        call(*words)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("data/*.yaml")) + sorted(CONFIGS.glob("tokenizer/*.yaml")), ids=str
)
def test_the_example_configurations_are_valid(path):
    assert load_config(path).kind == path.parent.name


def test_all_configuration_mistakes_are_reported_at_once(tmp_path, call):
    path = tmp_path / "data.yaml"
    path.write_text("kind: data\noutput: x\ntokenzer: y\nsources: []\n")
    with pytest.raises(ConfigError) as error:
        call("build", path)
    assert "did you mean tokenizer?" in str(error.value)
    assert "sources" in str(error.value)


def test_the_commands_import_nothing_heavy():
    heavy = {"numpy", "jax", "grain", "pyarrow", "pydantic", "rich"}
    code = f"import sys, maxlm.data.cli, maxlm.tokenizer.cli; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
