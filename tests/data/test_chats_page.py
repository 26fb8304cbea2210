"""The examples of docs/chats.md are what they say."""

import re
from pathlib import Path

import pytest
import yaml

from maxlm.config.load import parse_config
from maxlm.data.examples.chat import PackedChats
from maxlm.prompts.named_templates import template_names
from maxlm.tokenizer.codec import Tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "chats.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("lines", blocks("json"))
def test_every_form_of_a_file_is_read(lines, tiny_tokenizer_folder, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(lines, encoding="utf-8")
    packed = PackedChats.read(path, Tokenizer.load(tiny_tokenizer_folder), row_length=2000)
    places = sorted(place for row in range(len(packed)) for place in packed.places(row))
    assert places == [f"{path}:{line}" for line in range(1, lines.count("\n") + 1)]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_settings_are_valid(text):
    run = {"kind": "train", "output": "out", "init_from": "start", "objective": {"kind": "sft", "train_file": "a"}}
    given = yaml.safe_load(text)
    config = parse_config(run | given)
    for key, value in given.get("objective", {}).items():
        assert getattr(config.objective, key) == value


def test_every_template_is_listed():
    assert re.findall(r"^\| `(\w+)` \| [A-Z]", PAGE, re.MULTILINE) == template_names()
