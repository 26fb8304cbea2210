"""Where a stage may write: asked at its start, and told in one sentence."""

import os

import pytest

from maxlm.errors import ConfigError
from maxlm.runtime.manifest import write_json
from maxlm.runtime.output import check_output, stage_of


@pytest.fixture
def folder(tmp_path):
    """Folders of every stage, whole and begun, and what lies in the way."""
    for name, stage in (("data", "data"), ("sft", "train/sft"), ("tokenizer", "tokenizer"), ("int8", "export/int8")):
        write_json(tmp_path / name / "manifest.json", {"stage": stage})
    write_json(tmp_path / "begun data" / "documents" / "manifest.json", {"stage": "data/documents"})
    for file in ("begun run/goodput.jsonl", "begun tokenizer/tokenizer.model", "file", "mine/manifest.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("[]")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "project" / "checkpoints").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("file", "is a file; give a folder"),
        ("file/run", "leads through .*/file, which is a file"),
        ("dangling", r"leads to .*/dangling, a link to .*/nowhere, which is not there"),
        ("dangling/run", "a link to .*/nowhere, which is not there"),
        ("loop/run", "which is not there"),
        ("data", "is a folder of the stage 'data'"),
        ("link", "is a folder of the stage 'data'"),
        ("begun data", "is a folder of the stage 'data'"),
        ("tokenizer", "is a folder of the stage 'tokenizer'"),
        ("begun tokenizer", "is a folder of the stage 'tokenizer'"),
        ("int8", "is a folder of the stage 'export'"),
        ("data/packed/run", "lies in .*/data, a folder of the stage 'data', among its own files"),
        ("begun data/documents", "among its own files|is a folder of the stage 'data'"),
        ("sft/checkpoints/run", "lies in .*/sft, a folder of the stage 'train', among its own files"),
        ("begun run/tokenizer", "among its own files"),
        ("a" * 256, r"has a name of 256 bytes, and at most 255 can be used"),
        ("é" * 128 + "/run", r"has a name of 256 bytes, and at most 255"),
        ("/".join(["abcdefgh"] * 450), r"is a path of \d+ bytes, and at most 3840"),
        ("nul\0", "holds a NUL character"),
        ("\udcff", "is no UTF-8 text"),
    ],
)
def test_a_folder_that_could_not_be_used_is_refused(folder, output, told):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=f"^output: .*{told}"):
        check_output(f"{folder}/{output}", "train")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "output",
    ["new", "a/b/c", "sft", "begun run", "mine", "project/checkpoints/run", "data/run", "a" * 255, ".", "x..", "-x"],
)
def test_other_folders_are_taken(folder, output, monkeypatch):
    check_output(f"{folder}/{output}", "train")
    monkeypatch.chdir(folder)
    check_output(output, "train")


@pytest.mark.parametrize(
    ("output", "told"), [("", "is empty"), ("~/run", "a folder that is named '~'"), ("~", "named '~'")]
)
def test_names_that_mean_another_folder_are_refused(output, told):
    with pytest.raises(ConfigError, match=told):
        check_output(output, "train")


def test_a_folder_without_rights_is_refused(folder, monkeypatch):
    """Root may write anywhere, so the answer of the system is stood in for."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    with pytest.raises(ConfigError, match=f"^output: .* cannot be written: {folder} is read-only for you"):
        check_output(folder / "new" / "run", "train")
    check_output(folder / "sft", "train")
    # One that is replaced by what is written beside it needs the rights there.
    with pytest.raises(ConfigError, match=r"^OUTPUT: .* read-only"):
        check_output(folder / "int8", "export", key="OUTPUT", suffix=20)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="at most 235 can be used"):
        check_output(folder / ("a" * 240), "export", suffix=20)


def test_a_stage_is_known_by_what_it_writes(folder):
    stages = {name: stage_of(folder / name) for name in ("data", "sft", "begun run", "int8", "mine", "nothing")}
    assert stages == {
        "data": "data", "sft": "train", "begun run": "train", "int8": "export", "mine": None, "nothing": None
    }  # fmt: skip
