"""One trial in its own process: `python -m maxlm.sweep.child CONFIG`.

A crash or running out of memory ends only the trial, not the sweep.
"""

import sys

from maxlm.errors import DivergenceError, MaxlmError
from maxlm.runtime.platform import prepare_platform

# The exit code of a trial that diverged.
DIVERGED = 10


def main(path: str) -> int:
    """Train as `maxlm train` does; return the exit code, DIVERGED for a diverged run."""
    prepare_platform()
    from maxlm.config.load import load_config
    from maxlm.runtime.distributed import stop_with_parent
    from maxlm.train.run import train

    # When the sweep ends, for any reason, its trial saves and stops.
    stop_with_parent()
    try:
        train(load_config(path, kind="train"))
    except MaxlmError as error:
        print(f"maxlm: {error}", file=sys.stderr)
        return DIVERGED if isinstance(error, DivergenceError) else error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
