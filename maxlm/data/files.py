"""The files that a source names, and the prefixes of their documents' ids."""

import difflib
import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from maxlm.config.data import SourceConfig
from maxlm.data.embedded import URI as EMBEDDED
from maxlm.errors import DataError
from maxlm.runtime.progress import console

_FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".ndjson": "json",
}
_COMPRESSIONS = (".gz", ".zst")
# Outputs of a build in its folder; with suffix .tmp while they are being written.
_BUILT = ("documents", "packed", "rejects.jsonl", "manifest.json")


@dataclass(frozen=True)
class SourceFile:
    """A file to read; `name` is unique among the files of a build, and the prefix of its documents' ids."""

    path: Path
    name: str
    format: str


@dataclass(frozen=True)
class FoundSource:
    """A source and its files; `name` is the id prefix of a dataset without files."""

    config: SourceConfig
    name: str
    files: tuple[SourceFile, ...]


def find_sources(sources: Iterable[SourceConfig], *, output: Path | None = None) -> list[FoundSource]:
    """Find the files that each source names, in the order of their paths.

    A file's name is its path relative to the source's part without patterns, so it does not depend on the location of a
    folder. If an earlier file has that name, parent folders are prepended until it is unique.

    Args:
      output: the folder of a build. Files that a build wrote there are not read.

    Raises:
      DataError: if a source matches nothing, or something that is not a file, or has an unknown format.
    """
    taken: set[str] = set()
    found = []
    for source in sources:
        files = []
        if not is_catalogue(source.uri):
            for path, name in _named_files(source.uri, output):
                files.append(SourceFile(path, _free_name(name, path, taken), _format(path)))
        name = _free_name(source.uri, None, taken)
        found.append(FoundSource(source, name, tuple(files)))
    return found


def is_catalogue(uri: str) -> bool:
    """Whether a source is the embedded corpus, or a dataset of TFDS or Hugging Face, instead of files."""
    return uri == EMBEDDED or uri.startswith(("tfds:", "hf:"))


def no_such_file(path: str | Path) -> str:
    """The end of a message about a missing file, with the closest existing name."""
    path = Path(path)
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return "there is no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def unreadable(path: Path) -> str | None:
    """Why a path is not a readable file; None if it is one."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist; fix or remove the link"
    if not path.exists():
        return no_such_file(path)
    if path.is_dir():
        return f"is a folder; give the files in it, such as {path}/*.jsonl"
    if not path.is_file():
        return "is a pipe or device, which cannot be read more than once; write its content to a file first"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    return None


def _named_files(uri: str, output: Path | None) -> list[tuple[Path, str]]:
    """Each file of a source, with its path relative to the source's fixed part."""
    fixed, rest = _fixed_part(os.path.expanduser(uri))
    if rest is None:
        found = [(fixed, fixed.name)] if os.path.lexists(fixed) else []
    else:
        names = sorted({Path(name) for name in glob.glob(str(rest), root_dir=fixed, recursive=True)})
        # A pattern may match folders, as in a shell; one that is named like a file is an error of the user.
        found = [(fixed / name, str(name)) for name in names if not (fixed / name).is_dir() or _format_of(name)]
    if not found:
        raise DataError(f"source {uri}: {_nothing_there(uri)}")
    wanted = [(path, name) for path, name in found if not _is_built(path, output)]
    if num_built := len(found) - len(wanted):
        if not wanted:
            raise DataError(f"source {uri}: matches only files that a build wrote into {output}, its own output")
        console.print(f"source {uri}: {num_built} files that a build wrote into {output} are not read", markup=False)
    for path, _ in wanted:
        if problem := unreadable(path):
            raise DataError(f"source {uri}: {problem}" if rest is None else f"source {uri}: {path} {problem}")
    return wanted


def _fixed_part(pattern: str) -> tuple[Path, Path | None]:
    """The longest prefix that exists literally, including any brackets, and the remaining pattern."""
    parts = Path(pattern).parts
    fixed = Path(*parts[:1]) if Path(pattern).is_absolute() else Path()
    parts = parts[len(fixed.parts) :]
    for number, part in enumerate(parts):
        if not os.path.lexists(fixed / part):
            return fixed, Path(*parts[number:])
        fixed = fixed / part
    return fixed, None


def _free_name(name: str, path: Path | None, taken: set[str]) -> str:
    plain = free = os.fsencode(name).decode(errors="backslashreplace")
    folders = list(path.absolute().parts[1 : -len(Path(name).parts)]) if path else []
    while free in taken and folders:
        free = os.fsencode(f"{folders.pop()}/{free}").decode(errors="backslashreplace")
    number = 2
    while free in taken:  # one file is read in two formats
        free, number = f"{plain}#{number}", number + 1
    taken.add(free)
    return free


def _is_built(path: Path, output: Path | None) -> bool:
    if output is None or not path.resolve().is_relative_to(output.resolve()):
        return False
    inside = path.resolve().relative_to(output.resolve()).parts
    return bool(inside) and inside[0].removesuffix(".tmp") in _BUILT


def _nothing_there(uri: str) -> str:
    if uri.startswith("python:"):
        return f"the embedded corpus is {EMBEDDED}"
    return no_such_file(os.path.expanduser(uri))


def _format(path: Path) -> str:
    if found := _format_of(path):
        return found
    raise DataError(
        f"source {path}: its format is unknown; it must end in {', '.join(_FORMATS)}, optionally with .gz or .zst"
    )


def _format_of(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return _FORMATS.get(name.suffix.lower())
