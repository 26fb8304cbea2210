import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from pydantic import ValidationError

from maxlm.config.data import SourceConfig
from maxlm.data.documents import Document, Reject
from maxlm.data.sources import read_source
from maxlm.errors import DataError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(uri, **changes) -> tuple[list[Document], list[Reject]]:
    records = list(read_source(SourceConfig(uri=str(uri), **changes)))
    return [r for r in records if isinstance(r, Document)], [r for r in records if isinstance(r, Reject)]


# Every format


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines(tmp_path, ending):
    rows = [{"text": "one ▁ 一"}, {"text": "two", "id": 7}, {"text": ""}]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending]("\n".join(map(json.dumps, rows)).encode()))
    documents, rejects = read(path, id_field="id", licence="MIT")
    assert [d.text for d in documents] == ["one ▁ 一", "two", ""]
    assert [d.id for d in documents] == [f"{path.name}:1", "7", f"{path.name}:3"]
    assert {(d.source, d.licence) for d in documents} == {(str(path), "MIT")}
    assert rejects == []


def test_a_json_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"body": "one"}, {"body": "two"}], indent=1))
    assert [(d.id, d.text) for d in read(path, text_field="body")[0]] == [("a.json:0", "one"), ("a.json:1", "two")]


def test_json_file_with_one_object_per_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}\n\n{"text": "two"}')
    assert [(d.id, d.text) for d in read(path)[0]] == [("a.json:1", "one"), ("a.json:3", "two")]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "three"], "name": ["x", "y", "z"]}), path)
    documents, rejects = read(path, id_field="name")
    assert [(d.id, d.text) for d in documents] == [("x", "one"), ("z", "three")]
    assert [(r.id, r.reason) for r in rejects] == [("a.parquet:1", "no_text")]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_file_is_one_document(tmp_path, ending):
    text = "\ufefffirst\r\n\r\nsecond\n"
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](text.encode()))
    documents, _ = read(path)
    assert [(d.id, d.text) for d in documents] == [(f"a.txt{ending}", text[1:])]


def test_text_file_is_split_at_blank_lines(tmp_path):
    paragraphs = [f"{'x' * 30} {n}\nmore" for n in range(10)]
    path = tmp_path / "a.md"
    path.write_text("\n\n".join(paragraphs) + "\n")
    documents, _ = read(path, split_on_blank_lines=70)
    assert [d.id for d in documents] == ["a.md:1", "a.md:7", "a.md:13", "a.md:19", "a.md:25"]
    assert "\n\n".join(d.text.rstrip("\n") for d in documents) == "\n\n".join(paragraphs)


def test_each_line_can_be_a_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\nbad \xff\nthree")
    documents, (reject,) = read(path, document_per_line=True)
    assert [(d.id, d.text) for d in documents] == [("a.txt:1", "one\n"), ("a.txt:4", "three")]
    assert (reject.id, reject.text) == ("a.txt:3", "bad \ufffd\n")


def test_split_modes_are_mutually_exclusive():
    with pytest.raises(ValidationError, match="mutually exclusive"):
        SourceConfig(uri="a.txt", document_per_line=True, split_on_blank_lines=9)


def test_a_glob_reads_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "c"}' if name == "c.jsonl" else name[0])
    assert [d.text for d in read(tmp_path / "*")[0]] == ["a", "b", "c"]
    assert [d.id for d in read(tmp_path / "*.txt")[0]] == ["a.txt", "b.txt"]


def test_a_limit_reads_that_many_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("broken\n" + '{"text": "x"}\n' * 9)
    documents, rejects = read(tmp_path / "a.jsonl", limit=3)
    assert (len(documents), len(rejects)) == (3, 1)


