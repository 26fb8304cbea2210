"""JSON values are read from files of any layout, concatenation or compression; malformed ones are reported in place."""

import gzip
import json
import time

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data import lines
from maxlm.data.json_values import Broken, Value, lookup, read_values
from maxlm.data.lines import read_text_lines

ONE, TWO, THREE = ({"text": text} for text in ("one", "two", "three"))


def read(path, content: bytes | str):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_values(path))


LAYOUTS = {
    "lines": '{"text":"one"}\n{"text":"two"}\n{"text":"three"}\n',
    "no end of the last line": '{"text":"one"}\n{"text":"two"}\n{"text":"three"}',
    "DOS lines": '{"text":"one"}\r\n{"text":"two"}\r\n{"text":"three"}\r\n',
    "CR alone": '{"text":"one"}\r{"text":"two"}\r{"text":"three"}\r',
    "joined without an end of line": '{"text":"one"}{"text":"two"}\n{"text":"three"}',
    "joined with byte order marks": '\ufeff{"text":"one"}\n\ufeff{"text":"two"}\ufeff{"text":"three"}\n',
    "empty lines": '\n\n{"text":"one"}\n \t\n{"text":"two"}\n\n{"text":"three"}\n\n',
    "commas after lines": '{"text":"one"},\n{"text":"two"},\n{"text":"three"}\n',
    "a list": '[{"text":"one"},{"text":"two"},{"text":"three"}]',
    "a list after empty lines": '\ufeff\n\n [\n{"text":"one"}, {"text":"two"},\n{"text":"three"}\n]\n',
    "two lists": '[{"text":"one"},{"text":"two"}]\n[{"text":"three"}]',
    "objects over several lines": '{\n "text":\n "one"\n}\n{\n"text": "two"}\n{"text":\n"three"}\n',
    "an indented list": json.dumps([ONE, TWO, THREE], indent=2),
}


@pytest.mark.parametrize("block", [3, 1 << 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_values(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(lines, "_BLOCK", block)
    items = read(tmp_path / "a.jsonl", LAYOUTS[layout])
    assert [item.value for item in items] == [ONE, TWO, THREE]
    assert len({item.place for item in items}) == 3


def test_places_are_lines_or_list_items(tmp_path):
    path = tmp_path / "a.jsonl"
    assert [item.where for item in read(path, LAYOUTS["empty lines"])] == [f"{path}:{n}" for n in (3, 5, 7)]
    assert [item.place for item in read(path, LAYOUTS["joined without an end of line"])] == ["1", "1:15", "2"]
    items = read(path, LAYOUTS["an indented list"])
    assert [(item.place, item.where) for item in items] == [(str(n), f"{path}:{2 + 3 * n}, item {n}") for n in range(3)]


@pytest.mark.parametrize("text", ["a\u2028b\u2029c", "a\x0cb\x0bc\x1cd\x85e", "a\u00a0b\ufeffc", "a\x00b", "a\\nb\\rc"])
def test_only_line_ends_end_a_line(tmp_path, text):
    content = "\n".join(json.dumps({"text": text + str(n)}, ensure_ascii=False) for n in range(3))
    items = read(tmp_path / "a.jsonl", content)
    assert [(item.place, item.value["text"]) for item in items] == [(str(n + 1), text + str(n)) for n in range(3)]


BROKEN = {
    '{"text": "cut': "is not JSON: Unterminated string starting at column ",
    '{"text": "two", ': "is not JSON: Expecting property name",
    '{"text": [': "is not JSON: Expecting",
    "no JSON": "is not JSON: Expecting value at column ",
    '{"text": "a", "text": "b"}': "is not JSON: the key 'text' is given twice in one object",
    "9" * 5000: "is not JSON: it has a number of thousands of digits",
    '{"a":' * 5000: "is not JSON: nested too deep",
    "\0" * 40: "contains zero bytes, as after an interrupted write",
    '{"text": "a\x00b"}': "is not JSON: Invalid control character at column ",
    b'{"text": "\xff"}': "is not valid UTF-8",
    b"\xff\xfe": "is not valid UTF-8",
}


@pytest.mark.parametrize("layout", ["lines", "last line", "list of lines", "indented list"])
@pytest.mark.parametrize("bad", BROKEN, ids=[str(text)[:20] for text in BROKEN])
def test_malformed_values_are_reported_and_later_ones_are_read(tmp_path, bad, layout):
    before, after = {
        "lines": ('{"text":"one"}\n', '\n{"text":"three"}\n'),
        "last line": ('{"text":"one"}\n{"text":"three"}\n', ""),
        "list of lines": ('[{"text":"one"},\n', ',\n{"text":"three"}\n]'),
        "indented list": ('[\n  {"text":"one"},\n  ', ',\n  {"text":"three"}\n]'),
    }[layout]
    bad_bytes = bad if isinstance(bad, bytes) else bad.encode()
    items = read(tmp_path / "a.jsonl", before.encode() + bad_bytes + after.encode())
    assert [item.value for item in items if isinstance(item, Value)] == [ONE, THREE]
    (broken,) = (item for item in items if isinstance(item, Broken))
    assert BROKEN[bad] in broken.detail
    assert str(tmp_path / "a.jsonl:") in broken.where
    json.dumps(broken.text, ensure_ascii=False).encode()


def test_truncated_and_malformed_lists(tmp_path):
    path = tmp_path / "a.json"
    *good, broken = read(path, '[{"text":"one"},{"text":"two"}')
    assert [item.value for item in good] == [ONE, TWO]
    assert "the list is not closed" in broken.detail
    first, broken = read(path, '[{"text":"one"},{"text" "two"},{"text":"three"}]')
    assert (first.value, broken.place) == (ONE, "1")
    assert "the rest of the list cannot be read" in broken.detail
    assert read(path, "[]") == []
    (broken,) = read(path, "")
    assert (broken.reason, broken.detail) == ("empty_file", "is empty")


def test_non_utf8_text_is_reported(tmp_path):
    (broken,) = read(tmp_path / "a.jsonl", '{"text": "one"}\n'.encode("utf-16"))
    assert "is UTF-16 text; convert it with: iconv" in broken.detail


TEXT = b'{"text":"one"}\n{"text":"two"}\n{"text":"three"}\n'
ZSTD_PADDING = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a frame that readers must skip
COMPRESSED = {
    "gzip padded with zeros": ("a.jsonl.gz", gzip.compress(TEXT) + bytes(70_000)),
    "gzip members with zeros between": ("a.jsonl.gz", gzip.compress(TEXT[:15]) + bytes(9) + gzip.compress(TEXT[15:])),
    "zstd frames": ("a.jsonl.zst", zstandard.compress(TEXT[:15]) + ZSTD_PADDING + zstandard.compress(TEXT[15:])),
    "an ending in capitals": ("A.JSONL.GZ", gzip.compress(TEXT)),
    "gzip without its ending": ("a.jsonl", gzip.compress(TEXT)),
    "text with an ending of zstd's": ("a.jsonl.zst", zstandard.compress(TEXT)),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_files(tmp_path, kind):
    name, content = COMPRESSED[kind]
    assert [item.value for item in read(tmp_path / name, content)] == [ONE, TWO, THREE]


def test_zstd_with_a_long_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(TEXT) + compressor.flush()
    with pytest.raises(zstandard.ZstdError, match="memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(content)
    assert [item.value for item in read(tmp_path / "a.jsonl.zst", content)] == [ONE, TWO, THREE]


def test_a_list_on_one_line_is_read_in_linear_time(tmp_path):
    def seconds(count: int) -> float:
        (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 500}] * count))
        start = time.process_time()
        assert sum(1 for _ in read_values(tmp_path / "a.json")) == count
        return time.process_time() - start

    # Reparsing everything for each block took at least 16 times as long.
    assert min(seconds(8_000) for _ in range(2)) < 10 * min(seconds(2_000) for _ in range(3))


def test_parquet_rows_are_objects(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "m": [[{"role": "user"}], None]}), path)
    assert [item.value for item in read_values(path)] == [
        {"text": "one", "m": [{"role": "user"}]},
        {"text": "two", "m": None},
    ]
    (broken,) = read(path, "no Parquet")
    assert "cannot be read as Parquet" in broken.detail


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\u2028", max_size=3), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.text("abc", min_size=1, max_size=3), VALUES, min_size=1, max_size=4), max_size=6)
GAPS = st.sampled_from(["\n", "\r\n", "", "\n\n", "\n\ufeff", " ", ",\n", "\n  "])


