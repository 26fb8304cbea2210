"""Packed rows: token streams split into rows of one length, and the record format of a row.

The documents of a split form one stream, `[bos document eos][bos document eos]...`. A row has `row_length + 1` tokens
of it and shares one token with the next row, so that every token except the very first is a target exactly once. Only
the last row is padded.

A record, little-endian:

    bytes       content
    0..1        b"PR"
    2           version of this layout: 1
    3           bytes of a token: 2 or 4
    4..7        row_length L
    8..11       number of tokens without padding, 2 to L + 1
    12..15      number S of documents that begin in the row or continue from the previous row
    16..23      ordinal of the first of them; the others follow in order
    24..        S uint32: start of each among the row's tokens; the first is always 0
    then        L + 1 unsigned integers: the tokens
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from maxlm.errors import DataError

_HEADER = struct.Struct("<2sBBIIIQ")
_MAGIC, _VERSION = b"PR", 1


@dataclass(frozen=True)
class Row:
    """A stored row.

    Attributes:
      tokens: `[row_length + 1]` int32, padded at the end.
      num_tokens: number of tokens without padding.
      starts: `[num_documents]`: start of each document among the tokens; 0 if it began in the previous row.
      first_document: ordinal of the first document in the split's documents; the others follow in order.
    """

    tokens: np.ndarray
    num_tokens: int
    starts: np.ndarray
    first_document: int

    @property
    def row_length(self) -> int:
        """Number of tokens that a model reads."""
        return len(self.tokens) - 1

    @property
    def documents(self) -> range:
        """Ordinals of the documents that the model reads in this row."""
        num_read = int((self.starts < min(self.row_length, self.num_tokens)).sum())
        return range(self.first_document, self.first_document + num_read)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of this row in a batch, each `[row_length]`: int32, loss weights float32.

        `segment_ids` numbers the documents of the row from 1 and is 0 for padding. `positions` restarts with each.
        `loss_weights` is 0 if the target belongs to another document than the token, or is padding.
        """
        length = self.row_length
        ends = np.append(self.starts[1:], self.num_tokens)
        segments = np.zeros(length + 1, np.int32)
        positions = np.zeros(length + 1, np.int32)
        segments[: self.num_tokens] = np.repeat(np.arange(1, len(ends) + 1), ends - self.starts)
        positions[: self.num_tokens] = np.arange(self.num_tokens) - np.repeat(self.starts, ends - self.starts)
        return {
            "tokens": self.tokens[:-1],
            "targets": self.tokens[1:],
            "loss_weights": ((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32),
            "segment_ids": segments[:-1],
            "positions": positions[:-1],
        }


def encode_row(row: Row, *, token_bytes: int) -> bytes:
    """Encode a row as a record."""
    header = _HEADER.pack(
        _MAGIC, _VERSION, token_bytes, row.row_length, row.num_tokens, len(row.starts), row.first_document
    )
    return header + row.starts.astype("<u4").tobytes() + row.tokens.astype(f"<u{token_bytes}").tobytes()


def decode_row(record: bytes) -> Row:
    """Decode a record to a row.

    Raises:
      DataError: if the record has another format.
    """
    if record[:3] != _MAGIC + bytes([_VERSION]):
        raise DataError("a packed row has a format that this version cannot read; run `maxlm data build` again")
    _, _, token_bytes, length, num_tokens, num_segments, first_document = _HEADER.unpack_from(record)
    starts = np.frombuffer(record, "<u4", num_segments, _HEADER.size)
    tokens = np.frombuffer(record, f"<u{token_bytes}", length + 1, _HEADER.size + 4 * num_segments)
    return Row(tokens.astype(np.int32), num_tokens, starts.astype(np.int64), first_document)


def token_bytes_for(vocab_size: int) -> int:
    """Bytes per stored token."""
    return 2 if vocab_size <= 1 << 16 else 4


class Packer:
    """Splits a stream of documents into rows. Pass batches to `add`, then get the last row from `finish`."""

    def __init__(self, *, row_length: int, pad_id: int):
        self._length = row_length
        self._pad_id = pad_id
        self._tokens = np.empty(0, np.int32)  # not yet in a row, except for the shared one
        self._starts = np.empty(0, np.int64)  # of documents, in `_tokens`; negative if the first began before
        self._first_document = 0  # ordinal of the first of `_starts`

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> Iterator[Row]:
        """Add documents; yields the rows that they complete.

        Args:
          tokens: the documents' concatenated tokens, including bos and eos.
          lengths: `[num_documents]` tokens of each.
        """
        starts = len(self._tokens) + np.cumsum(lengths) - lengths
        self._starts = np.concatenate([self._starts, starts])
        self._tokens = np.concatenate([self._tokens, tokens])
        num_rows = max(0, len(self._tokens) - 1) // self._length
        for index in range(num_rows):
            yield self._row(index * self._length)
        done = num_rows * self._length
        self._tokens = self._tokens[done:]
        self._starts = self._starts - done
        num_past = max(0, int(np.searchsorted(self._starts, 0, side="right")) - 1)
        self._starts = self._starts[num_past:]
        self._first_document += num_past

    def finish(self) -> Iterator[Row]:
        """The last, padded row, if there are tokens that have not been a target."""
        if len(self._tokens) > 1:
            yield self._row(0)
        self._tokens = np.empty(0, np.int32)

    def _row(self, begin: int) -> Row:
        tokens = self._tokens[begin : begin + self._length + 1]
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, begin + len(tokens), side="left"))
        padded = np.full(self._length + 1, self._pad_id, np.int32)
        padded[: len(tokens)] = tokens
        starts = np.maximum(self._starts[first:last] - begin, 0)
        return Row(padded, len(tokens), starts, self._first_document + first)
