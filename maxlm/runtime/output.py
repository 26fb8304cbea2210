"""Whether a stage can write its folder, and whoever comes next find it there: asked before anything is done for it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from maxlm.errors import ConfigError
from maxlm.runtime.storage import absolute_path, is_remote, storage_path

Stage = Literal["data", "tokenizer", "train", "export"]

# What tells a folder of each stage before its manifest is written, which comes last.
_SIGNS = {
    "data": "documents/manifest.json",
    "export": "bundle.json",
    "train": "goodput.jsonl",
    "tokenizer": "tokenizer.model",
}
# Folders within those of a stage that it makes and removes as it likes.
_INNER: dict[str, tuple[str, ...]] = {
    "data": ("documents", "documents.tmp", "packed", "packed.tmp"),
    "export": ("tokenizer",),
    "train": ("checkpoints", "tokenizer", "tokenizer.tmp", "tensorboard"),
}
# Bytes of a path: the longest that Linux takes, and what stages write below their folder, such as a piece of an array.
_LONGEST_PATH, _ROOM = 4096, 256


def check_output(output: str | os.PathLike, stage: Stage, *, key: str = "output", suffix: int = 0) -> None:
    """Raise ConfigError, naming `key`, where a stage could not write its folder, or would write into another's.

    Args:
      output: the folder, which need not be there.
      stage: that writes it; a folder that the same stage has made is its own to update.
      suffix: bytes that it puts to the folder's name, to write beside it and rename; 0 where it writes into the folder.
    """
    given = os.fspath(output)
    if (problem := _name_problem(given)) is None:
        path = absolute_path(given)
        if not is_remote(path):
            problem = _place_problem(Path(path), suffix) or _owner_problem(Path(path), stage)
    if problem is not None:
        shown = given if given.isprintable() else ascii(given)
        raise ConfigError([f"{key}: {shown[:200]} {problem}"])


def stage_of(folder: str | os.PathLike) -> str | None:
    """The stage that has made a folder, or has begun to, by its manifest or what else it writes; None for no stage."""
    folder = storage_path(folder)
    try:
        made_by = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        made_by = next((stage for stage, sign in _SIGNS.items() if (folder / sign).exists()), None)
    return None if made_by is None else str(made_by).partition("/")[0]


def _name_problem(given: str) -> str | None:
    if not given:
        return "is empty; give a folder"
    if "\0" in given:
        return "holds a NUL character, which no folder's name can; give another"
    try:
        given.encode()
    except UnicodeEncodeError:
        return "is no UTF-8 text, which manifests could not name; rename the folder"
    if given.startswith("~"):
        return f"would be a folder that is named {given.partition('/')[0]!r}; write your home folder out, or ./{given}"
    return None


def _place_problem(path: Path, suffix: int) -> str | None:
    """Why a folder cannot be made at a path, or nothing be written into it."""
    if (size := len(os.fsencode(path))) > _LONGEST_PATH - _ROOM:
        return f"is a path of {size} bytes, and at most {_LONGEST_PATH - _ROOM} can be used; give a shorter one"
    parent = next(parent for parent in _upwards(path) if os.path.lexists(parent))
    if os.path.islink(parent) and not parent.exists():
        target = os.readlink(parent)
        return f"leads to {parent}, a link to {target}, which is not there; make that folder, or remove the link"
    if not parent.is_dir():
        return (
            "is a file; give a folder" if parent == path else f"leads through {parent}, which is a file; give a folder"
        )
    longest = os.pathconf(parent, "PC_NAME_MAX") - suffix
    for name in path.relative_to(parent).parts or (path.name,):
        if (size := len(name.encode())) > longest:
            return f"has a name of {size} bytes, and at most {longest} can be used; give a shorter one"
    # What stands there is replaced by what was written beside it.
    written = parent.parent if suffix and parent == path else parent
    if not os.access(written, os.W_OK | os.X_OK):
        return f"cannot be written: {written} is read-only for you; give another folder, or change its rights"
    return None


def _owner_problem(path: Path, stage: Stage) -> str | None:
    """Which other stage's folder a path is, or lies in among what that stage makes and removes."""
    made_by = stage_of(path) if path.is_dir() else None
    if made_by not in (None, stage):
        return f"is a folder of the stage {made_by!r}, which this one must not write into; give a new folder"
    for parent in path.parents:
        made_by = stage_of(parent)
        if made_by in _INNER and path.relative_to(parent).parts[0] in _INNER[made_by]:
            return f"lies in {parent}, a folder of the stage {made_by!r}, among its own files; give a new folder"
    return None


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents
