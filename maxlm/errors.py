"""The few exceptions that a user can cause.

Each carries one sentence: what is wrong, where, and what to do. The command line prints it and exits with the class's
code. Every other exception is a bug of ours.
"""

# Of a bug: what sysexits.h calls an internal software error.
BUG_EXIT_CODE = 70


class MaxlmError(Exception):
    """Base of everything the command line reports as one sentence."""

    exit_code = 2


class ConfigError(MaxlmError):
    """A configuration has mistakes; `problems` holds one line for each. The first 20 are told."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        super().__init__("\n".join(problems[:20] + more))


class DataError(MaxlmError):
    """Input data cannot be used: a missing or empty file, a wrong format, no documents left."""


class TokenizerError(MaxlmError):
    """A tokenizer cannot be trained or loaded, or is not the one that the data or the model was made with."""


class CheckpointError(MaxlmError):
    """A checkpoint is missing, broken, or belongs to another model or tokenizer."""


class TrainingError(MaxlmError):
    """Training cannot go on: too many bad steps in a row, a disk that is full, a mesh that does not fit."""


class DivergenceError(TrainingError):
    """Training has lost its way: step after step has no finite loss, or jumps, and going back has not helped."""


class RequestError(MaxlmError):
    """A request to the generator or server cannot be met: too long, an unknown model, a port in use."""


class FaultError(MaxlmError):
    """A machine, process or storage is gone, or did not come: no setting is to blame, and another start may help."""

    exit_code = 3


class CheckFailed(MaxlmError):  # noqa: N818 - not an error of the command, which did its work
    """The command ran, and a check that it makes did not pass."""

    exit_code = 1
