"""Output folders: checked at the start of a stage, and reported in one sentence."""

import os

import pytest

from maxlm.errors import ConfigError
from maxlm.runtime.manifest import write_json
from maxlm.runtime.output import check_output, replaced_folder, stage_of


@pytest.fixture
def folder(tmp_path):
    """Folders of every stage, complete and incomplete, and obstacles."""
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
    ("output", "message"),
    [
        ("file", "is a file; give a folder"),
        ("file/run", "leads through .*/file, which is a file"),
        ("dangling", r"leads to .*/dangling, a link to .*/nowhere, which does not exist"),
        ("dangling/run", "a link to .*/nowhere, which does not exist"),
        ("loop/run", "which does not exist"),
        ("data", "is a folder of the stage 'data'"),
        ("link", "is a folder of the stage 'data'"),
        ("begun data", "is a folder of the stage 'data'"),
        ("tokenizer", "is a folder of the stage 'tokenizer'"),
        ("begun tokenizer", "is a folder of the stage 'tokenizer'"),
        ("int8", "is a folder of the stage 'export'"),
        ("data/packed/run", "is in .*/data, a folder of the stage 'data', among its own files"),
        ("begun data/documents", "among its own files|is a folder of the stage 'data'"),
        ("sft/checkpoints/run", "is in .*/sft, a folder of the stage 'train', among its own files"),
        ("begun run/tokenizer", "among its own files"),
        ("a" * 256, r"has a name of 256 bytes, but at most 255 can be used"),
        ("é" * 128 + "/run", r"has a name of 256 bytes, but at most 255"),
        ("/".join(["abcdefgh"] * 450), r"is a path of \d+ bytes, but at most 3840"),
        ("nul\0", "contains a NUL character"),
        ("\udcff", "is not UTF-8 text"),
    ],
)
def test_unusable_output_folder_is_rejected(folder, output, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=f"^output: .*{message}"):
        check_output(f"{folder}/{output}", "train")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "output",
    ["new", "a/b/c", "sft", "begun run", "mine", "project/checkpoints/run", "data/run", "a" * 255, ".", "x..", "-x"],
)
def test_usable_output_folders_are_accepted(folder, output, monkeypatch):
    check_output(f"{folder}/{output}", "train")
    monkeypatch.chdir(folder)
    check_output(output, "train")


@pytest.mark.parametrize(("output", "message"), [("", "is empty"), ("~/run", "a folder named '~'"), ("~", "named '~'")])
def test_names_that_mean_another_folder_are_rejected(output, message):
    with pytest.raises(ConfigError, match=message):
        check_output(output, "train")


def test_folder_without_write_permission_is_rejected(folder, monkeypatch):
    """Root may write anywhere, so the system's answer is mocked."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    with pytest.raises(ConfigError, match=f"^output: .* cannot be written: {folder} is read-only for you"):
        check_output(folder / "new" / "run", "train")
    check_output(folder / "sft", "train")
    # A folder that is replaced by a rename needs write permission in its parent.
    with pytest.raises(ConfigError, match=r"^OUTPUT: .* read-only"):
        check_output(folder / "int8", "export", key="OUTPUT", suffix=20)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="at most 235 can be used"):
        check_output(folder / ("a" * 240), "export", suffix=20)


def test_stage_is_identified_by_its_files(folder):
    stages = {name: stage_of(folder / name) for name in ("data", "sft", "begun run", "int8", "mine", "nothing")}
    assert stages == {
        "data": "data", "sft": "train", "begun run": "train", "int8": "export", "mine": None, "nothing": None
    }  # fmt: skip


def test_failed_replacement_puts_the_earlier_folder_back(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").touch()
    with pytest.raises(FileNotFoundError), replaced_folder(tmp_path / "out") as temporary:
        temporary.rmdir()  # It can no longer be renamed into place.
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/earlier"]


def test_replacement_leaves_only_the_new_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").touch()
    with replaced_folder(tmp_path / "out") as temporary:
        (temporary / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/new"]
