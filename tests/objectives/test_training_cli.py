"""`maxlm train` and `maxlm preview`: their output and error messages."""

import json
from html.parser import HTMLParser
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


class _Tokens(HTMLParser):
    """The tokens of a page: (text, what is shown when pointing at it, classes); and all tags."""

    def __init__(self, page: str):
        super().__init__()
        self.tokens, self.tags, self._open = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self._open = attributes if "data-about" in attributes else None

    def handle_data(self, data):
        if self._open is not None:
            self.tokens.append((data, self._open["data-about"], self._open["class"].split()))
            self._open = None


def test_preview_as_a_page_shows_every_token_with_its_weight(write_config, tmp_path, capsys):
    records = [chat("sky", "blue"), chat("grass", "green")]
    records[1]["messages"][1]["weight"] = 0.5
    path = write_config("sft", records, row_length=64)
    # All text is escaped.
    path = Path(path).rename(tmp_path / "<script>.yaml")
    page_path = tmp_path / "page.html"
    assert main(["preview", str(path), "-n", "1", "--html", str(page_path)]) == 0
    assert capsys.readouterr().out == f"wrote {page_path}\n"
    page = page_path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;.yaml" in page
    assert "http" not in page.replace("http-equiv", "")
    found = _Tokens(page)
    text = "".join(token for token, _, _ in found.tokens)
    assert "<|bos|><|user|>grass<|end|><|assistant|>green<|end|>" in text
    learned = "".join(token for token, _, classes in found.tokens if "learned" in classes)
    assert sorted(learned.removesuffix("<|end|>").split("<|end|>")) == ["blue", "green"]
    ends = [about for token, about, classes in found.tokens if token == "<|end|>" and "learned" in classes]
    assert sorted(about.splitlines()[-1] for about in ends) == ["loss weight 0.5", "loss weight 1"]
    assert {about.splitlines()[1].split(", ")[1] for _, about, _ in found.tokens} == {"segment 1", "segment 2"}
    assert all("control" in classes for token, _, classes in found.tokens if token == "<|bos|>")
    assert f"{tmp_path}/sft.jsonl:1" in page


def test_preview_page_that_cannot_be_written_is_one_sentence(write_config, tmp_path, capsys):
    path = write_config("sft", [chat("sky", "blue")])
    assert main(["preview", path, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html: cannot be written: No such file or directory; give another file" in capsys.readouterr().err


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
    kinds = {"dpo": "preference", "online_dpo": "online_preference", "grpo": "policy", "safe_ppo": "policy"}
    assert config.objective.kind == kinds.get(path.stem, path.stem)
    assert len(path.read_text().splitlines()) < 60
    assert set(yaml.safe_load(path.read_text())) <= set(type(config).model_fields)
