"""Reports of exceptions that are not user errors: out of memory, and bugs."""

import os
import platform
import sys
import tempfile
import traceback
from importlib.metadata import version

# If set, the traceback is printed directly.
TRACEBACK_VARIABLE = "MAXLM_TRACEBACK"
_MEMORY = "use a smaller batch_size or row_length, a larger accumulate, a smaller model, or a larger machine"


def out_of_memory(error: BaseException) -> str | None:
    """The sentence for running out of host or accelerator memory; None for every other error."""
    message = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not (
        # By name, because importing JAX takes longer than most commands.
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in message
    ):
        return None
    return f"out of memory{f' ({message[:200]})' if message else ''}; {_MEMORY}"


def report_bug(error: BaseException) -> str:
    """Write the traceback to a separate file and return a sentence that names the file."""
    trace = "".join(traceback.format_exception(error))
    if os.environ.get(TRACEBACK_VARIABLE):
        print(trace, file=sys.stderr)
        return f"this is a bug in maxlm: {_brief(error)}"
    try:
        handle, name = tempfile.mkstemp(prefix="maxlm-bug-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(
                f"maxlm {version('maxlm')}, Python {platform.python_version()}, {platform.platform()}\n\n{trace}"
            )
    except OSError:
        return f"this is a bug in maxlm: {_brief(error)}; set {TRACEBACK_VARIABLE}=1 to see where"
    return (
        f"this is a bug in maxlm: {_brief(error)}; please report it with {name}"
        f" ({TRACEBACK_VARIABLE}=1 prints its content)"
    )


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
