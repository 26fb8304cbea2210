"""Run a command in this process, and check the rules that every command follows."""

import contextlib
import io
import os
from pathlib import Path

import yaml
from hypothesis import HealthCheck, settings

from maxlm import cli

# To run more and different cases: MAXLM_FUZZ=10000 python -m pytest tests/fuzz
_BY_HAND = int(os.environ.get("MAXLM_FUZZ", "0"))


def cases(number: int) -> settings:
    """Settings for a number of cases, the same in every run of the suite."""
    return settings(
        max_examples=_BY_HAND or number,
        derandomize=not _BY_HAND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `maxlm WORDS`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


def check(*words: object) -> int:
    """Run a command that must either succeed or report a user error; returns the exit code."""
    code, _, err = run(*words)
    reported = f"maxlm {' '.join(map(repr, words))}\nexit code {code}\n{err[-4000:]}"
    assert code in (0, 1, 2, 3), reported
    assert "Traceback" not in err, reported
    lines = err.splitlines()
    if code:
        assert any(line.startswith("maxlm: ") or ": error: " in line for line in lines), reported
        assert len(lines) <= 40, reported
        assert max(map(len, lines)) <= 1000, reported
    return code


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def build(place: Path, uri: Path, **source: object) -> int:
    """Build documents of a source and show them; returns the exit code."""
    config = {
        "kind": "data",
        "output": str(place / "built"),
        "tokenizer": "none",
        "sources": [{"uri": str(uri), **source}],
        "clean": {"min_characters": 1},
        "valid_fraction": 0.0,
        "workers": 1,
    }
    write(place / "build.yaml", yaml.safe_dump(config).encode())
    code = check("data", "build", "build.yaml", "--stop-after", "documents")
    if code == 0:
        assert check("data", "show", "built", "--json") == 0
        assert check("data", "show", "built", "--rejects") == 0
    return code
