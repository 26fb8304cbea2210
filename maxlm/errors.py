"""The exceptions that a user can cause.

Each carries one sentence: what is wrong, where, and what to do. The command line prints it and exits with the class's
code. Any other exception is a bug in maxlm.
"""

# Exit code for a bug: EX_SOFTWARE (internal software error) of sysexits.h.
BUG_EXIT_CODE = 70


class MaxlmError(Exception):
    """Base class of all errors that the command line reports as one sentence."""

    exit_code = 2


class ConfigError(MaxlmError):
    """A configuration is invalid; `problems` has one line per mistake, of which the message shows the first 20."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        super().__init__("\n".join(problems[:20] + more))


class DataError(MaxlmError):
    """Input data cannot be used: a missing or empty file, a wrong format, no documents left."""


class TokenizerError(MaxlmError):
    """A tokenizer cannot be trained or loaded, or differs from the one that the data or the model was made with."""


class CheckpointError(MaxlmError):
    """A checkpoint is missing, broken, or belongs to another model or tokenizer."""


class TrainingError(MaxlmError):
    """Training cannot continue: too many bad steps in a row, a full disk, a mesh that does not fit."""


class DivergenceError(TrainingError):
    """Training diverged: loss or gradients stay non-finite or keep spiking, and rollbacks have not helped."""


class RequestError(MaxlmError):
    """A request to the generator or server cannot be served: too long, an unknown model, a port in use."""


class FaultError(MaxlmError):
    """A machine, process or storage failed or never connected: no setting is at fault, and a restart may help."""

    exit_code = 3


class CheckFailed(MaxlmError):  # noqa: N818 - not an error: the command itself succeeded
    """The command ran, but one of its checks failed."""

    exit_code = 1
