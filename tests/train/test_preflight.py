"""A failure during or after training that is not the steps' fault saves them, and a restart resumes."""

import pytest
from toy_run import ToyData, toy_run, weights

from maxlm.checkpoint.folder import find_checkpoint
from maxlm.errors import DataError
from maxlm.train.metrics import read_metrics


class Failing(ToyData):
    """Data whose validation, or whose batch with a given number, fails."""

    def __init__(self, *, validation: int | None = None, batch: int | None = None):
        super().__init__(at_batch=self._fail_at)
        self._validations, self._batch = validation, batch
        self.batches_read = 0

    def _fail_at(self, number):
        self.batches_read += 1
        if number == self._batch:
            raise DataError("the reward returned None")

    def validate(self, model):
        if self._validations is not None:
            self._validations -= 1
            if self._validations == 0:
                raise DataError("valid.jsonl:2: is not JSON")
        return super().validate(model)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> bytes:
    return weights(toy_run(tmp_path_factory.mktemp("uninterrupted")))


@pytest.mark.parametrize(
    ("failing", "saved"),
    [({"validation": 1}, 5), ({"validation": 3}, 12), ({"batch": 7}, 7), ({"batch": 0}, None)],
    ids=str,
)
def test_failure_during_a_run_loses_no_step(tmp_path, failing, saved, uninterrupted, capsys):
    settings = {"eval_every": 5, "checkpoint": {"every": 4, "keep": 1}, "log_every": 3}
    with pytest.raises(DataError):
        toy_run(tmp_path / "run", data=Failing(**failing), **settings)
    output = capsys.readouterr().err
    if saved is None:
        assert not list((tmp_path / "run" / "checkpoints").iterdir())
        return
    assert find_checkpoint(tmp_path / "run").name == str(saved)
    assert f"step {saved} is saved; run the same command to resume" in output

    fixed = Failing()
    result = toy_run(tmp_path / "run", data=fixed, **settings)
    assert (result.start, fixed.batches_read) == (saved, 12 - saved)
    assert result.metrics == {"norm": pytest.approx(result.metrics["norm"])}
    # A validation that failed during the run is not repeated; the final one is.
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "valid_norm" in record]
    assert steps == [step for step in (5, 10, 12) if step != saved or step == 12]
    assert weights(result) == uninterrupted


def test_validation_is_not_logged_twice(tmp_path):
    toy_run(tmp_path / "run", steps=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert toy_run(tmp_path / "run", steps=2).metrics
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
