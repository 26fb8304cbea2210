"""Make standard output and error accept every character, in any terminal encoding."""

import codecs
import io
import json
import sys

# For `errors=` of a text file.
ESCAPE = "maxlm.escape"


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Escape as JSON does, so that printed JSON stays valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPE, _escape)


def prepare_streams() -> None:
    """Write characters that the terminal's encoding lacks, and lone surrogates, as `\\uXXXX`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)
