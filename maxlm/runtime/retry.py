"""Storage that fails for a while: tried again, or told from a mistake so that another start may help."""

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
# Storage that does not answer, or not soundly. Others are about a path, its rights or a full disk: the user's to mend.
_OUT_OF_REACH = (
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
# What says that a file is missing or of another kind, and nothing of the storage that it lies in.
_ABOUT_THE_FILE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# TensorStore reports these as text.
_STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED)\b")


@dataclass(frozen=True)
class Retries:
    """Try again `count` times; before the n-th, counted from 0, wait `seconds` * 2^n, up to half less or more.

    The waits differ at random, so that many processes do not come back at the same moment.
    """

    count: int
    seconds: float

    def wait(self, attempt: int, what: str, error: BaseException) -> None:
        """Tell that `what` failed, and sleep."""
        delay = self.seconds * 2**attempt * random.uniform(0.5, 1.5)
        console.print(
            f"{what} failed ({first_line(error)}); trying again in {delay:.1f} s ({attempt + 1} of {self.count})",
            markup=False,
        )
        time.sleep(delay)

    def call(self, action: Callable[[], Result], what: str) -> Result:
        """`action()`, tried again while the storage fails; raises what the last try has raised."""
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
    """A file that the storage fails to read or write in here raises FaultError: no path or setting is to blame."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _OUT_OF_REACH:
            raise
        raise FaultError(
            f"{error.filename}: cannot be read or written: {error.strerror}; run the same command to go on when the"
            " storage answers again"
        ) from error


def is_storage_error(error: BaseException) -> bool:
    """Whether the storage failed, which says nothing against the files in it."""
    return any(
        (isinstance(link, OSError) and not isinstance(link, _ABOUT_THE_FILE)) or _STATUS.search(str(link))
        for link in _chain(error)
    )


def is_disk_full(error: BaseException) -> bool:
    return any(getattr(link, "errno", None) in _FULL or "No space left" in str(link) for link in _chain(error))


def first_line(error: BaseException) -> str:
    """What an exception says, in at most 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
