"""Held-out rows for validation: the same ones each time, spread evenly over sources and rows.

A source is a value of the column `source` in a folder's documents; sources of different folders are distinct.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import xxhash

from maxlm.data.loader import OpenedSplit, PackedRows, open_splits
from maxlm.data.rows import Row, decode_row
from maxlm.data.sample import even_sample
from maxlm.runtime.written import table_batches


class HeldOutRows(PackedRows):
    """A sample of held-out rows, in batches. Created by `open_held_out`.

    Attributes:
      sources: short, unique names of the sources.
    """

    def __init__(self, opened: list[OpenedSplit], sources: list[str], document_sources: list[np.ndarray], **settings):
        super().__init__(opened, **settings)
        self.sources = sources
        self._document_sources = document_sources

    def batch(self, step: int, *, shard: int = 0, num_shards: int = 1) -> dict[str, np.ndarray]:
        """Like `PackedRows.batch`, plus `source_ids`: `[B, L]` int32, indices into `sources`; 0 for padding."""
        rows = self._read(step, shard, num_shards)
        source_ids = np.stack([self._source_ids(number, row) for number, row in rows])
        return {**super().batch(step, shard=shard, num_shards=num_shards), "source_ids": source_ids}

    def _source_ids(self, number: int, row: Row | None) -> np.ndarray:
        if row is None:
            return np.zeros(self.row_length, np.int32)
        segments = row.arrays()["segment_ids"]
        documents = self._document_sources[number][row.first_document :]
        return np.where(segments > 0, documents[np.maximum(segments - 1, 0)], 0).astype(np.int32)


def open_held_out(paths: Sequence[str | Path], *, batch_size: int, num_batches: int) -> HeldOutRows:
    """At most `num_batches` batches of the held-out rows of data folders.

    The selection depends only on the folders' content and the number of rows, not on the order of the folders. Each
    source has at least one row if there are as many rows as sources, and beyond that in proportion to its size. More
    batches read the same rows plus others.

    Raises:
      DataError: a folder is not a complete build, has no held-out rows, or rows differ in length.
      TokenizerError: the folders were made with different tokenizers.
    """
    paths = list({os.path.realpath(path): path for path in paths}.values())
    opened, row_length = open_splits(paths, "valid")
    # Ties and the rows of a batch do not depend on the order of the folders.
    in_order = sorted(range(len(opened)), key=lambda number: _identity(opened[number]))

    names: list[tuple[str, str]] = []
    document_sources: list[np.ndarray] = []
    groups: list[list[np.ndarray]] = []
    starts = np.zeros(len(opened), np.int64)
    starts[in_order] = np.cumsum([0, *(len(opened[number].records) for number in in_order[:-1])])
    for number, folder in enumerate(opened):
        uris, of_document = _sources_of(folder)
        document_sources.append(of_document + len(names))
        names += [(str(paths[number]), uri) for uri in uris]
        groups.append([starts[number] + rows for rows in _rows_by_source(folder, of_document, len(uris))])
    sample = even_sample([group for number in in_order for group in groups[number]], num_batches * batch_size)

    ends = starts[in_order] + [len(opened[number].records) for number in in_order]
    folders = np.array(in_order)[np.searchsorted(ends, sample, side="right")]
    return HeldOutRows(
        opened,
        _short_names(names),
        document_sources,
        rows=_Chosen(opened, folders, sample - starts[folders]),
        num_rows=len(sample),
        batch_size=batch_size,
        row_length=row_length,
    )


class _Chosen:
    """(number of the folder, record) of each chosen row."""

    def __init__(self, opened: list[OpenedSplit], folders: np.ndarray, rows: np.ndarray):
        self._opened, self._folders, self._rows = opened, folders, rows

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        number = int(self._folders[index])
        return number, self._opened[number].records[int(self._rows[index])]


def _identity(folder: OpenedSplit) -> tuple[int, int, str]:
    return len(folder.records), xxhash.xxh3_64_intdigest(folder.records[0]), str(folder.folder)


def _sources_of(folder: OpenedSplit) -> tuple[list[str], np.ndarray]:
    """The sources of a folder's held-out documents, and each document's source index."""
    file = folder.folder / "documents" / f"{folder.split}.parquet"
    batches = table_batches(file, columns=["source"])
    column = pyarrow.chunked_array([batch.column("source") for batch in batches], pyarrow.string())
    column = column.combine_chunks().dictionary_encode()
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def _rows_by_source(folder: OpenedSplit, of_document: np.ndarray, num_sources: int) -> list[np.ndarray]:
    """The rows with text of each source; a row at the boundary of two sources belongs to both.

    Documents are ordered by source, so a binary search finds where each begins, without reading the rows between.
    """
    num_rows = len(folder.records)
    if num_sources == 1:
        return [np.arange(num_rows)]
    firsts = np.flatnonzero(np.diff(of_document, prepend=-1))
    lasts = np.append(firsts[1:], len(of_document)) - 1
    rows: list[list[np.ndarray]] = [[] for _ in range(num_sources)]
    for first, last in zip(firsts.tolist(), lasts.tolist()):
        begin = _first_row_beyond(folder, first, lambda row: row.documents.stop)
        end = _first_row_beyond(folder, last, lambda row: row.first_document)
        rows[of_document[first]].append(np.arange(begin, end))
    return [np.unique(np.concatenate(parts)) for parts in rows]


def _first_row_beyond(folder: OpenedSplit, document: int, number: Callable[[Row], int]) -> int:
    """Binary search for the first row whose `number`, which never falls from row to row, exceeds `document`."""
    low, high = 0, len(folder.records)
    while low < high:
        middle = (low + high) // 2
        if number(decode_row(folder.records[middle])) > document:
            high = middle
        else:
            low = middle + 1
    return low


def _short_names(names: list[tuple[str, str]]) -> list[str]:
    """For each (folder, source): the source if there is one folder, the folder if it has one source, else both."""
    folders, uris = [folder for folder, _ in names], [uri for _, uri in names]
    short_folders, short_uris = distinct_ends(folders), distinct_ends(uris)
    if len(set(folders)) == 1:
        return [short_uris[uri] for uri in uris]
    return [
        short_folders[folder] if folders.count(folder) == 1 else f"{short_folders[folder]}:{short_uris[uri]}"
        for folder, uri in names
    ]


def distinct_ends(paths: list[str]) -> dict[str, str]:
    """The shortest unique suffixes of paths, for display."""
    parts = {path: [part for part in path.split("/") if part] or [path] for path in paths}
    for count in range(1, max(map(len, parts.values())) + 1):
        short = {path: "/".join(found[-count:]) for path, found in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {path: path for path in paths}
