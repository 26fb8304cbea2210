"""Manifests: inputs by content hash, and the chain that they form."""

import json
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from maxlm.errors import ConfigError, DataError
from maxlm.runtime import storage
from maxlm.runtime.manifest import content_hash, manifest_chain, read_manifest, write_json, write_manifest
from maxlm.runtime.storage import copy_folder, relative_path, resolve_path, storage_path


def make_stage(folder, inputs, **config):
    return write_manifest(folder, stage=folder.name, inputs=inputs, config=config, metrics={"rows": 1})


def test_manifests_form_a_chain(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    data, model, served = (tmp_path / name for name in ("data", "model", "served"))
    make_stage(data, {"text": text})
    make_stage(model, {"data": data, "again": data})
    make_stage(served, {"model": model}, bits=8)
    chain = manifest_chain(served)
    assert [link["stage"] for link in chain] == ["data", "model", "served"]
    assert chain[-1]["inputs"]["model"]["hash"] == chain[1]["hash"]
    assert chain[1]["inputs"]["data"]["hash"] == chain[0]["hash"]
    assert chain[0]["inputs"]["text"] == {"path": "../text.txt", "hash": content_hash(text)}
    assert chain[-1]["config"] == {"bits": 8}
    assert {"python", "jax", "maxlm"} <= chain[0]["versions"].keys()


def test_a_folder_of_stages_can_be_moved(tmp_path):
    (tmp_path / "a").mkdir()
    data, model = tmp_path / "a" / "data", tmp_path / "a" / "model"
    make_stage(data, {})
    make_stage(model, {"data": data})
    (tmp_path / "a").rename(tmp_path / "b")
    assert [link["stage"] for link in manifest_chain(tmp_path / "b" / "model")] == ["data", "model"]


def test_hashes_depend_on_contents_and_names(tmp_path):
    def folder(name, files):
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return content_hash(tmp_path / name)

    first = folder("a", {"x": "1", "sub/y": "2"})
    assert folder("b", {"sub/y": "2", "x": "1"}) == first
    assert folder("c", {"x": "1", "sub/y": "3"}) != first
    assert folder("d", {"x": "1", "sub/z": "2"}) != first
    # The manifest of a folder represents all that its stage wrote.
    make_stage(tmp_path / "a", {})
    by_manifest = content_hash(tmp_path / "a")
    (tmp_path / "a" / "log").write_text("later")
    assert content_hash(tmp_path / "a") == by_manifest


def test_missing_or_corrupt_manifest_is_reported(tmp_path):
    with pytest.raises(DataError, match="has not finished"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="there is no such file or folder"):
        content_hash(tmp_path / "none")
    (tmp_path / "manifest.json").write_text('{"stage": "x",\n')
    with pytest.raises(DataError, match=r"not valid JSON .* line 2"):
        read_manifest(tmp_path)


def test_json_is_written_atomically(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": "é"})
    before = path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text(encoding="utf-8") == before
    assert json.loads(before) == {"a": "é"}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_copied_folder_replaces_the_existing_one(tmp_path):
    (tmp_path / "new" / "sub").mkdir(parents=True)
    (tmp_path / "new" / "sub" / "x").write_bytes(b"\0new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "y").write_text("old")
    copy_folder(tmp_path / "new", storage_path(tmp_path / "old"))
    assert [path.name for path in (tmp_path / "old").rglob("*")] == ["sub", "x"]
    assert (tmp_path / "old" / "sub" / "x").read_bytes() == b"\0new"
    assert not (tmp_path / "old.tmp").exists()


def test_unreachable_bucket_is_reported_and_no_local_folder_is_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://bucket/run: cannot be reached: .*gcsfs.*; or give a local folder"):
        storage_path("gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bucket(monkeypatch):
    """An in-memory bucket at a gs:// path."""
    from etils.epath import backend

    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: MemoryFileSystem())
    MemoryFileSystem.store.clear()
    yield "gs://bucket/runs"
    MemoryFileSystem.store.clear()


def test_manifests_in_buckets(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_stage(tmp_path / "data", {})
    write_manifest(f"{bucket}/a", stage="a", inputs={"data": "data"}, config={}, metrics={})
    write_manifest(f"{bucket}/b", stage="b", inputs={"a": f"{bucket}/a"}, config={}, metrics={})
    assert [link["stage"] for link in manifest_chain(f"{bucket}/b")] == ["data", "a", "b"]
    assert read_manifest(f"{bucket}/b")["inputs"]["a"]["path"] == f"{bucket}/a"
    assert not Path("gs:").exists()
    copy_folder("data", storage_path(f"{bucket}/copy"))
    assert content_hash(f"{bucket}/copy/manifest.json") == content_hash("data/manifest.json")


def test_paths_are_relative_if_possible(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert relative_path("a/b", "a/c") == "../b"
    assert relative_path("gs://x/y", "a") == "gs://x/y"
    assert relative_path("a", "gs://x/y") == str(tmp_path / "a")
    assert storage.is_remote("gs://x")
    assert not storage.is_remote("runs/x")


@pytest.mark.parametrize("start", ["runs/a", "/disk/runs/a", "gs://bucket/runs/a"])
@pytest.mark.parametrize("path", ["runs/data", "/disk/data", "gs://bucket/data"])
def test_manifest_path_resolves_to_the_original(path, start, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = resolve_path(relative_path(path, start), start)
    assert str(found if "://" in path else found.resolve()) == (path if "://" in path else str(Path(path).resolve()))
