"""Where the recipes lie, and their paths under another folder."""

import json
import os
import sys
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
    installed = Path(sys.prefix) / "share" / "maxlm" / "configs" / "quickstart"
    for folder in (checkout, installed):
        if folder.is_dir():
            return folder
    raise ConfigError([f"neither {checkout} nor {installed} is there; install maxlm again"])


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
