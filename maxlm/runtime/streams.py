"""Standard output and error that take every character, whatever the terminal knows."""

import codecs
import io
import json
import sys

# For `errors=` of a text file.
ESCAPE = "maxlm.escape"


def _escape(error: UnicodeError) -> tuple[str, int]:
    """As JSON writes it, so that what is printed as JSON stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPE, _escape)


def prepare_streams() -> None:
    """Write what a terminal's encoding lacks, or what is half a surrogate pair, as `\\uXXXX`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)
