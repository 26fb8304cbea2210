"""`maxlm train` and `maxlm preview`: their output and error messages."""

import json
from pathlib import Path

import pytest
import yaml
from toy_task import chat, make_config, question, write_lines

from maxlm.cli import main
from maxlm.config.load import dump_yaml, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "post").glob("*.yaml"))


@pytest.fixture
def write_config(tuned, tmp_path):
    """(objective kind, records, settings) -> the path of a configuration."""

    def write(kind, records, objective=None, **settings):
        data = write_lines(tmp_path / f"{kind}.jsonl", records)
        objective = {"kind": kind, "train_file": data, **(objective or {})}
        config = make_config(tmp_path / "run", init_from=str(tuned[0]), objective=objective, **settings)
        path = tmp_path / f"{kind}.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        return str(path)

    return write


def test_preview_shows_learned_tokens_and_chat_boundaries(write_config, capsys):
    path = write_config("sft", [chat("sky", "blue"), chat("grass", "green")])
    assert main(["preview", path, "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("⟦learned⟧")
    assert "<|bos|><|user|>sky<|end|><|assistant|>⟦blue<|end|>⟧" in out
    assert "<|bos|><|user|>grass<|end|><|assistant|>⟦green<|end|>⟧" in out
    assert "│<|bos|>" in out
    assert "padding" in out


def test_preview_shows_both_answers_of_a_pair(write_config, capsys):
    path = write_config("preference", [{"prompt": question("coin"), "chosen": "yes", "rejected": "no"}])
    assert main(["preview", path, "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "chosen\n<|bos|><|user|>coin<|end|><|assistant|>⟦yes<|end|>⟧" in out
    assert "rejected\n<|bos|><|user|>coin<|end|><|assistant|>⟦no<|end|>⟧" in out


def test_preview_shows_a_prompt_and_its_answer(write_config, capsys):
    path = write_config("policy", [{"prompt": question("coin\none"), "answer": "yes"}], {"max_new_tokens": 6})
    assert main(["preview", path, "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "coin↵\none<|end|><|assistant|>" in out
    assert "answer: yes   reward: exact_match" in out


def test_preview_colors_by_loss_weight_if_terminal_has_colors(write_config, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    path = write_config("sft", [chat("sky", "blue")])
    assert main(["preview", path, "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "⟦" not in out


def test_train_prints_run_folder_and_final_metrics(write_config, tmp_path, capsys):
    path = write_config("sft", [chat("sky", "blue")], {"valid_file": str(tmp_path / "sft.jsonl")}, steps=2)
    assert main(["train", path]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/run: 2 of 2 steps, finished" in out
    assert "valid loss" in out
    # The same command again finds a finished run.
    assert main(["train", path, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == f"{tmp_path}/run"
    assert report["steps"] == 2


def test_user_error_is_one_sentence_and_exit_code_2(write_config, tmp_path, capsys):
    path = write_config("sft", [chat("sky", "blue")])
    assert main(["train", path, "objective.train_file=nowhere.jsonl"]) == 2
    assert "nowhere.jsonl: there is no such file" in capsys.readouterr().err
    assert main(["train", path, "stepz=3"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err
    assert main(["preview", path, "kind=data"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_are_valid_short_and_of_the_kind_in_their_name(path):
    config = load_config(path, kind="train")
    assert config.objective.kind == {"dpo": "preference", "grpo": "policy"}.get(path.stem, path.stem)
    assert len(path.read_text().splitlines()) < 60
    assert set(yaml.safe_load(path.read_text())) <= set(type(config).model_fields)
