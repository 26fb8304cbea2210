"""Bad steps: the run rolls back, excludes their batches, and ends like a run without those batches."""

import json
from dataclasses import replace
from itertools import count, islice

import jax
import numpy as np
import pytest
from tiny_run import poison, tiny_config
from toy_run import ToyData, toy_run, weights

from maxlm.checkpoint.folder import find_checkpoint, read_metadata
from maxlm.cli import main
from maxlm.config.fault import GuardConfig
from maxlm.core.tree import flatten
from maxlm.data.loader import open_mixture
from maxlm.data.quarantine import SKIPPED_FILE_NAME, batch_of_step, read_quarantine
from maxlm.errors import TrainingError
from maxlm.interop.load import load_model
from maxlm.objectives.packed_rows import PackedRowsData
from maxlm.runtime.storage import read_lines, storage_path
from maxlm.train import loop
from maxlm.train.faults import BadStep, GuardWatch, Quarantine
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train

GUARD = {"max_skipped_in_a_row": 3, "max_rollbacks": 2}
BAD = {6, 7, 8}


def config_of(folder, data, **settings):
    return tiny_config(folder, data, **{"guard": GUARD, "eval_every": 0, "eval_batches": 1, **settings})


def parameters(folder) -> dict[str, np.ndarray]:
    return flatten(jax.device_get(load_model(folder)[0]))


def assert_same_weights(folder, other):
    left, right = parameters(folder), parameters(other)
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path)


@pytest.mark.parametrize("excluded", [[], [0], [3], [0, 1, 2], [7, 2, 2, 3], [5, 4, 9, 10, 30]])
def test_steps_read_remaining_batches_in_order(excluded):
    left = [batch for batch in range(60) if batch not in excluded]
    assert [batch_of_step(step, excluded) for step in range(40)] == left[:40]


@pytest.fixture(scope="module")
def without_them(tmp_path_factory, tiny_data_folder):
    """A run over data without the bad batches."""
    read = PackedRowsData.batches

    def left_out(self, start_step, current_model):
        assert start_step == 0
        return (batch for number, batch in zip(count(), read(self, 0, current_model)) if number not in BAD)

    folder = tmp_path_factory.mktemp("without") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedRowsData, "batches", left_out)
        train(config_of(folder, tiny_data_folder))
    return folder


def test_run_rolls_back_and_excludes_bad_batches(without_them, tmp_path, tiny_data_folder, capsys, monkeypatch):
    monkeypatch.setattr(PackedRowsData, "batches", poison(BAD))
    config = config_of(tmp_path / "run", tiny_data_folder)
    manifest = train(config)
    assert manifest["metrics"]["steps"] == 12
    assert manifest["metrics"]["skipped"] == 0, "the state is that of a run without them"
    assert_same_weights(tmp_path / "run", without_them)
    output = capsys.readouterr().err
    assert "steps 7 to 9 are bad (the loss is nan): rolling back to the last checkpoint" in output
    assert "resuming" in output
    assert "at step 4" in output
    # Metrics are those of the steps that remain, each once.
    timing = ("time", "tokens_per_second", "data_wait", "goodput")
    same = [
        [{name: value for name, value in record.items() if name not in timing} for record in read_metrics(folder)]
        for folder in (tmp_path / "run", without_them)
    ]
    assert same[0] == same[1]

    records = read_quarantine(tmp_path / "run")
    assert [(r["rollback"], r["step"], r["batch"], r["rows"]) for r in records] == [
        (1, batch + 1, batch, [8 * batch, 8 * batch + 8]) for batch in sorted(BAD)
    ]
    mixture = open_mixture([(tiny_data_folder, 1.0)], seed=0, batch_size=8)
    for record in records:
        assert record["reason"] == "the loss is nan"
        assert record["loss"] is None
        assert [document["id"] for document in record["documents"]] == [
            d.id for d in mixture.documents(record["batch"])
        ]
        assert record["documents"]
    assert read_metadata(find_checkpoint(tmp_path / "run"))["quarantine"] == {"batches": [6, 7, 8], "rollbacks": 1}

    # The command names the data that the step read.
    capsys.readouterr()
    main(["data", "at-step", "7", "--run", str(tmp_path / "run"), "--json"])
    shown = [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]
    assert shown == [document.id for document in mixture.documents(9)]


