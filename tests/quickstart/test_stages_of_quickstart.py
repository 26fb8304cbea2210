"""The quickstart on little data and few steps: every stage runs, completed ones are skipped, failed checks fail."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from xla_flags import one_device

from maxlm.errors import ConfigError, DataError, RequestError
from maxlm.quickstart.checks import ChecksFailed, checks
from maxlm.quickstart.cli import run
from maxlm.quickstart.stages import STAGES, Quickstart
from maxlm.runtime.manifest import write_manifest

SMALL = [
    "data.sources.0.limit=60",
    "tokenizer.vocab_size=600",
    *(f"{stage}.row_length=256" for stage in ("pretrain", "sft")),
    "pretrain.model.layers.repeat=1",
    "pretrain.model.embed_dim=32",
    "pretrain.model.layers.mlp.dim=64",
    "pretrain.model.layers.mixer.num_heads=2",
    "pretrain.model.layers.mixer.head_dim=16",
    # Muon takes longer to compile.
    "pretrain.optim.kind=adamw",
    "sft.optim.kind=adamw",
    "pretrain.steps=4",
    "pretrain.optim.schedule.warmup_steps=1",
    "pretrain.batch_size=4",
    "sft.steps=2",
    "sft.optim.schedule.warmup_steps=1",
    "sft.batch_size=4",
    "align.steps=2",
    "align.optim.schedule.warmup_steps=1",
    "align.batch_size=2",
    "align.accumulate=1",
    "align.objective.group_size=2",
    "align.row_length=256",
]


# The command, with questions about a few modules of the library. If torch is installed, tensorboardX would take seconds
# to import it.
FEW_QUESTIONS = """\
import sys
from maxlm import cli
from maxlm.quickstart import questions, tasks
sys.modules["torch"] = None
questions.is_wanted = lambda path: path.match("[c-f]*.py") and len(path.parts) == 1
sys.exit(cli.main())
"""


def quickstart(folder, *overrides):
    command = [sys.executable, "-c", FEW_QUESTIONS, "quickstart", "--output", str(folder), "--json"]
    environment = {**os.environ, "XLA_FLAGS": one_device()}  # as on a laptop
    return subprocess.run([*command, *SMALL, *overrides], capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.exhaustive
def test_untrained_model_fails_its_checks_but_is_reported(tmp_path):
    first = quickstart(tmp_path)
    assert first.returncode == 1, first.stderr
    assert "Traceback" not in first.stderr
    assert "pretraining beats a bigram model and xz" in first.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {link["stage"] for link in summary["manifest_chain"]} == {
        "data", "tokenizer", "train/pretrain", "tasks", "train/sft", "train/policy", "export/int8", "data/documents"
    }  # fmt: skip
    assert len(summary["chat"]["answers"]) >= 8
    assert all(answer["events"] > 1 for answer in summary["chat"]["answers"])
    assert not summary["not_done"]
    assert set(summary["bits_per_byte"]) == {
        "pretrain", "unigram", "bigram", "byte_bigram", "xz", "xz_after_training"
    }  # fmt: skip
    assert set(summary["seconds"]) >= {"documents", "pretrain", "sft", "align", "evaluate", "int8", "chat"}
    report = (tmp_path / "report.html").read_text()
    assert "xz" in report
    assert "http://" not in report.replace("http://www.w3.org", "")

    untouched = (tmp_path / "pretrain" / "manifest.json").read_bytes()
    aligned = (tmp_path / "align" / "manifest.json").read_bytes()
    again = quickstart(tmp_path, "align.optim.learning_rate=1e-5")
    assert again.returncode == 1, again.stderr
    assert (tmp_path / "pretrain" / "manifest.json").read_bytes() == untouched
    assert (tmp_path / "align" / "manifest.json").read_bytes() != aligned


def test_missing_server_extra_raises_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(RequestError, match=r"pip install 'maxlm\[serve\]'"):
        run(argparse.Namespace(output=str(tmp_path / "q"), overrides=[], json=False))
    assert not (tmp_path / "q").exists()


def test_override_must_name_a_recipe(tmp_path):
    with pytest.raises(ConfigError, match="must start with one of data, tokenizer, pretrain, sft, align"):
        Quickstart(tmp_path, ["optim.learning_rate=1"])


def test_mistake_in_the_last_recipe_raises_before_the_first_stage(tmp_path):
    with pytest.raises(ConfigError, match="stepss"):
        Quickstart(tmp_path / "q", ["align.stepss=1"]).run()
    assert not (tmp_path / "q").exists()


def summary(**changes):
    values = {
        "not_done": {},
        "bits_per_byte": {
            "pretrain": {"value": 1.8, "low": 1.7, "high": 1.9},
            "bigram": {"value": 2.2, "low": 2.0, "high": 2.4},
            "xz": 2.3,
            "xz_after_training": 1.8,
        },
        "sft_exact_match": {"before": 0.0, "after": 0.6, "interval": [0.5, 0.7], "questions": 9},
        "align_reward": {"before": 0.4, "after": 0.6, "interval": [0.1, 0.3], "questions": 9},
        "int8": int8(0.001, 0.0, 0.002),
        "chat": {"answers": [{"prompt": "?", "answer": "no", "right": False, "reply": "yes", "events": 3}]},
    }
    return values | changes


def int8(change, low, high):
    return {
        "perplexity_change": change,
        "perplexity_change_low": low,
        "perplexity_change_high": high,
        "bytes_float": 100,
        "bytes_int8": 26,
    }


PRETRAIN, SFT, ALIGN, INT8, SERVER = (check.name for check in checks(summary()))


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"align_reward": {"before": 0.4, "after": 0.5, "interval": [-0.01, 0.2], "questions": 9}}, [ALIGN]),
        # A point estimate out of bounds may be chance; a whole interval is not.
        ({"int8": int8(-0.006, -0.008, -0.004)}, []),
        ({"int8": int8(-0.006, -0.007, -0.0051)}, [INT8]),
        ({"int8": int8(0.009, 0.0051, 0.02)}, [INT8]),
        ({"chat": {"answers": [{"right": False, "reply": " ", "events": 3}]}}, [SERVER]),
        ({"chat": {"answers": [{"right": True, "reply": "a", "events": 1}]}}, [SERVER]),
        ({"sft_exact_match": {"before": 0.3, "after": 0.6, "interval": [0.19, 0.4], "questions": 9}}, [SFT]),
        ({"not_done": {"evaluate": "the stage evaluate failed: no room"}}, [PRETRAIN, SFT, ALIGN]),
    ],
)
def test_checks_judge_the_numbers(changes, failed):
    assert [check.name for check in checks(summary(**changes)) if not check.passed] == failed


def test_failed_check_names_a_remedy(tmp_path):
    failed = [check for check in checks(summary(int8=int8(0.009, 0.006, 0.02))) if not check.passed]
    assert str(ChecksFailed(failed)) == (
        "int8 costs at most 0.5% perplexity: +0.900% [+0.600%, +2.000%], 74% fewer bytes; the float model is served"
        " instead; maxlm export MODEL OUTPUT --max-perplexity-change X allows more"
    )


def test_failed_stage_skips_only_its_dependents(tmp_path, monkeypatch, capsys):
    """The stages are replaced: this tests the other stages, summary, report and exit code."""
    ran = []
    for name in STAGES:
        monkeypatch.setattr(Quickstart, name, lambda job, name=name: ran.append(name))

    def fail(job):
        raise DataError("tasks: no room")

    monkeypatch.setattr(Quickstart, "sft", fail)
    write_manifest(
        tmp_path / "pretrain", stage="train/pretrain", inputs={}, config={}, metrics={"tokens_per_second": 9}
    )
    assert run(argparse.Namespace(output=str(tmp_path), overrides=[], json=False)) == 2
    printed = capsys.readouterr()
    assert ran == ["documents", "tokenizer", "rows", "tasks", "pretrain"]
    assert printed.err.endswith("maxlm: tasks: no room\n")
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept["not_done"]["chat"] == "the stage chat needs align, which did not complete"
    assert not any(check["passed"] for check in kept["checks"])
    assert "which did not complete" in (tmp_path / "report.html").read_text()


def test_model_no_better_than_bigrams_fails():
    bits = summary()["bits_per_byte"] | {"pretrain": {"value": 2.1, "low": 2.0, "high": 2.25}}
    assert not checks(summary(bits_per_byte=bits))[0].passed
