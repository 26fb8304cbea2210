"""Every second of a run is counted once, under the correct part."""

import contextlib
import json
import time
from itertools import count

import jax
import jax.numpy as jnp
import pytest
from test_faults import Crash, crash_at
from toy_run import ToyData, toy_run

from maxlm.runtime.storage import storage_path
from maxlm.train.goodput import PARTS, Goodput, GoodputLog, Stopwatch, read_goodput
from maxlm.train.metrics import read_metrics


def interval(attempt, start, end, ended, /, **seconds):
    return {"attempt": attempt, "start": start, "step": end, "time": ended, "seconds": seconds}


def total(goodput: Goodput) -> float:
    return sum(goodput.seconds.values())


def test_parts_add_up_to_elapsed_time():
    began = time.perf_counter()
    with Stopwatch() as stopwatch:
        time.sleep(0.02)
        with stopwatch.counting("step"):
            time.sleep(0.03)
            with stopwatch.counting("data_wait"):
                time.sleep(0.04)
            time.sleep(0.03)
        first = stopwatch.take()
        with contextlib.suppress(KeyError), stopwatch.counting("validation"):
            time.sleep(0.01)
            raise KeyError
        second = stopwatch.take()
    passed = time.perf_counter() - began
    assert sum(first.values()) + sum(second.values()) == pytest.approx(passed, abs=2e-3)
    assert 0.02 <= first["start_up"] < first["step"]
    assert 0.06 <= first["step"] < 0.06 + passed - 0.13
    assert first["data_wait"] >= 0.04
    assert second["validation"] >= 0.01


def test_compilation_is_counted_in_any_part():
    @jax.jit
    def inner(x):
        return jnp.sin(x) * 3

    @jax.jit
    def slow(x):
        # Tracing this takes a while, and traces another function.
        time.sleep(0.1)
        return inner(x) + inner(x + 1)

    began = time.perf_counter()
    with Stopwatch() as stopwatch, stopwatch.counting("validation"):
        slow(jnp.ones(3)).block_until_ready()
        compiling = stopwatch.take()
        passed = time.perf_counter() - began
        slow(jnp.ones(3)).block_until_ready()
        again = stopwatch.take()
    assert sum(compiling.values()) == pytest.approx(passed, abs=2e-3)
    assert 0.1 <= compiling["compile"] <= passed
    assert all(value >= -1e-6 for value in compiling.values())
    assert again.get("compile", 0.0) == 0.0


def test_repeated_work_and_time_between_attempts_are_lost():
    goodput = Goodput()
    goodput.add(interval(1, 0, 0, 102.0, start_up=2.0))
    goodput.add(interval(1, 0, 4, 110.0, step=7.0, data_wait=1.0))
    goodput.add(interval(1, 4, 8, 119.0, step=8.0, checkpoint=1.0))
    assert goodput.productive == pytest.approx(15 / 19)
    # Killed; the checkpoint of step 4 is the newest. 6 s pass, then 3 s of start-up.
    goodput.add(interval(2, 4, 4, 128.0, start_up=3.0))
    goodput.add(interval(2, 4, 8, 136.0, step=8.0))
    assert goodput.seconds["redone_after_restart"] == 9.0
    assert goodput.seconds["between_attempts"] == 6.0
    assert goodput.seconds["step"] == 15.0
    assert goodput.seconds["start_up"] == 5.0
    assert total(goodput) == 136.0 - 100.0
    assert goodput.total == 30.0
    assert goodput.attempts == 2
    # A checkpoint is corrupt: the run goes back further. Time lost before is not counted again.
    goodput.add(interval(3, 0, 0, 136.5, start_up=0.5))
    assert goodput.seconds["redone_after_restart"] == 9.0 + 8.0 + 3.0 + 8.0
    assert goodput.seconds["step"] == 0.0
    assert total(goodput) == 36.5


def test_rollback_within_an_attempt_counts_as_rolled_back():
    goodput = Goodput()
    goodput.add(interval(1, 0, 4, 10.0, step=10.0))
    goodput.add(interval(1, 4, 9, 16.0, step=6.0))
    goodput.add(interval(1, 4, 4, 17.0, rolled_back=1.0))
    goodput.add(interval(1, 4, 12, 27.0, step=10.0))
    assert dict(goodput.seconds) == {"step": 20.0, "rolled_back": 7.0}
    assert goodput.summary() == {"productive": round(20 / 27, 4), "seconds": {"step": 20.0, "rolled_back": 7.0}}


def test_run_accounts_for_all_time_over_crashes_and_rollbacks(tmp_path):
    """Checked against an independent clock."""
    began = time.time()
    numbers = count(1)
    slow = crash_at(7)

    def at_batch(number):
        time.sleep(0.05 if number % 2 else 0.0)
        slow(next(numbers))

    with pytest.raises(Crash):
        toy_run(tmp_path / "run", data=ToyData(at_batch=at_batch))
    time.sleep(0.3)
    result = toy_run(tmp_path / "run", data=ToyData(poison={8, 9, 10}))
    ended = time.time()
    goodput = result.goodput
    assert goodput.attempts == 2
    assert total(goodput) == pytest.approx(ended - began, abs=0.2)
    assert set(goodput.seconds) <= set(PARTS)
    assert all(seconds >= 0 for seconds in goodput.seconds.values())
    for part in ("step", "compile", "checkpoint", "start_up", "rolled_back", "redone_after_restart"):
        assert goodput.seconds[part] > 0, part
    assert goodput.seconds["between_attempts"] >= 0.3
    assert goodput.seconds["data_wait"] >= 0.05
    # The file matches the counts of the run.
    again = read_goodput(tmp_path / "run")
    assert again.attempts == 2
    assert total(again) == pytest.approx(total(goodput), abs=1e-3)
    # And the metrics record the progress.
    shares = [record["goodput"] for record in read_metrics(tmp_path / "run") if "goodput" in record]
    assert len(shares) == 6
    assert all(0 < share < 1 for share in shares)
    # Rerunning a finished run is not an attempt.
    toy_run(tmp_path / "run")
    assert read_goodput(tmp_path / "run").attempts == 2


def test_truncated_line_is_dropped(tmp_path):
    whole = json.dumps(interval(1, 0, 3, 5.0, step=5.0))
    (tmp_path / "goodput.jsonl").write_text(whole + '\n{"attempt": 1, "sta')
    with Stopwatch() as stopwatch:
        log = GoodputLog(storage_path(tmp_path), stopwatch)
        log.begin(3)
    lines = (tmp_path / "goodput.jsonl").read_text().splitlines()
    assert lines[0] == whole
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2]
