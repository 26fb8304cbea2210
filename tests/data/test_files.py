"""The files that a source matches, and their names."""

import os

import pyarrow
import pyarrow.parquet as parquet
import pytest

from maxlm.config.data import SourceConfig
from maxlm.data.files import find_sources
from maxlm.data.sources import read_sources
from maxlm.errors import DataError


def names(*uris, output=None) -> list[str]:
    sources = find_sources([SourceConfig(uri=str(uri)) for uri in uris], output=output)
    return [file.name for source in sources for file in source.files]


def make(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('{"text": "x"}\n')
    return folder


def test_name_is_the_path_relative_to_the_part_without_patterns(tmp_path):
    make(tmp_path, "x/a/part.jsonl", "x/b/part.jsonl", "x/b/c/part.jsonl")
    assert names(tmp_path / "x" / "*" / "part.jsonl") == ["a/part.jsonl", "b/part.jsonl"]
    assert names(tmp_path / "x" / "**" / "*.jsonl") == ["a/part.jsonl", "b/c/part.jsonl", "b/part.jsonl"]
    assert names(tmp_path / "x/a/part.jsonl") == names(tmp_path / "x/a/*.jsonl") == ["part.jsonl"]


def test_names_of_several_sources_are_unique_and_earlier_ones_stay(tmp_path, monkeypatch):
    make(tmp_path, "a/part.jsonl", "b/part.jsonl", "b/a/part.jsonl")
    uris = [tmp_path / "a" / "*.jsonl", tmp_path / "b" / "part.jsonl", tmp_path / "b" / "a" / "part.jsonl"]
    assert names(*uris) == ["part.jsonl", "b/part.jsonl", "a/part.jsonl"]
    assert names(uris[0], uris[0]) == ["part.jsonl", "a/part.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert names("a/*.jsonl", "b/part.jsonl") == ["part.jsonl", "b/part.jsonl"]
    ids = [d.id for d in read_sources(find_sources([SourceConfig(uri="a/part.jsonl")] * 30))]
    assert len(set(ids)) == 30


@pytest.mark.parametrize("folder", ["x[1]", "a*b", "what?", "back\\slash", "[!a]", "ü 漢"])
def test_existing_names_with_glob_characters_are_literal(tmp_path, folder):
    make(tmp_path, f"{folder}/a[0].jsonl", f"{folder}/b.jsonl", "x1/b.jsonl", "aXb/b.jsonl")
    assert names(tmp_path / folder / "a[0].jsonl") == ["a[0].jsonl"]
    assert names(tmp_path / folder / "*.jsonl") == ["a[0].jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/*/b.jsonl")[-1] == "x1/b.jsonl" or folder > "x1"


def test_home_folder_and_uppercase_extensions(tmp_path, monkeypatch):
    make(tmp_path, "data/A.JSONL", "data/b.Json", "data/c.TXT", "data/d.ndjson")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/data/*") == ["A.JSONL", "b.Json", "c.TXT", "d.ndjson"]
    assert names("~/data/A.JSONL") == ["A.JSONL"]


def test_folders_in_a_glob_are_skipped(tmp_path):
    make(tmp_path, "a.jsonl", "folder/b.jsonl")
    assert names(tmp_path / "*") == ["a.jsonl"]


@pytest.mark.parametrize("uri", ["*.jsonl", "bad.jsonl"])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("link", r"is a link to nowhere\.jsonl, which does not exist; fix or remove the link"),
        ("folder", r"is a folder; give the files in it, such as .*bad\.jsonl/\*\.jsonl"),
        ("pipe", "is a pipe or device, which cannot be read more than once; write its content"),
    ],
)
def test_non_files_are_reported_before_reading(tmp_path, kind, sentence, uri):
    make(tmp_path, "a.jsonl")
    bad = tmp_path / "bad.jsonl"
    {"link": lambda: bad.symlink_to("nowhere.jsonl"), "folder": bad.mkdir, "pipe": lambda: os.mkfifo(bad)}[kind]()
    with pytest.raises(DataError, match=f"bad.jsonl:? {sentence}"):
        names(tmp_path / uri)


def test_build_outputs_are_not_read(tmp_path, capsys):
    make(tmp_path, "raw.jsonl", "out/mine.jsonl", "out/rejects.jsonl", "out/documents/a.jsonl", "out/manifest.json.tmp")
    make(tmp_path, "out/documents.tmp/rejects.jsonl", "elsewhere/rejects.jsonl")
    (tmp_path / "link.jsonl").symlink_to("out/rejects.jsonl")
    found = names(tmp_path / "**" / "*.jsonl", output=tmp_path / "elsewhere" / ".." / "out")
    assert found == ["elsewhere/rejects.jsonl", "out/mine.jsonl", "raw.jsonl"]
    assert "4 files that a build wrote into" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match="matches only files that a build wrote into"):
        names(tmp_path / "out" / "rejects.jsonl", output=tmp_path / "out")


def test_fields_may_be_nested(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"meta": {"id": 7}, "doc": {"body": "one"}}\n{"doc": {"bodies": "two"}}')
    parquet.write_table(pyarrow.table({"doc": [{"body": "three"}], "meta": [{"id": "x"}]}), tmp_path / "b.parquet")
    source = SourceConfig(uri=str(tmp_path / "*"), text_field="doc.body", id_field="meta.id")
    one, reject, three = read_sources(find_sources([source]))
    assert [(d.id, d.text) for d in (one, three)] == [("7", "one"), ("x", "three")]
    assert "a.jsonl:2: field 'doc.body' is not a string" in reject.detail


def test_columns_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["text", "text"]), path)
    with pytest.raises(DataError, match="has 2 columns named 'text'"):
        list(read_sources(find_sources([SourceConfig(uri=str(path))])))
    far = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "when": far}), path)
    reject, document = read_sources(find_sources([SourceConfig(uri=str(path), id_field="when")]))
    assert reject.reason == "broken_value"
    assert document.text == "two"


def test_non_utf8_file_name_still_gives_ids(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"bad\xff.jsonl")
    with open(path, "w") as file:
        file.write('{"text": "x"}\n')
    (document,) = read_sources(find_sources([SourceConfig(uri=f"{tmp_path}/*.jsonl")]))
    assert document.id == "bad\\xff.jsonl:1"
    parquet.write_table(pyarrow.table({"text": ["y"]}), tmp_path / "good.parquet")
    os.rename(tmp_path / "good.parquet", os.path.join(os.fsencode(tmp_path), b"bad\xff.parquet"))
    (document,) = read_sources(find_sources([SourceConfig(uri=f"{tmp_path}/*.parquet")]))
    assert (document.id, document.text) == ("bad\\xff.parquet:0", "y")
