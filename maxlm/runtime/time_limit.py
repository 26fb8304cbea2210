"""Run functions of the user in threads: beside other work, or for a limited time."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TimeLimitExceeded(Exception):  # noqa: N818 - distinct from the TimeoutError that the function itself may raise
    """A function did not return in time."""


def in_background(function: Callable[[], T]) -> Callable[..., T]:
    """Start a function in a thread. What is returned waits for it, for `seconds` at most if given, and returns or
    raises what the function does.

    Python cannot end a thread: after the limit, it continues in the background until it returns, or the process ends.
    The limit is noticed late if the function holds Python's global lock that long in C code, as `re` does.

    Raises:
      TimeLimitExceeded: in the wait; the function has not returned after `seconds`.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            returned.append(function())
        except BaseException as error:
            raised.append(error)

    # A daemon, so that the process can exit while it hangs.
    thread = threading.Thread(target=call, name="user-function", daemon=True)
    thread.start()

    def wait(seconds: float | None = None) -> T:
        thread.join(seconds)
        if raised:
            raise raised[0]
        if not returned:
            raise TimeLimitExceeded
        return returned[0]

    return wait


def within(seconds: float, function: Callable[[], T]) -> T:
    """What the function returns or raises, in a thread of its own; see `in_background`.

    Raises:
      TimeLimitExceeded: it has not returned after `seconds`.
    """
    return in_background(function)(seconds)
