"""One path type for folders on a disk or in a bucket, such as `gs://bucket/name`."""

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import xxhash
from etils import epath

from maxlm.errors import ConfigError
from maxlm.runtime.progress import console

# Names that Orbax, TensorStore and etils handle. They take some others for patterns (`[1]`), separators (`\\`) or
# buckets (`gs:`), and files written under such names cannot be read.
_PLAIN_NAME = re.compile(r"[\w .+=@,%~-]*")


def storage_path(path: str | os.PathLike) -> epath.Path:
    """`path` for reading and writing, local or in a bucket; `pathlib` would take a bucket for a local folder `gs:`.

    Raises:
      ConfigError: it names a bucket but the package for buckets is not installed, or it names an unknown kind of
        storage.
    """
    given = os.fspath(path)
    try:
        path = epath.Path(path)
    except KeyError:
        raise ConfigError([f"{given}: starts with an unknown kind of storage; give a folder, or gs://BUCKET"]) from None
    if is_remote(path):
        if not is_remote(given):
            raise ConfigError(
                [f"{given}: would be read as the bucket {path}; give another folder, or a link to this one"]
            )
        try:
            path.exists()
        except ImportError as error:
            raise ConfigError([f"{path}: cannot be reached: {error}; or give a local folder"]) from None
    return path


def absolute_path(path: str | os.PathLike) -> epath.Path:
    """`storage_path`, made absolute if local."""
    path = storage_path(path)
    return path if is_remote(path) else path.resolve()


def real_path(path: str | os.PathLike) -> epath.Path:
    """`absolute_path` with links resolved: the same for all names of one folder."""
    path = storage_path(path)
    return path if is_remote(path) else storage_path(os.path.realpath(path))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def plain_path(path: str | os.PathLike) -> epath.Path:
    """The same file or folder under a name that Orbax and TensorStore can handle: a link in the temporary folder.

    Raises:
      ConfigError: `path` has a name that needs a link, but none can be created.
    """
    path = absolute_path(path)
    odd = [number for number, name in enumerate(path.parts[1:], 1) if not _PLAIN_NAME.fullmatch(name)]
    if is_remote(path) or not odd:
        return path
    target = os.path.join(*path.parts[: odd[-1] + 1])
    links = Path(tempfile.gettempdir()).resolve() / f"maxlm-links-{os.getuid()}"
    # The name depends only on the target: processes may create it concurrently, and it never changes.
    link = links / xxhash.xxh3_128_hexdigest(os.fsencode(target))
    try:
        links.mkdir(mode=0o700, exist_ok=True)
        if links.lstat().st_uid != os.getuid() or not all(map(_PLAIN_NAME.fullmatch, links.parts[1:])):
            raise OSError(f"{links} cannot contain one")
        with contextlib.suppress(FileExistsError):
            link.symlink_to(target)
    except OSError as error:
        characters = " ".join(sorted({repr(c)[1:-1] for c in path.parts[odd[-1]] if not _PLAIN_NAME.fullmatch(c)}))
        raise ConfigError(
            [
                f"{target}: checkpoints cannot be stored under a name with {characters}, and no link to it can be"
                f" created ({error}); give a folder without it, or set TMPDIR to a folder for temporary files"
            ]
        ) from None
    return epath.Path(link, *path.parts[odd[-1] + 1 :])


def files_in(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and its subfolders."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_in(path)
        else:
            yield path


def copy_folder(source: str | os.PathLike, target: epath.Path) -> None:
    """Replace `target` by a copy of a folder's files, so that it is complete or absent at any time."""
    source, temporary = epath.Path(source), target.with_name(target.name + ".tmp")
    for stale in (temporary, target):
        if stale.exists():
            stale.rmtree()
    for file in files_in(source):
        copy = temporary / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    temporary.rename(target)


def relative_path(path: str | os.PathLike, start: str | os.PathLike) -> str:
    """`path` relative to the folder `start`; unchanged if in a bucket, absolute if only `start` is."""
    if is_remote(path) or is_remote(start):
        return os.fspath(path) if is_remote(path) else str(Path(path).resolve())
    return os.path.relpath(path, start)


def resolve_path(path: str, start: str | os.PathLike) -> epath.Path:
    """Resolve a `path` from `relative_path` against the folder `start`."""
    # A bucket's folder / "/a/b" is /a/b up to Python 3.11, and is inside that folder from 3.12 on.
    return storage_path(path) if is_remote(path) or os.path.isabs(path) else storage_path(start) / path


@contextlib.contextmanager
def locked(folder: epath.Path, *, seconds: float) -> Iterator[bool]:
    """Lock a local folder for this process; yields whether the lock was acquired within `seconds`.

    The lock ends with the process, however it ends, so no lock is ever stale. Buckets are not locked.
    """
    if is_remote(folder):
        yield True
        return
    with (Path(folder) / ".lock").open("a") as file:
        yield acquire(file, seconds=seconds)


def acquire(file: IO, *, seconds: float, waiting: str | None = None) -> bool:
    """Try to lock an open file for at most `seconds`; returns whether it is locked. Prints `waiting` if it waits."""
    deadline = time.monotonic() + seconds
    while not _lock(file):
        if time.monotonic() >= deadline:
            return False
        if waiting is not None:
            console.print(waiting, markup=False)
            waiting = None
        time.sleep(0.1)
    return True


def _lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Some network file systems do not support locks.
    except OSError:
        pass
    return True


def read_lines(path: epath.Path) -> list[str]:
    """Complete lines of a JSONL file, [] if it is missing; the last line of a killed run may be truncated."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line.endswith("}")]


class LineLog:
    """An append-only JSONL file. Nothing changes before the first append.

    The first append removes lines that are truncated or that `keep` rejects.
    """

    def __init__(self, path: epath.Path, *, keep: Callable[[str], bool] = lambda line: True):
        self._path = path
        self._lines = [line for line in read_lines(path) if keep(line)]
        self._is_clean = False

    def append(self, line: str) -> None:
        # Objects of a bucket cannot be appended to.
        if self._is_clean and not is_remote(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        self._lines.append(line)
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(f"{kept}\n" for kept in self._lines), encoding="utf-8")
        temporary.replace(self._path)
        if not is_remote(self._path):
            self._is_clean, self._lines = True, []