# Malformed records are rejected, and reading continues


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "cut', "no_json", "a.jsonl:2: is not JSON: Unterminated string"),
        (b'{"body": "x", "texts": "y"}', "no_text", "did you mean text_field: texts?"),
        (b'{"text": 7}', "no_text", "a.jsonl:2: field 'text' is not a string"),
        (b'["text"]', "no_text", "is not an object"),
        (b'{"text": "\xff\xfe"}', "broken_text", "a.jsonl:2: is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "broken_text", "contains a lone surrogate"),
        (b'{"texts": "\\ud800"}', "no_text", "did you mean"),
        (b"9" * 5000, "no_json", "a.jsonl:2: is not JSON"),
        (b"[" * 100_000, "no_json", "a.jsonl:2: is not JSON"),
    ],
)
def test_bad_line_is_rejected_with_its_location(tmp_path, line, reason, detail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    documents, (reject,) = read(path)
    assert [d.text for d in documents] == ["one", "three"]
    assert (reject.id, reject.reason) == ("a.jsonl:2", reason)
    assert detail in reject.detail
    assert str(path) in reject.detail
    assert reject.text
    json.dumps(reject.text, ensure_ascii=False).encode()


def test_only_the_non_utf8_paragraph_is_rejected(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good one\n\nbad \xff\n\ngood two\n")
    documents, (reject,) = read(path, split_on_blank_lines=1)
    assert [d.text.strip() for d in documents] == ["good one", "good two"]
    assert (reject.id, reject.reason) == ("a.txt:3", "broken_text")
    assert "line 3 is not valid UTF-8" in reject.detail
    assert reject.text == "bad \ufffd\n\n"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_compressed_file_is_read_up_to_the_truncation(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 10**9, (4000, 12))
    lines = [json.dumps({"text": " ".join(map(str, row))}) for row in noise]
    path = tmp_path / f"a.jsonl{ending}"
    whole = COMPRESS[ending]("\n".join(lines).encode())
    path.write_bytes(whole[: len(whole) * 3 // 4])
    documents, (reject,) = read(path)
    assert 1000 < len(documents) < 3100
    assert [d.text for d in documents] == [json.loads(line)["text"] for line in lines[: len(documents)]]
    assert reject.reason == "broken_text"
    assert "is truncated" in reject.detail
    assert lines[len(documents)].startswith(reject.text)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_corruption_inside_of_a_compressed_file(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 10**9, (8000, 12))
    lines = [json.dumps({"text": " ".join(map(str, row))}) for row in noise]
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[ending]
    content = bytearray(compress("\n".join(lines).encode()))
    content[len(content) // 2 : len(content) // 2 + 500] = b"\xa5" * 500
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(content)
    documents, rejects = read(path)
    assert len(documents) > 1000
    assert [r.reason for r in rejects][-1] == "broken_text"
    assert "cannot be read to the end" in rejects[-1].detail


def test_compressed_files_of_several_members(tmp_path):
    for ending in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(COMPRESS[ending](b'{"text": "one"}\n') + COMPRESS[ending](b'{"text": "two"}\n'))
        assert [d.text for d in read(path)[0]] == ["one", "two"]


def test_only_non_utf8_parquet_values_are_rejected(tmp_path):
    path = tmp_path / "a.parquet"
    values = pyarrow.array([b"one", b"\xff", b"three"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    parquet.write_table(pyarrow.table({"text": text}), path)
    documents, (reject,) = read(path)
    assert [d.text for d in documents] == ["one", "three"]
    assert (reject.id, reject.reason) == ("a.parquet:1", "broken_text")


def test_empty_or_corrupt_file_among_others_is_rejected(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.parquet").write_text("no parquet")
    documents, rejects = read(tmp_path / "*")
    assert len(documents) == 1
    assert [(r.id, r.reason) for r in rejects] == [
        ("b.jsonl", "empty_file"),
        ("c.txt", "empty_file"),
        ("d.parquet", "broken_file"),
    ]


# Unusable sources


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.txt", b"", "a.txt: is empty"),
        ("a.jsonl.gz", b"", "no record of it can be used"),
        ("a.jsonl", b"\n\n", "has no documents"),
        ("a.jsonl", b"x\ny\n", "the first, a.jsonl:1: "),
        ("a.json", b'[{"text": "x"', "a.json:1, item 0: is not JSON: Expecting ',' delimiter"),
        ("a.jsonl.gz", b"no gzip", "cannot be read to the end"),
        ("a.parquet", b"no parquet", "is not a Parquet file"),
        ("a.csv", b"a,b", "its format is unknown; it must end in .txt, .md, .jsonl, .json, .parquet"),
    ],
)
def test_source_without_a_valid_record_is_one_clear_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_suggests_the_closest_name(tmp_path):
    (tmp_path / "wiki_en.txt").write_text("x")
    with pytest.raises(DataError, match=r"wiki_n.txt: there is no such file; did you mean .*wiki_en.txt\?"):
        read(tmp_path / "wiki_n.txt")
    with pytest.raises(DataError, match="is a folder; give the files in it"):
        read(tmp_path)
    with pytest.raises(DataError, match="the embedded corpus is python:stdlib"):
        read("python:stdlb")


def test_missing_parquet_column_suggests_the_closest_name(tmp_path):
    parquet.write_table(pyarrow.table({"texts": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no column 'text'; did you mean texts\?"):
        read(tmp_path / "a.parquet")
