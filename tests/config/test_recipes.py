"""Recipes are found by name, in a checkout and wherever pip has installed them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm.cli import main
from maxlm.config import load_config
from maxlm.config.recipes import describe_recipe, find_config, recipes
from maxlm.errors import ConfigError

ROOT = Path(__file__).parents[2]
FOLDER = "share/maxlm/configs"


@pytest.mark.parametrize("name", ["post/sft", "post/sft.yaml", "configs/post/sft.yaml", "configs/post/sft"])
def test_recipe_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / "configs" / "post" / "sft.yaml"
    assert load_config(name, ["steps=7"], kind="train").steps == 7


def test_user_file_takes_precedence_over_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "post").mkdir()
    (tmp_path / "post" / "sft.yaml").write_text("kind: tokenizer\ninput: a\noutput: b\n")
    assert load_config("post/sft.yaml").kind == "tokenizer"


@pytest.mark.parametrize(
    ("name", "message"),
    [("post/stf", "did you mean post/sft?"), ("x/y/z", "`maxlm config list` lists the recipes")],
)
def test_unknown_name_suggests_the_closest(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no such file") as error:
        find_config(name)
    assert message in str(error.value)


def test_all_recipes_are_listed_with_kind_and_purpose(capsys):
    assert main(["config", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # `maxlm models` lists those.
    listed = {name: path for name, path in recipes().items() if not name.startswith("models/")}
    assert [line.split()[0] for line in lines] == sorted(listed)
    for path in listed.values():
        kind, sentence = describe_recipe(path)
        assert kind in ("train", "data", "tokenizer", "sweep", "feedback", "constitution", "prompt")
        assert len(sentence) > 10, path


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Site-packages of an installed copy, with recipes two folders above, as with `pip install --user`."""
    site = tmp_path / "lib" / "site-packages"
    for name in ("maxlm/__init__.py", "maxlm/errors.py", "maxlm/config/recipes.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text((ROOT / name).read_text())
    (site / "maxlm" / "config" / "__init__.py").write_text("")
    (tmp_path / FOLDER / "post").mkdir(parents=True)
    (tmp_path / FOLDER / "post" / "sft.yaml").write_text("{}")
    metadata = site / "maxlm-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: maxlm\nVersion: 0.1.0\n")
    (metadata / "RECORD").write_text(f"maxlm/__init__.py,,\n../../{FOLDER}/post/sft.yaml,,\n")
    return site


def folder_of(site: Path, call: str = "recipe_folder()") -> subprocess.CompletedProcess:
    script = f"from maxlm.config.recipes import find_config, recipe_folder; print({call})"
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=site, capture_output=True, text=True, timeout=60
    )


def test_an_installed_package_finds_its_recipes(installed: Path):
    done = folder_of(installed)
    assert done.stdout.strip() == str((installed.parents[1] / FOLDER).resolve()), done.stderr


def test_missing_recipes_are_reported(installed: Path):
    (installed.parents[1] / FOLDER / "post" / "sft.yaml").unlink()
    done = folder_of(installed)
    assert "has no recipes; reinstall it" in done.stderr
    # Files can still be read without recipes, and a missing file is reported as such.
    (installed / "mine.yaml").write_text("{}")
    assert folder_of(installed, "find_config('mine.yaml')").stdout.strip() == "mine.yaml"
    assert "yours.yaml: there is no such file" in folder_of(installed, "find_config('yours.yaml')").stderr


def test_checkout_uses_its_own_recipes():
    assert folder_of(ROOT).stdout.strip() == str(ROOT / "configs")
