"""What is told of an exception that nothing before has turned into a sentence."""

import os
import platform
import sys
import tempfile
import traceback
from importlib.metadata import version

# Set to anything, the traceback is printed at once.
TRACEBACK_VARIABLE = "MAXLM_TRACEBACK"
_MEMORY = "take a smaller batch_size or row_length, more accumulate, a smaller model, or a larger machine"


def out_of_memory(error: BaseException) -> str | None:
    """The sentence for want of memory, of this machine or its accelerator; None for every other error."""
    told = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not (
        # By name: importing JAX takes longer than most commands.
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in told
    ):
        return None
    return f"out of memory{f' ({told[:200]})' if told else ''}; {_MEMORY}"


def report_bug(error: BaseException) -> str:
    """Write the traceback to a file of its own and return the sentence that names it."""
    trace = "".join(traceback.format_exception(error))
    if os.environ.get(TRACEBACK_VARIABLE):
        print(trace, file=sys.stderr)
        return f"this is a bug of maxlm: {_brief(error)}"
    try:
        handle, name = tempfile.mkstemp(prefix="maxlm-bug-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(
                f"maxlm {version('maxlm')}, Python {platform.python_version()}, {platform.platform()}\n\n{trace}"
            )
    except OSError:
        return f"this is a bug of maxlm: {_brief(error)}; set {TRACEBACK_VARIABLE}=1 to see where"
    return (
        f"this is a bug of maxlm: {_brief(error)}; please report it with {name}"
        f" ({TRACEBACK_VARIABLE}=1 prints what stands in it)"
    )


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
