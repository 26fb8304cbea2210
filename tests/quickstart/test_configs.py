"""The recipes are found wherever pip has put them, not in a checkout alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = "share/maxlm/configs/quickstart"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Site-packages of an installed copy, its recipes two folders above, as `pip install --user` puts them."""
    site = tmp_path / "lib" / "site-packages"
    for name in ("maxlm/__init__.py", "maxlm/errors.py", "maxlm/quickstart/configs.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text((ROOT / name).read_text())
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "align.yaml").write_text("{}")
    metadata = site / "maxlm-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: maxlm\nVersion: 0.1.0\n")
    (metadata / "RECORD").write_text(f"maxlm/__init__.py,,\n../../{FOLDER}/align.yaml,,\n")
    return site


def config_folder(site: Path) -> subprocess.CompletedProcess:
    script = "from maxlm.quickstart.configs import config_folder; print(config_folder())"
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=site, capture_output=True, text=True, timeout=60
    )


def test_an_installed_package_finds_its_recipes(installed: Path):
    done = config_folder(installed)
    assert done.stdout.strip() == str((installed.parents[1] / FOLDER).resolve()), done.stderr


def test_recipes_that_are_gone_are_told(installed: Path):
    (installed.parents[1] / FOLDER / "align.yaml").unlink()
    done = config_folder(installed)
    assert "has no recipes: install it again" in done.stderr


def test_a_checkout_uses_its_own():
    assert config_folder(ROOT).stdout.strip() == str(ROOT / "configs" / "quickstart")
