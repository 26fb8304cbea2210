"""Where the recipes lie, and their paths under another folder."""

import json
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import yaml

from maxlm.errors import ConfigError


def config_folder() -> Path:
    """configs/quickstart of the checkout, or of the installed package's shared files.

    Raises:
      ConfigError: there is neither.
    """
    checkout = Path(__file__).resolve().parents[2] / "configs" / "quickstart"
    if checkout.is_dir():
        return checkout
    try:
        installed = files("maxlm") or []
    except PackageNotFoundError:
        installed = []
    for file in installed:  # pip knows where its scheme (venv, user, system) has put them
        if file.match("share/maxlm/configs/quickstart/*.yaml") and Path(file.locate()).is_file():
            return Path(file.locate()).resolve().parent
    raise ConfigError([f"there is no {checkout}, and the installed maxlm has no recipes: install it again with pip"])


def moved_paths(text: str, folder: Path) -> list[str]:
    """Overrides that put every `runs/quickstart/...` of a recipe under `folder`."""
    overrides: list[str] = []

    def visit(node: Any, dotted: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(value, f"{dotted}.{key}" if dotted else key)
        elif isinstance(node, list):
            for index, value in enumerate(node):
                visit(value, f"{dotted}.{index}")
        elif isinstance(node, str) and node.startswith("runs/quickstart/"):
            overrides.append(f"{dotted}={json.dumps(os.path.join(folder, node.removeprefix('runs/quickstart/')))}")

    visit(yaml.safe_load(text), "")
    return overrides
