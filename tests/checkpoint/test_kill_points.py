"""A process killed at any moment of a save leaves a run that resumes to a bit-identical result."""

import json
import random
import shutil
from pathlib import Path

import pytest
from forked import Call, Forked
from test_checkpoint import assert_equal, make_small_state
from xla_flags import one_device

from maxlm.checkpoint.checkpointer import Checkpointer

HERE = Path(__file__).parent
KILLED = -9
AT_ONCE = 8

# Orbax leaves reads of corrupt files unawaited.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module")
def forked():
    with Forked(
        ["kill_points", "tensorboardX"], paths=[HERE, HERE.parent], environment={"XLA_FLAGS": one_device()}
    ) as forked:
        yield forked


@pytest.fixture
def call(forked):
    """Calls a function of kill_points.py in a separate process; returns its exit status."""

    def in_a_process(name: str, *arguments) -> int:
        return forked.run([call_of(name, *arguments)])[0]

    return in_a_process


def call_of(name: str, *arguments) -> Call:
    return Call(f"kill_points:{name}", [str(one) if isinstance(one, Path) else one for one in arguments])


def assert_goes_on(folder, *, saved: set[int], following: int) -> int:
    """Check that one of the steps is restored completely, and save another on top; returns the restored step."""
    with Checkpointer(folder, keep=1) as checkpointer:
        state, metadata = checkpointer.restore(make_small_state(0))
        step = int(state.step)
        assert step in saved
        assert_equal(state, make_small_state(step))
        assert metadata["note"] == f"of step {step}"
        checkpointer.save(make_small_state(following), {"note": f"of step {following}"}, wait=True)
        assert_equal(checkpointer.restore(make_small_state(0))[0], make_small_state(following))
    # No partially written or removed files are left, and nothing was treated as corrupt.
    assert [path.name for path in (Path(folder) / "checkpoints").iterdir()] == [str(following)]
    assert not list(Path(folder).glob("broken*"))
    return step


@pytest.mark.exhaustive
def test_process_killed_before_every_operation_of_a_save(call, forked, tmp_path):
    """From creating the first folder to removing the last file of the old checkpoint."""
    assert call("save", tmp_path / "first", 1, 0, "") == 0
    shutil.copytree(tmp_path / "first", tmp_path / "counted")
    assert call("save", tmp_path / "counted", 2, 0, tmp_path / "names") == 0
    names = json.loads((tmp_path / "names").read_text())
    valid_from = max(n for n, name in enumerate(names, 1) if name.startswith("os.rename"))
    assert len(names) > valid_from > 20
    # Only every fourth of the many similar operations that remove the old checkpoint.
    numbers = [*range(1, valid_from + 3), *range(valid_from + 3, len(names) + 1, 4)]
    restored, num_killed = [], 0
    folders = [Path(shutil.copytree(tmp_path / "first", tmp_path / f"run-{number}")) for number in numbers]
    calls = [call_of("save", folder, 2, number, "") for folder, number in zip(folders, numbers)]
    for start in range(0, len(calls), AT_ONCE):
        for status, folder in zip(forked.run(calls[start : start + AT_ONCE]), folders[start : start + AT_ONCE]):
            # The number of array files varies, so that the last operations may not be reached.
            assert status in (0, KILLED)
            num_killed += status == KILLED
            restored.append(assert_goes_on(folder, saved={1, 2}, following=3))
    assert num_killed > len(numbers) - 3
    # Both the old and the new one occur: a single operation makes the new one valid.
    assert restored[0] == 1
    assert restored[-1] == 2
    assert len(set(restored)) == 2
    print(f"killed at {num_killed} points, went on from {len(restored)}")


@pytest.mark.exhaustive
def test_process_killed_at_random_moments_of_a_save(call, tmp_path):
    """Including moments when TensorStore writes arrays in C++."""
    delays = random.Random(0)
    newest = 0
    assert call("save", tmp_path, 1, 0, "") == 0
    for _ in range(5):
        status = call("save_until_killed", tmp_path, delays.uniform(0.05, 1.0))
        assert status == KILLED
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            steps = checkpointer.steps()
            size = 4 if max(steps) == 1 else 200_000
            state, metadata = checkpointer.restore(make_small_state(0, size=size))
        step = int(state.step)
        assert step == max(steps) >= newest
        assert_equal(state, make_small_state(step, size=size))
        assert metadata["note"] == f"of step {step}"
        newest = step
    assert newest > 5
    assert not list(tmp_path.glob("broken*"))


@pytest.mark.exhaustive
def test_run_killed_while_saving_resumes_to_the_same_result(call, tmp_path):
    """The whole trainer, with metrics, logs and configuration, at some of the operations of three saves."""
    assert call("train", tmp_path / "unbroken", 0, tmp_path / "unbroken.json") == 0
    unbroken = json.loads((tmp_path / "unbroken.json").read_text())
    num_operations = len(unbroken["names"])
    assert num_operations > 100
    # Without the very last ones: their number varies slightly with the progress of background work.
    for number in (6, num_operations // 2, num_operations * 3 // 4):
        folder = tmp_path / f"run-{number}"
        assert call("train", folder, number, "") == KILLED
        assert call("train", folder, 0, tmp_path / "report.json") == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["weights"] == unbroken["weights"], number
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert steps[-1] == 12