@settings(max_examples=60, deadline=None)
@given(records=RECORDS, data=st.data())
def test_all_values_are_read_with_any_separators(tmp_path_factory, records, data):
    path = tmp_path_factory.getbasetemp() / "values.jsonl"
    content = "".join(
        json.dumps(record, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 0, 2])))
        + data.draw(GAPS)
        for record in records
    )
    if records and data.draw(st.booleans()):
        content = json.dumps(records, indent=data.draw(st.sampled_from([None, 2])))
    items = read(path, content) if content else []
    assert [item.value for item in items] == records
    assert len({item.place for item in items}) == len(records)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=80) | st.text('{}[]",: \n\r\ufeffa1\\', max_size=80).map(str.encode))
def test_any_file_content_can_be_read(tmp_path_factory, content):
    items = read(tmp_path_factory.getbasetemp() / "any.jsonl", content)
    assert len({item.place for item in items}) == len(items)
    assert items or not content.decode().strip(", \t\r\n\v\f\x1c\x1d\x1e\x1f[]\ufeff")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\n\nthree", ["one\n", "two\n", "\n", "three"]),
        ("one\r\ntwo\r\n", ["one\r\n", "two\r\n"]),
        ("one\rtwo\r\rthree", ["one\r", "two\r", "\r", "three"]),
        ("one\n\ufefftwo\n", ["one\n", "two\n"]),
        ("one\u2028\x0ctwo\x85\n\rthree", ["one\u2028\x0ctwo\x85\n", "\rthree"]),
    ],
)
@pytest.mark.parametrize("block", [7, 1 << 16])
def test_lines_end_at_the_line_ends_of_their_file(tmp_path, monkeypatch, content, expected, block):
    monkeypatch.setattr(lines, "_BLOCK", block)
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert [(n, line.decode()) for n, line in read_text_lines(tmp_path / "a.txt")] == list(enumerate(expected, 1))


def test_lookup_follows_dots():
    record = {"a": {"b": [{"c": 1}]}, "a.b": 2, "d": None}
    assert [lookup(record, path) for path in ("a.b", "a.b.0.c", "a.b.1", "d.e", "x")] == [2, 1, None, None, None]
