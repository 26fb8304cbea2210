"""All that the docs name exists: linked files, commands, options, settings."""

import re
import shlex
from pathlib import Path

import pytest

from maxlm.cli import COMMANDS, parse
from maxlm.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "gcp/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
HELP = [ROOT / f"{name.replace('maxlm_gcp', 'gcp').replace('.', '/')}.py" for name in ("maxlm.cli", *COMMANDS)]
LINK = re.compile(r"\]\(([^)#\s]+)")
FILE = re.compile(r"(?<![\w/.-])(?:configs|docs|gcp|maxlm|tests|tools)/[\w/.-]*\.(?:md|py|sh|yaml)\b")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(path: Path) -> list[str]:
    """Lines that start with `maxlm `: in fenced blocks of a page, and in the examples of a command's help."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE):
        text = text.replace(f"${name}", value)
    text = re.sub(r"\\+\n\s*", "", text)
    return re.findall(r"^ *(?:example: |\$ |[A-Z_]+=\S+ )*maxlm (\w.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_linked_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [file for file in FILE.findall(text) if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("path", [*PAGES, *HELP], ids=named)
def test_documented_commands_and_settings_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(path):
        # The explanation of an example is separated by two spaces.
        words = shlex.split(re.split(r"\s{2,}(?![\s-])", command)[0], comments=True)
        args = parse(words)
        if hasattr(args, "config") and hasattr(args, "overrides") and Path(args.config or "").is_file():
            load_config(args.config, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_whole_configurations_on_pages_are_valid(page, tmp_path):
    """YAML blocks that begin with `kind:`, after a comment or not."""
    for block in re.findall(
        r"^```yaml\n((?:#.*\n)*kind: .*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
        load_config(tmp_path / "block.yaml")


def test_index_links_all_pages():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))}
    assert [page for page in sorted(index.parent.glob("*.md")) if page != index and page not in linked] == []


def test_removed_command_is_detected(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```sh\nA=1 maxlm train a.yaml \\\n    --fast  # quick\n```\nmaxlm not this\n")
    [command] = commands(page)
    assert command == "train a.yaml --fast  # quick"
    with pytest.raises(SystemExit):
        parse(shlex.split(command, comments=True))


def test_the_page_on_objectives_shows_the_real_module():
    page = (ROOT / "docs" / "adding-an-objective.md").read_text(encoding="utf-8")
    assert (ROOT / "maxlm" / "objectives" / "reward.py").read_text(encoding="utf-8") in page
