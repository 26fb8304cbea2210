"""Move the paths of the recipes to another folder."""

import json
import os
from pathlib import Path
from typing import Any

import yaml


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
