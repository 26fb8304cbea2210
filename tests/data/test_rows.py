import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data.rows import Packer, decode_row, encode_row, token_bytes_for
from maxlm.errors import DataError

BOS, EOS, PAD = 1, 2, 0

documents_strategy = st.lists(st.lists(st.integers(3, 2**17), max_size=9), min_size=1, max_size=25)


def pack(documents, row_length, batch_size=3):
    framed = [[BOS, *document, EOS] for document in documents]
    packer = Packer(row_length=row_length, pad_id=PAD)
    rows = []
    for start in range(0, len(framed), batch_size):
        batch = framed[start : start + batch_size]
        tokens = np.array([token for document in batch for token in document], np.int32)
        rows += packer.add(tokens, np.array(list(map(len, batch))))
    return [*rows, *packer.finish()]


def expected_rows(documents, row_length):
    """The reference definition, token by token."""
    stream = [
        (token, number, place) for number, d in enumerate(documents) for place, token in enumerate([BOS, *d, EOS])
    ]
    for begin in range(0, len(stream) - 1, row_length):
        row = {name: [] for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions")}
        first = stream[begin][1]
        start_of = {}
        for place in range(begin, begin + row_length):
            token = stream[place] if place < len(stream) else None
            target = stream[place + 1] if place + 1 < len(stream) else None
            if token:
                start_of.setdefault(token[1], place)
            row["tokens"].append(token[0] if token else PAD)
            row["targets"].append(target[0] if target else PAD)
            row["loss_weights"].append(float(bool(token and target and token[1] == target[1])))
            row["segment_ids"].append(token[1] - first + 1 if token else 0)
            row["positions"].append(place - start_of[token[1]] if token else 0)
        yield row, sorted(start_of)


@settings(max_examples=150, deadline=None)
@given(documents=documents_strategy, row_length=st.integers(2, 12), batch_size=st.integers(1, 7))
def test_rows_match_the_reference_definition(documents, row_length, batch_size):
    rows = pack(documents, row_length, batch_size)
    expected = list(expected_rows(documents, row_length))
    assert len(rows) == len(expected)
    for row, (arrays, ordinals) in zip(rows, expected):
        row = decode_row(encode_row(row, token_bytes=4))
        assert {name: array.tolist() for name, array in row.arrays().items()} == arrays
        assert list(row.documents) == ordinals
        assert row.row_length == row_length


@settings(max_examples=100, deadline=None)
@given(documents=documents_strategy, row_length=st.integers(2, 12))
def test_every_token_but_bos_is_a_weighted_target_exactly_once(documents, row_length):
    targets = [
        token
        for row in pack(documents, row_length)
        for token, weight in zip(row.arrays()["targets"].tolist(), row.arrays()["loss_weights"].tolist())
        if weight
    ]
    assert targets == [token for document in documents for token in [*document, EOS]]


@settings(max_examples=100, deadline=None)
@given(documents=documents_strategy, row_length=st.integers(2, 12))
def test_only_the_last_row_is_padded_and_no_row_is_without_a_target(documents, row_length):
    rows = [row.arrays() for row in pack(documents, row_length)]
    assert all((row["segment_ids"] > 0).all() for row in rows[:-1])
    assert all(row["loss_weights"].any() for row in rows)


def test_dtypes_are_those_of_a_batch():
    arrays = pack([[3, 4, 5]], 8)[0].arrays()
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "tokens": "int32", "targets": "int32", "loss_weights": "float32", "segment_ids": "int32", "positions": "int32",
    }  # fmt: skip


def test_record_has_the_documented_layout():
    row = pack([[300], [7, 8]], 4)[1]
    record = encode_row(row, token_bytes=2)
    assert record.hex(" ", 4) == bytes.fromhex(
        "5052 01 02"  # magic, version, two bytes a token
        "04000000 03000000 01000000"  # row length, tokens, documents
        "0100000000000000"  # the first is document 1
        "00000000"  # it begins before the row, at 0
        "0700 0800 0200 0000 0000"
    ).hex(" ", 4)


def test_tokens_are_stored_in_two_bytes_if_they_fit():
    assert (token_bytes_for(65536), token_bytes_for(65537)) == (2, 4)
    row = pack([[65535]], 4)[0]
    assert (decode_row(encode_row(row, token_bytes=2)).tokens == row.tokens).all()


@pytest.mark.parametrize("record", [b"", b"PR\x02\x02" + bytes(40), b"other"])
def test_record_of_another_format_is_rejected(record):
    with pytest.raises(DataError, match="run `maxlm data build` again"):
        decode_row(record)
