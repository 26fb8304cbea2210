"""A process that is killed at any moment of a save leaves a run that can go on, to the same end to the bit."""

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

# Orbax leaves reads of broken files unawaited.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module")
def forked():
    with Forked(
        ["kill_points", "tensorboardX"], paths=[HERE, HERE.parent], environment={"XLA_FLAGS": one_device()}
    ) as forked:
        yield forked


@pytest.fixture
def call(forked):
    """Calls a function of kill_points.py in a process of its own; returns its exit status."""

    def in_a_process(name: str, *arguments) -> int:
        return forked.run([call_of(name, *arguments)])[0]

    return in_a_process


def call_of(name: str, *arguments) -> Call:
    return Call(f"kill_points:{name}", [str(one) if isinstance(one, Path) else one for one in arguments])


def assert_goes_on(folder, *, saved: set[int], following: int) -> int:
    """What is restored is one of the steps, whole; another is saved on top of it. Returns the step restored."""
    with Checkpointer(folder, keep=1) as checkpointer:
        state, metadata = checkpointer.restore(make_small_state(0))
        step = int(state.step)
        assert step in saved
        assert_equal(state, make_small_state(step))
        assert metadata["note"] == f"of step {step}"
        checkpointer.save(make_small_state(following), {"note": f"of step {following}"}, wait=True)
        assert_equal(checkpointer.restore(make_small_state(0))[0], make_small_state(following))
    # Nothing is left of what was half written or half removed, and nothing was taken for broken.
    assert [path.name for path in (Path(folder) / "checkpoints").iterdir()] == [str(following)]
    assert not list(Path(folder).glob("broken*"))
    return step


def test_killed_before_every_operation_of_a_save(call, forked, tmp_path):
    """From the first folder made to the last file of the old checkpoint removed."""
    assert call("save", tmp_path / "first", 1, 0, "") == 0
    shutil.copytree(tmp_path / "first", tmp_path / "counted")
    assert call("save", tmp_path / "counted", 2, 0, tmp_path / "names") == 0
    names = json.loads((tmp_path / "names").read_text())
    valid_from = max(n for n, name in enumerate(names, 1) if name.startswith("os.rename"))
    assert len(names) > valid_from > 20
    # Every fourth of those that remove the old one, which are many and alike.
    numbers = [*range(1, valid_from + 3), *range(valid_from + 3, len(names) + 1, 4)]
    restored, num_killed = [], 0
    folders = [Path(shutil.copytree(tmp_path / "first", tmp_path / f"run-{number}")) for number in numbers]
    calls = [call_of("save", folder, 2, number, "") for folder, number in zip(folders, numbers)]
    for start in range(0, len(calls), AT_ONCE):
        for status, folder in zip(forked.run(calls[start : start + AT_ONCE]), folders[start : start + AT_ONCE]):
            # Files of arrays vary in number, so that the last operations may not be reached.
            assert status in (0, KILLED)
            num_killed += status == KILLED
            restored.append(assert_goes_on(folder, saved={1, 2}, following=3))
    assert num_killed > len(numbers) - 3
    # Neither always the old one nor always the new one: one operation makes it valid.
    assert restored[0] == 1
    assert restored[-1] == 2
    assert len(set(restored)) == 2
    print(f"killed at {num_killed} points, went on from {len(restored)}")


def test_killed_at_random_moments(call, tmp_path):
    """Among them those when TensorStore writes arrays, in C++."""
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


def test_a_run_killed_while_it_writes_goes_on_to_the_same_end(call, tmp_path):
    """The whole trainer, with metrics, accounts and configuration, at some of the operations of three saves."""
    assert call("train", tmp_path / "unbroken", 0, tmp_path / "unbroken.json") == 0
    unbroken = json.loads((tmp_path / "unbroken.json").read_text())
    num_operations = len(unbroken["names"])
    assert num_operations > 100
    # Not the very last ones: how many there are differs by a few, with what the background has come to do.
    for number in (6, num_operations // 2, num_operations * 3 // 4):
        folder = tmp_path / f"run-{number}"
        assert call("train", folder, number, "") == KILLED
        assert call("train", folder, 0, tmp_path / "report.json") == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["weights"] == unbroken["weights"], number
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert steps[-1] == 12
