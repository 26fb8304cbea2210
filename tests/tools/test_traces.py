"""Regression traces, compared before and after a refactoring."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import traces


@pytest.mark.parametrize(
    ("old", "new", "rtol", "places"),
    [
        ({"a": [1, 2.0]}, {"a": [1, 2.0]}, 0, []),
        ({"a": [1, 2.0]}, {"a": [1, math.nextafter(2.0, 3)]}, 0, ["/a/1"]),
        ({"a": [1, 2.0]}, {"a": [1, math.nextafter(2.0, 3)]}, 1e-6, []),
        ({"a": [1, 2.0]}, {"a": [1, 2.1]}, 1e-6, ["/a/1"]),
        ({"a": [1]}, {"a": [1, 2]}, 1e-6, ["/a"]),
        ({"a": 1}, {"b": 1}, 0, ["/a", "/b"]),
        ({"a": "text"}, {"a": "other"}, 1e-6, ["/a"]),
        ({"sha256": "0"}, {"sha256": "1"}, 0, ["/sha256"]),
        # If the numbers may differ, their hashes will.
        ({"sha256": "0"}, {"sha256": "1"}, 1e-6, []),
        (None, {"a": 1}, 0, [""]),
    ],
)
def test_differences_are_found_and_named(old, new, rtol, places):
    found = traces.differences(old, new, rtol=rtol)
    assert sorted(text.partition(":")[0].split(" is only in")[0] for text in found) == places


@pytest.mark.slow
def test_run_matches_its_trace_and_a_change_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(traces, "STEPS", 4)
    file, only = tmp_path / "traces.json", ["--only", "optimizer sgd"]
    assert traces.main(["record", str(file), *only]) == 0
    traces.trained.cache_clear()
    assert traces.main(["compare", str(file), *only]) == 0
    recorded = json.loads(file.read_text())
    recorded["run: optimizer sgd"]["steps"][3]["loss"] += 1e-9
    file.write_text(json.dumps(recorded))
    traces.trained.cache_clear()
    assert traces.main(["compare", str(file), *only]) == 1
    assert "run: optimizer sgd: DIFFERS in 1 places: /steps/3/loss" in capsys.readouterr().out
    recorded["environment"]["jax"] = "0"
    file.write_text(json.dumps(recorded))
    assert traces.main(["compare", str(file), *only]) == 2