@pytest.fixture(scope="module")
def toy_without(tmp_path_factory):
    """Weights of a toy run over data without the bad batches."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    return weights(toy_run(folder, data=ToyData(leave_out=BAD)))


class Crash(BaseException):
    """An exception that nothing catches."""


def crash_at(count_of_batches: int):
    numbers = count(1)

    def crash(number):
        if next(numbers) == count_of_batches:
            raise Crash

    return crash


@pytest.mark.parametrize("crash", [1, 7, 9, 11, 12, 13, 16, 20])
def test_crash_around_a_rollback_changes_nothing(crash, toy_without, tmp_path):
    """Before the bad steps, among them, right after the rollback, and later: the resumed run ends the same."""
    with pytest.raises(Crash):
        toy_run(tmp_path / "run", data=ToyData(poison=BAD, at_batch=crash_at(crash)))
    result = toy_run(tmp_path / "run", data=ToyData(poison=BAD))
    assert weights(result) == toy_without
    assert [record["batch"] for record in read_quarantine(tmp_path / "run")] == sorted(BAD)
    assert {record["rollback"] for record in read_quarantine(tmp_path / "run")} == {1}


def test_run_may_roll_back_more_than_once(tmp_path):
    bad = {1, 2, 3, 9, 10, 11}
    result = toy_run(tmp_path / "run", data=ToyData(poison=bad))
    assert weights(result) == weights(toy_run(tmp_path / "other", data=ToyData(leave_out=bad)))
    assert [record["rollback"] for record in read_quarantine(tmp_path / "run")] == [1, 1, 1, 2, 2, 2]


def test_single_bad_step_is_only_skipped(tmp_path):
    """Its update is dropped within the step, and its data is recorded; nothing is repeated."""
    result = toy_run(tmp_path / "run", data=ToyData(poison={5, 6}))
    assert int(result.state.guard.skipped) == 2
    assert read_quarantine(tmp_path / "run") == []
    skipped = [json.loads(line) for line in read_lines(storage_path(tmp_path / "run" / SKIPPED_FILE_NAME))]
    assert [(record["step"], record["batch"], record["loss"]) for record in skipped] == [(6, 5, None), (7, 6, None)]
    assert [record["documents"] for record in skipped] == [ToyData().documents(5), ToyData().documents(6)]
    assert result.goodput.seconds["rolled_back"] == 0


def test_rollback_before_first_checkpoint_restarts_from_initial_state(tmp_path):
    bad = {0, 1, 2}
    result = toy_run(tmp_path / "run", data=ToyData(poison=bad), steps=3)
    assert weights(result) == weights(toy_run(tmp_path / "other", data=ToyData(leave_out=bad), steps=3))


def test_no_checkpoint_is_saved_amid_skipped_steps(tmp_path):
    """A checkpoint due among them waits for the first good step."""
    toy_run(tmp_path / "run", data=ToyData(poison={2, 3}), steps=6, checkpoint={"every": 4, "keep": 5})
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == [5, 6]


def test_run_stops_after_max_rollbacks(tmp_path):
    """And stops again on restart, until the user changes something."""
    objective = ToyData(poison=set(range(5, 100)))
    for _ in range(2):
        with pytest.raises(TrainingError) as error:
            toy_run(tmp_path / "run", data=objective)
        assert "3 steps in a row up to step 8 were skipped (the loss is nan)" in str(error.value)
        assert "the run has been rolled back 2 times (guard.max_rollbacks)" in str(error.value)
        assert "lower optim.learning_rate, or check the data" in str(error.value)
    assert [record["batch"] for record in read_quarantine(tmp_path / "run")] == [5, 6, 7, 8, 9, 10]
    guard = {"max_skipped_in_a_row": 3, "max_rollbacks": 3}
    assert toy_run(tmp_path / "run", data=ToyData(poison=set(range(5, 14))), guard=guard).steps == 12


def test_non_finite_state_is_never_saved(monkeypatch, tmp_path):
    """Losses stay finite; the step that produced the state is excluded."""
    step_function = loop.train_step

    def overflow(state, frozen, batch, **settings):
        new, metrics = step_function(state, frozen, batch, **settings)
        optimizer = jax.tree.map(
            lambda x: jax.numpy.where(batch["y"][0] == 999, np.inf, x).astype(x.dtype), new.optimizer
        )
        return replace(new, optimizer=optimizer), metrics

    class Marked(ToyData):
        def batches(self, start_step, current_model):
            for number, batch in zip(count(start_step), super().batches(start_step, current_model)):
                batch["y"][0] = 999 if number == 7 else batch["y"][0]
                yield batch

    monkeypatch.setattr(loop, "train_step", overflow)
    guard = {"spike_factor": None, **GUARD}
    result = toy_run(tmp_path / "run", data=Marked(), guard=guard)
    [record] = read_quarantine(tmp_path / "run")
    assert record["batch"] == 7
    assert record["reason"] == "weights or optimizer state are not finite after it"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(result.state)))


def sampling_config(folder):
    """A run that samples answers for four steps at a time."""
    objective = {"kind": "policy", "train_file": "x", "max_new_tokens": 4, "updates_per_rollout": 4}
    settings = {"init_from": "x", "batch_size": 2, "steps": 12, "checkpoint": {"every": 4}}
    return tiny_config(folder, "x", objective=objective, **settings)


class FakeData:
    """Yields batch numbers."""

    def batches(self, start_step, current_model):
        return count(start_step)

    def documents(self, batch):
        return [{"id": f"document {batch}"}]


def test_batches_sampled_together_are_excluded_together(tmp_path):
    """Checkpoints are between rounds of sampling, before and after."""
    quarantine = Quarantine(storage_path(tmp_path), sampling_config(tmp_path))
    quarantine.add([BadStep(7, "the loss is nan"), BadStep(8, "the loss is nan")], FakeData())
    assert quarantine.batches == list(range(4, 12))
    again = Quarantine(storage_path(tmp_path), sampling_config(tmp_path))
    assert list(islice(again.batches_from(0, FakeData(), None), 8)) == [0, 1, 2, 3, 12, 13, 14, 15]
    # Step 8 starts a round, as batch 16 does.
    assert next(again.batches_from(8, FakeData(), None)) == 16
    assert [r["documents"] for r in read_quarantine(tmp_path)] == [[{"id": f"document {n}"}] for n in range(4, 12)]


def test_lost_quarantine_file_is_restored_from_checkpoint(tmp_path):
    quarantine = Quarantine(storage_path(tmp_path), sampling_config(tmp_path))
    quarantine.restore({"batches": [3, 5], "rollbacks": 2})
    assert quarantine.batches == [3, 5]
    assert next(quarantine.batches_from(3, FakeData(), None)) == 4
    assert next(quarantine.batches_from(4, FakeData(), None)) == 6
    assert quarantine.rollbacks == 2


def test_watch_lags_two_steps_and_tolerates_fewer_bad_steps_than_limit():
    """Verdicts as from the device: (loss, number of steps skipped in a row)."""
    refused = []
    watch = GuardWatch(GuardConfig(max_skipped_in_a_row=2), 0, refused.append)
    seen = []
    for step, in_a_row in enumerate([0, 1, 0, 1, 2, 0, 0, 0]):
        loss = np.float32(np.nan if in_a_row else 1.0)
        metrics = {"loss": loss, "grad_norm": np.float32(5.0), "skipped_in_a_row": jax.numpy.asarray(in_a_row)}
        watch.add(step, metrics)
        if len(watch._refused) >= 2:
            seen.append(step)
    assert seen[0] == 6, "known when two more steps are in flight"
    assert [bad.step for bad in watch.bad_steps(jax.numpy.zeros(1))] == [3, 4], "good steps do not clear them"
    assert [bad.step for bad in refused] == [1, 3, 4]
