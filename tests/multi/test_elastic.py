"""A run resumes on any number of processes and any mesh with the same rows and losses."""

from pathlib import Path

import jax
import numpy as np
import pytest
from processes import by_slurm, run_all, write_config

from maxlm.checkpoint.folder import find_checkpoint
from maxlm.core.tree import flatten
from maxlm.interop.load import load_model
from maxlm.train.metrics import read_metrics

pytestmark = pytest.mark.exhaustive

# Enough steps for processes to agree on a signal before the end, however fast the steps are.
STEPS = 14


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_data_folder):
    """An uninterrupted run of one process, and its report."""
    folder = tmp_path_factory.mktemp("one")
    [ended] = run_all([write_config(folder / "one.yaml", folder / "run", tiny_data_folder, mesh={}, steps=STEPS)])
    return folder / "run", ended.report


def assert_same_run(folder: Path, other: Path) -> None:
    left, right = (flatten(jax.device_get(load_model(path)[0])) for path in (folder, other))
    for path, value in left.items():
        np.testing.assert_allclose(value, right[path], rtol=2e-4, atol=2e-5, err_msg=path)
    left, right = read_metrics(folder), read_metrics(other)
    assert [(record["step"], "loss" in record) for record in left] == [(r["step"], "loss" in r) for r in right]
    for a, b in zip(left, right):
        for name in a.keys() & {"loss", "z_loss", "grad_norm", "valid_loss", "valid_bits_per_byte"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])


def rows_by_step(reports: list[dict]) -> dict[int, list[int]]:
    """The rows of each step that all processes have read, with each part in its place."""
    steps: dict[int, dict] = {}
    for report in reports:
        for step, (shard, num_shards, rows) in report["rows"].items():
            parts = steps.setdefault(int(step), {})
            assert parts.setdefault(shard, (num_shards, rows)) == (num_shards, rows)
    whole = {}
    for step, parts in steps.items():
        num_shards = parts[0][0]
        # Data is prefetched: a step that some process has not reached was not trained on.
        if len(parts) == num_shards:
            whole[step] = [row for shard in range(num_shards) for row in parts[shard][1]]
    return whole


def test_run_on_four_then_two_then_one_process_matches_a_single_process_run(one, tmp_path, tiny_data_folder):
    """Four are stopped by a signal to the third, two by one to the second; each run has its own mesh."""
    unbroken, alone = one
    run = tmp_path / "run"

    def config(name: str, **mesh: int) -> Path:
        return write_config(tmp_path / f"{name}.yaml", run, tiny_data_folder, mesh=mesh, steps=STEPS)

    four = run_all([config("four", fsdp=2, tensor=2)] * 4, actions={2: ["--at", "2", "SIGTERM"]})
    first = int(find_checkpoint(run).name)
    assert 2 <= first < 6
    two = run_all([config("two", tensor=2)] * 2, actions={1: ["--at", "2", "SIGTERM"]}, launcher=by_slurm)
    second = int(find_checkpoint(run).name)
    assert first + 2 <= second < STEPS
    [last] = run_all([config("last")])
    assert_same_run(run, unbroken)

    # Only process 0 writes and prints.
    for ended in (four, two):
        assert "stopped by a signal" in ended[0].errors
        for other in ended[1:]:
            assert not any(word in other.errors for word in ("step ", "loss", "WARNING", "maxlm")), other.errors
            assert str(run) not in other.output
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "tokenizer"} <= names

    # Each process has read only its part of each step's rows, together the rows of the uninterrupted run.
    expected = rows_by_step([alone])
    for reports, share in (([e.report for e in four], 4), ([e.report for e in two], 8), ([last.report], 8)):
        assert {len(rows) for report in reports for _, _, rows in report["rows"].values()} == {share}
        for step, rows in rows_by_step(reports).items():
            assert rows == expected.get(step, rows), step
    assert {report["rows"]["1"][0] for report in (e.report for e in four)} == {0, 1}

    # Only the first start draws initial values. Later ones restore into shards: of two processes with half
    # of each weight, each reads half of what one process reads.
    assert [ended.report["initialized"] for ended in [*four, *two, last]] == [1, 1, 1, 1, 0, 0, 0]
    whole = last.report["bytes_read"]
    assert whole > 1e6
    for ended in two:
        assert ended.report["bytes_read"] < 0.6 * whole
