"""`maxlm submit` from the command line."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from maxlm_gcp.cli import add_arguments, run

from maxlm.errors import ConfigError

WHERE = ["--name=tiny-1", "--project=my-project", "--zone=us-west4-a"]
WHAT = ["--accelerator=v5litepod-16", "--bucket=gs://my-bucket/runs", "--input=runs/base=gs://my-bucket/base"]


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="maxlm submit")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A code folder with a valid training configuration."""
    (tmp_path / "train.yaml").write_text(
        "kind: train\noutput: runs/tiny\ninit_from: runs/base\nobjective: {kind: sft, train_file: chats.jsonl}\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    return tmp_path


@pytest.fixture
def no_resource(tmp_path, monkeypatch):
    """A gcloud without any resources."""
    program = tmp_path / "gcloud"
    program.write_text("#!/bin/sh\necho 'ERROR: NOT_FOUND: nothing' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_dry_run_only_prints_commands(code, capsys):
    assert call("train.yaml", "steps=20", "--dry-run", "--spot", "--env=NOTE=a b", *WHERE, *WHAT) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["git", "gcloud", "until", "gcloud", "gcloud", "gcloud"]
    assert "--spot" in out[1]
    assert "steps=20 output=gs://my-bucket/runs/tiny-1" in out[-1]
    assert subprocess.run(["bash", "-n"], input="\n".join(out), text=True).returncode == 0


def test_recipe_can_be_given_by_name(code, capsys):
    (code / "configs" / "post").mkdir(parents=True)
    shutil.copy(code / "train.yaml", code / "configs" / "post" / "mine.yaml")
    for arguments in (["add", "."], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "more"]):
        subprocess.run(["git", *arguments], check=True)
    assert call("post/mine", "--dry-run", *WHERE, *WHAT) == 0
    assert "train configs/post/mine.yaml" in capsys.readouterr().out


def test_dry_run_as_json_has_the_same_lines(code, capsys):
    call("train.yaml", "--dry-run", *WHERE, *WHAT)
    lines = capsys.readouterr().out.splitlines()
    call("train.yaml", "--dry-run", "--json", *WHERE, *WHAT)
    assert json.loads(capsys.readouterr().out) == lines


@pytest.mark.parametrize(
    ("action", "word"), [("status", "describe"), ("logs", "tail -n +1"), ("delete", "--force"), ("create", "--node-id")]
)
def test_every_action_has_a_dry_run(code, capsys, action, word):
    what = ["train.yaml", *WHAT] if action == "create" else []
    assert call(*what, f"--action={action}", "--dry-run", *WHERE) == 0
    assert word in capsys.readouterr().out


def test_invalid_configuration_raises_before_a_tpu_costs_money(code):
    with pytest.raises(ConfigError, match="stepz"):
        call("train.yaml", "stepz=20", *WHERE, *WHAT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mesh.tensor=3"],
            "mesh: its sizes multiply to 3, which does not divide the number of chips",
        ),
        (["mesh.fsdp=32"], "mesh: needs 32 devices, but v5litepod-16 has 16 chips"),
        (["mesh.fsdp=8"], "mesh: uses 8 devices, but v5litepod-16 has 16 chips; set one axis to -1"),
        (
            ["--accelerator=v5p-16", "--zone=us-east5-a", "mesh.fsdp=16"],
            "needs 16 devices, but v5p-16 has 8 chips",
        ),
        (
            ["objective.valid_file=other.jsonl"],
            "objective.valid_file: other.jsonl is not in the archive that is sent",
        ),
        (["tokenizer=/data/tokenizer"], "tokenizer: /data/tokenizer is outside the code folder"),
        (["init_from=runs/other"], "init_from: runs/other is not in the archive that is sent"),
        (["--accelerator=v6e-8"], "zone: us-west4-a has v5litepod, not v6e; use us-central1-b, "),
    ],
)
def test_problems_raise_before_a_tpu_costs_money(code, arguments, message):
    settings = [argument for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    with pytest.raises(ConfigError, match=re.escape(message)):
        call("train.yaml", *settings, "--dry-run", *WHERE, *WHAT, *options)


def test_bucket_inputs_and_unlisted_zones_pass(code):
    settings = ["init_from=gs://my-bucket/base/checkpoints/7", "objective.valid_file=runs/base/valid.jsonl"]
    assert call("train.yaml", *settings, "--dry-run", *WHERE, *WHAT, "--zone=us-central1-ai1a") == 0


def test_all_missing_arguments_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        call(*WHERE)
    assert [problem.split()[3] for problem in caught.value.problems] == ["CONFIG:", "--accelerator:", "--bucket:"]


def test_env_must_be_name_value_pairs(code):
    with pytest.raises(ConfigError, match="--env: 'NOTE' is not NAME=VALUE"):
        call("train.yaml", "--env=NOTE", "--dry-run", *WHERE, *WHAT)


def test_spot_and_reserved_are_mutually_exclusive(code, capsys):
    with pytest.raises(SystemExit):
        call("train.yaml", "--spot", "--reserved", *WHERE, *WHAT)
    assert "not allowed with" in capsys.readouterr().err


def test_status_and_delete_without_a_tpu(no_resource, capsys):
    assert call("--action=status", *WHERE) == 0
    assert call("--action=delete", *WHERE) == 0
    assert capsys.readouterr().out == "tiny-1: does not exist\ntiny-1 does not exist\n"
    assert call("--action=status", "--json", *WHERE) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "tiny-1", "state": None, "workers": []}
    assert call("--action=delete", "--json", *WHERE) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "tiny-1", "deleted": False}


def test_help_examples_parse(capsys):
    with pytest.raises(SystemExit):
        call("--help")
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = [line.split()[2:] for line in text.splitlines() if line.startswith("  maxlm submit ")]
    assert len(examples) == 5
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for example in examples:
        parser.parse_args(example)


def test_no_device_is_opened(code):
    program = (
        "import sys, argparse; from maxlm_gcp.cli import add_arguments, run; parser = argparse.ArgumentParser(); "
        "add_arguments(parser); run(parser.parse_args(sys.argv[1:]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, "train.yaml", "--dry-run", *WHERE, *WHAT],
        check=True,
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "none of this name"},
    )
