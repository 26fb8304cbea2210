"""Two processes sample from a model of which each holds a half, and both stop if one has other weights."""

import json

import pytest
from processes import run_together

pytestmark = pytest.mark.exhaustive


def test_two_processes_sample_the_answers_of_one(tmp_path):
    def run(count):
        files = [tmp_path / f"{count}-{number}.json" for number in range(count)]
        for one in run_together("sampling:main", [[[str(file)]] for file in files], tmp_path):
            assert one.code == 0, one.errors[-4000:]
        parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        assert sum(map(len, parts)) == 16
        return {row: text for part in parts for row, text in part.items()}

    assert run(2) == run(1)
