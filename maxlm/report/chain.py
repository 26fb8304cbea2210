"""Provenance: every stage's manifest, from documents to the final model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.report.text import flat_facts, to_dict

_HASH_CHARACTERS = 12
_KEY_FACTS = 14


@dataclass(frozen=True)
class StageInput:
    """An input of a stage; `made_by` is the index in the chain of the stage that produced it, or None."""

    name: str
    path: str
    hash: str
    made_by: int | None
    is_same: bool


@dataclass(frozen=True)
class Stage:
    """A manifest as shown on a page; `folded` has (title, text) pairs."""

    name: str
    folder: str
    created: str
    hash: str
    inputs: list[StageInput]
    facts: list[tuple[str, str]]
    folded: list[tuple[str, str]]


def view_chain(chain: list[dict[str, Any]], folder: Path) -> list[Stage]:
    """Stages in execution order; paths are relative to `folder`."""
    places = {str(item.get("folder")): index for index, item in enumerate(chain)}
    return [_stage(item, chain, places, folder) for item in chain]


def _stage(item: dict, chain: list[dict], places: dict[str, int], folder: Path) -> Stage:
    own_folder = str(item.get("folder", ""))
    return Stage(
        str(item.get("stage", "stage")),
        _relative(own_folder, folder),
        str(item.get("created", "")),
        _short(item.get("hash")),
        [
            _input(name, to_dict(value), own_folder, chain, places, folder)
            for name, value in to_dict(item.get("inputs")).items()
        ],
        flat_facts(to_dict(item.get("metrics")), limit=_KEY_FACTS),
        [
            (name.capitalize(), json.dumps(value, indent=2, ensure_ascii=False))
            for name in ("config", "versions")
            if (value := to_dict(item.get(name)))
        ],
    )


def _input(
    name: str, value: dict, own_folder: str, chain: list[dict], places: dict[str, int], folder: Path
) -> StageInput:
    absolute = os.path.normpath(os.path.join(own_folder, str(value.get("path", ""))))
    index, digest = places.get(absolute), value.get("hash")
    is_same = index is not None and chain[index].get("hash") == digest
    return StageInput(name, _relative(absolute, folder), _short(digest), index, is_same)


def _relative(path: str, folder: Path) -> str:
    """Relative to the report if it is nearby, else absolute."""
    if not path:
        return ""
    relative = os.path.relpath(path, folder.resolve())
    return path if relative.startswith(os.path.join("..", "..", "..")) else relative


def _short(digest: Any) -> str:
    return digest[:_HASH_CHARACTERS] if isinstance(digest, str) else ""
