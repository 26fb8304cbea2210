"""Two processes roll back together, skip the same batches, and share local checkpoints."""

import json
from pathlib import Path

import pytest
from processes import run_together

from maxlm.data.quarantine import read_quarantine
from maxlm.train.goodput import read_goodput

MESH = {"data": 2, "fsdp": 1, "tensor": 1}

pytestmark = pytest.mark.exhaustive


def run_two(folder: Path, **settings) -> list[dict]:
    """The final output of both: their weights, and the step that they started from."""
    folder.mkdir()
    arguments = [str(folder), json.dumps({"mesh": MESH, **settings})]
    ended = run_together("toy_run:main", [arguments] * 2, folder)
    for one in ended:
        assert one.code == 0, one.errors[-3000:]
    return [json.loads(one.output.splitlines()[-1]) for one in ended]


def test_two_processes_roll_back_together(tmp_path):
    bad = [6, 7, 8]
    local = {"folder": str(tmp_path / "disk"), "every": 2, "keep": 1}
    went_back = run_two(tmp_path / "run", data={"poison": bad}, checkpoint={"every": 6, "keep": 2, "local": local})
    never_met = run_two(tmp_path / "other", data={"leave_out": bad})
    assert len({end["weights"] for end in went_back + never_met}) == 1
    assert [record["batch"] for record in read_quarantine(tmp_path / "run")] == bad
    assert read_goodput(tmp_path / "run").attempts == 1
    assert read_goodput(tmp_path / "run").seconds["rolled_back"] > 0
    # It resumed from the local checkpoint of step 6 or 4, and needs none at its end.
    assert list((tmp_path / "disk").iterdir()) == []
