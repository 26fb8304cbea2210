"""Check, before any work is done, that a stage can write its output folder and that later stages can read it."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from maxlm.errors import ConfigError
from maxlm.runtime.storage import absolute_path, is_remote, storage_path

Stage = Literal["data", "tokenizer", "train", "export", "import", "model", "feedback", "votes"]

# A file that identifies each stage's folder before its manifest is written, which happens last.
_SIGNS = {
    "data": "documents/manifest.json",
    "export": "bundle.json",
    "train": "goodput.jsonl",
    "tokenizer": "tokenizer.model",
    "feedback": "replies.jsonl",
}
# Subfolders that a stage creates and removes.
_INNER: dict[str, tuple[str, ...]] = {
    "data": ("documents", "documents.tmp", "packed", "packed.tmp"),
    "export": ("tokenizer",),
    "import": ("checkpoints", "tokenizer"),
    "model": ("checkpoints", "tokenizer"),
    "train": ("checkpoints", "tokenizer", "tokenizer.tmp", "tensorboard"),
}
# Bytes of a path: the Linux limit, and the room for files that stages write below their folder, such as array chunks.
_LONGEST_PATH, _ROOM = 4096, 256


def check_output(output: str | os.PathLike, stage: Stage, *, key: str = "output", suffix: int = 0) -> None:
    """Raise ConfigError, naming `key`, if a stage cannot write its folder, or would write into another stage's.

    Args:
      output: the folder, which need not exist.
      stage: the stage that writes it; it may update a folder that the same stage has made.
      suffix: bytes appended to the folder's name to write next to it and rename; 0 if it writes into the folder.
    """
    given = os.fspath(output)
    if (problem := _name_problem(given)) is None:
        path = absolute_path(given)
        if not is_remote(path):
            problem = _place_problem(Path(path), suffix) or _owner_problem(Path(path), stage)
    if problem is not None:
        shown = given if given.isprintable() else ascii(given)
        raise ConfigError([f"{key}: {shown[:200]} {problem}"])


def check_replaceable(output: Path) -> None:
    """Raise ConfigError if a folder has files and no manifest: it is not of a stage, which would replace it."""
    if output.exists() and any(output.iterdir()) and not (output / "manifest.json").is_file():
        raise ConfigError([f"OUT: {output} exists and was not written by maxlm; give a new folder"])


def stage_of(folder: str | os.PathLike) -> str | None:
    """The stage that made or began to make a folder, by its manifest or other files; None for no stage."""
    folder = storage_path(folder)
    try:
        made_by = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        made_by = next((stage for stage, sign in _SIGNS.items() if (folder / sign).exists()), None)
    return None if made_by is None else str(made_by).partition("/")[0]


def temporary_name(name: str) -> str:
    """Name of the folder that becomes the output `name`."""
    return f".{name}.{os.getpid()}.partial"


@contextlib.contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """A new folder that becomes `output` if the block succeeds, and is removed otherwise.

    It is renamed into place: a reader sees the old folder, the new one or briefly none, but never a partial one.
    If it cannot be renamed, the old folder is put back.
    """
    temporary = output.with_name(temporary_name(output.name))
    old = temporary.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            output.rename(old)
        try:
            temporary.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _name_problem(given: str) -> str | None:
    if not given:
        return "is empty; give a folder"
    if "\0" in given:
        return "contains a NUL character, which folder names cannot; give another"
    try:
        given.encode()
    except UnicodeEncodeError:
        return "is not UTF-8 text, which manifests cannot store; rename the folder"
    if given.startswith("~"):
        return f"would be a folder named {given.partition('/')[0]!r}; write your home folder in full, or ./{given}"
    return None


def _place_problem(path: Path, suffix: int) -> str | None:
    """Why a folder cannot be created or written at a path."""
    if (size := len(os.fsencode(path))) > _LONGEST_PATH - _ROOM:
        return f"is a path of {size} bytes, but at most {_LONGEST_PATH - _ROOM} can be used; give a shorter one"
    parent = next(parent for parent in _upwards(path) if os.path.lexists(parent))
    if os.path.islink(parent) and not parent.exists():
        target = os.readlink(parent)
        return f"leads to {parent}, a link to {target}, which does not exist; create that folder, or remove the link"
    if not parent.is_dir():
        return (
            "is a file; give a folder" if parent == path else f"leads through {parent}, which is a file; give a folder"
        )
    longest = os.pathconf(parent, "PC_NAME_MAX") - suffix
    for name in path.relative_to(parent).parts or (path.name,):
        if (size := len(name.encode())) > longest:
            return f"has a name of {size} bytes, but at most {longest} can be used; give a shorter one"
    # An existing folder is replaced by one that was written next to it.
    written = parent.parent if suffix and parent == path else parent
    if not os.access(written, os.W_OK | os.X_OK):
        return f"cannot be written: {written} is read-only for you; give another folder, or change its permissions"
    return None


def _owner_problem(path: Path, stage: Stage) -> str | None:
    """Why a path is another stage's folder, or is inside one among files that the stage creates and removes."""
    made_by = stage_of(path) if path.is_dir() else None
    if made_by not in (None, stage):
        return f"is a folder of the stage {made_by!r}, which this stage must not write into; give a new folder"
    for parent in path.parents:
        made_by = stage_of(parent)
        if made_by in _INNER and path.relative_to(parent).parts[0] in _INNER[made_by]:
            return f"is in {parent}, a folder of the stage {made_by!r}, among its own files; give a new folder"
    return None


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents
