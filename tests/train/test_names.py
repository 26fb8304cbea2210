"""Runs in folders whose names libraries below take for patterns, separators or buckets; saves that cannot be read."""

import os

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from toy_run import toy_run

from maxlm.checkpoint import checkpointer
from maxlm.checkpoint.folder import find_checkpoint
from maxlm.checkpoint.readback import check_arrays
from maxlm.checkpoint.restore import restore_weights
from maxlm.errors import ConfigError, TrainingError
from maxlm.runtime.storage import plain_path, storage_path


@pytest.fixture(autouse=True)
def temporaries(tmp_path, monkeypatch):
    """Links for names are made in here."""
    (tmp_path / "temporaries").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporaries"))


def steps_in(folder) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


@pytest.mark.parametrize(
    "name", ["run[1]", "back\\slash", "**/gs:", "new\nline ? # % 😀.", "-\"'&;${x}|<>`~", "é" * 127]
)
def test_a_run_goes_on_and_is_read_whatever_its_folder_is_called(tmp_path, name):
    folder = tmp_path / name
    toy_run(folder, steps=2, checkpoint={"every": 2, "keep": 1})
    result = toy_run(folder, steps=4, checkpoint={"every": 2, "keep": 1})
    assert result.start == 2
    assert steps_in(folder) == ["4"]
    read = restore_weights(find_checkpoint(folder), {"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
    assert read["w"].tolist() == result.state.trainable["w"].tolist()
    # Nothing is left beside it, as where a name was cut in two.
    assert sorted(os.listdir(tmp_path)) == sorted({name.partition("/")[0], "temporaries"})


def test_a_name_that_needs_a_link_is_refused_where_none_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a file"))
    with pytest.raises(
        ConfigError, match=r"cannot be stored under a name with \[ \], and no link to it can be created"
    ):
        toy_run(tmp_path / "run[1]")
    assert plain_path(tmp_path / "run 1") == tmp_path / "run 1"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("http://x/y", "starts with an unknown kind of storage"),
        ("runs/a://b", "starts with an unknown kind of storage"),
        ("/hf/run", "would be read as the bucket hf://run; give another folder"),
    ],
)
def test_a_folder_that_is_taken_for_a_bucket_is_refused(path, told):
    with pytest.raises(ConfigError, match=told):
        storage_path(path)


def test_a_checkpoint_that_cannot_be_read_back_never_replaces_one_that_can(tmp_path, monkeypatch):
    """As where a name splits its files: without the link, pieces and index lie in different folders."""
    folder = tmp_path / "run[1]"
    toy_run(folder, steps=2, checkpoint={"every": 2, "keep": 1})
    monkeypatch.setattr(checkpointer, "plain_path", lambda path: path)
    with pytest.raises(TrainingError, match=r"cannot be read back: .*; the newest complete .* is of step 2"):
        toy_run(folder, steps=4, checkpoint={"every": 2, "keep": 1, "retries": 0})
    monkeypatch.undo()
    assert "2" in steps_in(folder)
    assert "4" not in steps_in(folder)
    assert toy_run(folder, steps=4).start == 2


@pytest.mark.parametrize(
    ("damaged", "told"),
    [
        ("ocdbt.process_0/d/*", "weights/ocdbt.process_0/d/.* is truncated: 1 of at least "),
        ("d/*", "OUT_OF_RANGE|DATA_LOSS|NOT_FOUND"),
        ("manifest.ocdbt", "OUT_OF_RANGE|DATA_LOSS|NOT_FOUND"),
    ],
)
def test_what_a_reader_would_miss_is_noticed_without_reading_arrays(tmp_path, damaged, told):
    values = {"w": jax.random.normal(jax.random.key(0), (2000,)), "b": jnp.zeros(3)}
    shapes = {"w": [2000, "float32"], "b": [3, "float32"]}
    with ocp.StandardCheckpointer() as handler:
        handler.save(tmp_path / "weights", values)
    check_arrays(storage_path(tmp_path / "weights"), shapes)
    with pytest.raises(ValueError, match=r"weights/c is missing or does not have the shape \[1\]"):
        check_arrays(storage_path(tmp_path / "weights"), {"c": [1, "float32"]})
    for file in (tmp_path / "weights").glob(damaged):
        file.write_bytes(b"x")
    with pytest.raises((ValueError, OSError), match=told):
        check_arrays(storage_path(tmp_path / "weights"), shapes)
