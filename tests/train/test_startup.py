"""The comparison of processes before training, and its error messages."""

import copy
import json

import pytest
from tiny_run import tiny_config

from maxlm.errors import ConfigError, DataError
from maxlm.train.startup import data_hashes, reject_differences, source_hash, start_record


@pytest.fixture
def record(tiny_data_folder):
    config = tiny_config("runs/x", tiny_data_folder)
    record = start_record(config, {"tokenizer": "abc", **data_hashes(config)}) | {"host": "host0"}
    # Records are sent as JSON.
    return json.loads(json.dumps(record))


def differing(record: dict, host: str, **same) -> dict:
    other = copy.deepcopy(record) | {"host": host}
    assert set(same) <= set(record["same"])
    other["same"] |= same
    return other


def test_identical_processes_pass(record):
    reject_differences([record, record, differing(record, "host2")])


def test_each_differing_process_is_named_with_its_differences(record, tiny_data_folder):
    others = [
        differing(record, "host1", **{"config optim.learning_rate": 0.5, "package jax": "0.0.1"}),
        differing(record, "host2"),
        differing(record, "host3", **{f"data {tiny_data_folder}": "ffff", "code of maxlm": "eeee", "tokenizer": "def"}),
    ]
    with pytest.raises(ConfigError) as caught:
        reject_differences([record, *others])
    first, second, advice = caught.value.problems
    assert first.startswith("process 1 (host1) differs from process 0 (host0) in ")
    assert "config optim.learning_rate (0.5, not 0.01)" in first
    assert "package jax (0.0.1, not " in first
    assert second.startswith("process 3 (host3) differs from process 0 (host0) in ")
    for what in (
        f"data {tiny_data_folder} (ffff, not ",
        "code of maxlm (eeee, not ",
        "tokenizer (def, not abc)",
    ):
        assert what in second
    assert "restart them" in advice


def test_missing_setting_is_a_difference_and_long_lists_are_truncated(record):
    other = copy.deepcopy(record)
    other["same"] = {"config seed": other["same"]["config seed"]}
    with pytest.raises(ConfigError, match=r"\(nothing, not .*\) and \d+ more"):
        reject_differences([record, other])


def test_data_is_identified_by_its_manifest(tmp_path, tiny_data_folder):
    [before] = data_hashes(tiny_config("runs/x", tiny_data_folder)).values()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"stage": "data"}')
    [after] = data_hashes(tiny_config("runs/x", folder)).values()
    assert before != after
    with pytest.raises(DataError, match="there is no such file or folder"):
        data_hashes(tiny_config("runs/x", tmp_path / "none"))


def test_code_hash_covers_all_files(tmp_path):
    assert source_hash() == source_hash()
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    before = source_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert source_hash(tmp_path) != before
    assert before != source_hash()
