"""Retries of transient storage errors, which are told apart from user errors so that a restart may help."""

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from maxlm.errors import FaultError
from maxlm.runtime.progress import console

Result = TypeVar("Result")

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Unreachable or failing storage. Other errors concern a path, its permissions or a full disk: for the user to fix.
_UNREACHABLE = (
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOLINK,
    errno.ESHUTDOWN,
)
# Errors about a missing file or the wrong file type, not about the storage.
_ABOUT_THE_FILE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# TensorStore reports these as text.
_STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED)\b")


@dataclass(frozen=True)
class Retries:
    """Retry `count` times; wait `seconds` * 2^n, times a random 0.5 to 1.5, before the n-th, counted from 0.

    The jitter keeps many processes from retrying at the same moment.
    """

    count: int
    seconds: float

    def wait(self, attempt: int, what: str, error: BaseException) -> None:
        """Report that `what` failed, and sleep."""
        delay = self.seconds * 2**attempt * random.uniform(0.5, 1.5)
        console.print(
            f"{what} failed ({first_line(error)}); retrying in {delay:.1f} s ({attempt + 1} of {self.count})",
            markup=False,
        )
        time.sleep(delay)

    def call(self, action: Callable[[], Result], what: str) -> Result:
        """Call `action()`, retrying on storage errors; raises the error of the last try."""
        for attempt in range(self.count):
            try:
                return action()
            except Exception as error:
                if not is_storage_error(error):
                    raise
                self.wait(attempt, what, error)
        return action()


@contextlib.contextmanager
def storage_faults() -> Iterator[None]:
    """Raise FaultError for storage errors in this context: no path or setting is at fault."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _UNREACHABLE:
            raise
        raise FaultError(
            f"{error.filename}: cannot be read or written: {error.strerror}; run the same command to resume when the"
            " storage is available again"
        ) from error


def is_storage_error(error: BaseException) -> bool:
    """Whether the storage failed, as opposed to the files in it."""
    return any(
        (isinstance(link, OSError) and not isinstance(link, _ABOUT_THE_FILE)) or _STATUS.search(str(link))
        for link in _chain(error)
    )


def is_disk_full(error: BaseException) -> bool:
    return any(getattr(link, "errno", None) in _FULL or "No space left" in str(link) for link in _chain(error))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
