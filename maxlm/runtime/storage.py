"""Folders on a disk or in a bucket, such as `gs://bucket/name`, behind one kind of path."""

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

# Names that Orbax, TensorStore and etils are known to take. Of others, some are taken for patterns (`[1]`), separators
# (`\\`) or buckets (`gs:`), and what is written under them cannot be read.
_PLAIN_NAME = re.compile(r"[\w .+=@,%~-]*")


def storage_path(path: str | os.PathLike) -> epath.Path:
    """`path` to read and write, wherever it lies; `pathlib` would take a bucket for a local folder named `gs:`.

    Raises:
      ConfigError: it names a bucket, and the package that reaches buckets is not installed; or it names a kind of
        storage that there is none of.
    """
    given = os.fspath(path)
    try:
        path = epath.Path(path)
    except KeyError:
        raise ConfigError([f"{given}: begins with no known kind of storage; give a folder, or gs://BUCKET"]) from None
    if is_remote(path):
        if not is_remote(given):
            raise ConfigError([f"{given}: is taken for the bucket {path}; give another folder, or a link to this one"])
        try:
            path.exists()
        except ImportError as error:
            raise ConfigError([f"{path}: cannot be reached: {error}; or name a local folder"]) from None
    return path


def absolute_path(path: str | os.PathLike) -> epath.Path:
    """`storage_path`, and for a local one from the root of the disk."""
    path = storage_path(path)
    return path if is_remote(path) else path.resolve()


def real_path(path: str | os.PathLike) -> epath.Path:
    """`absolute_path`, with links followed: two names of one folder have the same."""
    path = storage_path(path)
    return path if is_remote(path) else storage_path(os.path.realpath(path))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it lies in a bucket."""
    return "://" in os.fspath(path)


def plain_path(path: str | os.PathLike) -> epath.Path:
    """The same file or folder under a name that Orbax and TensorStore can take: a link in the folder for temporaries.

    Raises:
      ConfigError: `path` has a name that needs a link, and none can be made.
    """
    path = absolute_path(path)
    odd = [number for number, name in enumerate(path.parts[1:], 1) if not _PLAIN_NAME.fullmatch(name)]
    if is_remote(path) or not odd:
        return path
    target = os.path.join(*path.parts[: odd[-1] + 1])
    links = Path(tempfile.gettempdir()).resolve() / f"maxlm-links-{os.getuid()}"
    # The name depends on the target alone: processes may make it at the same time, and it never changes.
    link = links / xxhash.xxh3_128_hexdigest(os.fsencode(target))
    try:
        links.mkdir(mode=0o700, exist_ok=True)
        if links.lstat().st_uid != os.getuid() or not all(map(_PLAIN_NAME.fullmatch, links.parts[1:])):
            raise OSError(f"{links} cannot hold one")
        with contextlib.suppress(FileExistsError):
            link.symlink_to(target)
    except OSError as error:
        characters = " ".join(sorted({repr(c)[1:-1] for c in path.parts[odd[-1]] if not _PLAIN_NAME.fullmatch(c)}))
        raise ConfigError(
            [
                f"{target}: checkpoints cannot be stored under a name with {characters}, nor a link be made to it"
                f" ({error}); give a folder without it, or name a folder for temporaries as TMPDIR"
            ]
        ) from None
    return epath.Path(link, *path.parts[odd[-1] + 1 :])


def files_in(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and in the folders in it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_in(path)
        else:
            yield path


def copy_folder(source: str | os.PathLike, target: epath.Path) -> None:
    """Copy a folder's files in place of what stands at `target`, which is whole or not there at every moment."""
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
    """`path` as seen from the folder `start`; as it is when either lies in a bucket."""
    if is_remote(path) or is_remote(start):
        return os.fspath(path) if is_remote(path) else str(Path(path).resolve())
    return os.path.relpath(path, start)


def resolve_path(path: str, start: str | os.PathLike) -> epath.Path:
    """What `relative_path` has named `path`, as seen from the folder `start`."""
    # A bucket's folder / "/a/b" is /a/b up to Python 3.11, and lies below that folder from 3.12 on.
    return storage_path(path) if is_remote(path) or os.path.isabs(path) else storage_path(start) / path


@contextlib.contextmanager
def locked(folder: epath.Path, *, seconds: float) -> Iterator[bool]:
    """Hold a local folder for this process; gives whether no other one holds it, after at most so many seconds.

    The lock ends with the process, however that ends: none is ever stale. A bucket has none.
    """
    if is_remote(folder):
        yield True
        return
    with (Path(folder) / ".lock").open("a") as file:
        yield acquire(file, seconds=seconds)


def acquire(file: IO, *, seconds: float, waiting: str | None = None) -> bool:
    """Whether this process got the lock of an open file, after at most so many seconds; `waiting` is told meanwhile."""
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
    # Some network disks know no locks.
    except OSError:
        pass
    return True


def read_lines(path: epath.Path) -> list[str]:
    """Whole lines of a file of JSON objects, or none where it is missing: the last one of a killed run may be cut."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line.endswith("}")]


class LineLog:
    """A file of JSON objects that grows by lines. Nothing is changed before the first line is added.

    Then lines that were cut off, or that `keep` drops, are removed.
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
