"""Run folders whose names libraries treat as patterns, separators or buckets; unreadable checkpoints."""

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
    """The folder in which links for names are created."""
    (tmp_path / "temporaries").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporaries"))


def steps_in(folder) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


@pytest.mark.parametrize(
    "name", ["run[1]", "back\\slash", "**/gs:", "new\nline ? # % 😀.", "-\"'&;${x}|<>`~", "é" * 127]
)
def test_run_resumes_and_loads_with_any_folder_name(tmp_path, name):
    folder = tmp_path / name
    toy_run(folder, steps=2, checkpoint={"every": 2, "keep": 1})
    result = toy_run(folder, steps=4, checkpoint={"every": 2, "keep": 1})
    assert result.start == 2
    assert steps_in(folder) == ["4"]
    read = restore_weights(find_checkpoint(folder), {"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
    assert read["w"].tolist() == result.state.trainable["w"].tolist()
    # No other folders exist, as from a name that was split in two.
    assert sorted(os.listdir(tmp_path)) == sorted({name.partition("/")[0], "temporaries"})


def test_name_that_needs_a_link_is_rejected_if_none_can_be_created(tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a file"))
    with pytest.raises(
        ConfigError, match=r"cannot be stored under a name with \[ \], and no link to it can be created"
    ):
        toy_run(tmp_path / "run[1]")
    assert plain_path(tmp_path / "run 1") == tmp_path / "run 1"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("http://x/y", "starts with an unknown kind of storage"),
        ("runs/a://b", "starts with an unknown kind of storage"),
        ("/hf/run", "would be read as the bucket hf://run; give another folder"),
    ],
)
def test_folder_that_would_be_read_as_a_bucket_is_rejected(path, message):
    with pytest.raises(ConfigError, match=message):
        storage_path(path)


def test_unreadable_checkpoint_never_replaces_a_readable_one(tmp_path, monkeypatch):
    """As when a name splits its files: without the link, data and index are in different folders."""
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
    ("damaged", "message"),
    [
        ("ocdbt.process_0/d/*", "weights/ocdbt.process_0/d/.* is truncated: 1 of at least "),
        ("d/*", "OUT_OF_RANGE|DATA_LOSS|NOT_FOUND"),
        ("manifest.ocdbt", "OUT_OF_RANGE|DATA_LOSS|NOT_FOUND"),
    ],
)
def test_missing_or_truncated_files_are_detected_without_reading_arrays(tmp_path, damaged, message):
    values = {"w": jax.random.normal(jax.random.key(0), (2000,)), "b": jnp.zeros(3)}
    shapes = {"w": [2000, "float32"], "b": [3, "float32"]}
    with ocp.StandardCheckpointer() as handler:
        handler.save(tmp_path / "weights", values)
    check_arrays(storage_path(tmp_path / "weights"), shapes)
    with pytest.raises(ValueError, match=r"weights/c is missing or does not have the shape \[1\]"):
        check_arrays(storage_path(tmp_path / "weights"), {"c": [1, "float32"]})
    for file in (tmp_path / "weights").glob(damaged):
        file.write_bytes(b"x")
    with pytest.raises((ValueError, OSError), match=message):
        check_arrays(storage_path(tmp_path / "weights"), shapes)
