"""Batches of packed rows. The rows of a step are a pure function of the seed and the step.

Grain reshuffles each source in each epoch and mixes sources by weight, with random access: a run resumed at step s
reads the same rows as an uninterrupted one, on any number of hosts and with any number of threads.

Letters in names: B rows of a batch on one shard, L row length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np

from maxlm.data.open_records import open_records
from maxlm.data.rows import Row, decode_row
from maxlm.errors import DataError, TokenizerError
from maxlm.runtime.manifest import read_manifest
from maxlm.runtime.written import table_batches

# More steps than any run has; Grain's own indices end at 2**63.
_ENDLESS = 1 << 40


@dataclass(frozen=True)
class StepDocument:
    """A document that a step reads: the data folder, its ordinal among the split's documents, and its id."""

    folder: str
    ordinal: int
    id: str
    source: str


@dataclass(frozen=True)
class OpenedSplit:
    """A split of a data folder, opened for reading."""

    folder: Path
    split: str
    records: grain.sources.ArrayRecordDataSource

    @cached_property
    def documents(self) -> tuple[list[str], list[str]]:
        """Ids and sources of the split's documents, by ordinal."""
        ids, sources = [], []
        for batch in table_batches(self.folder / "documents" / f"{self.split}.parquet", columns=["id", "source"]):
            ids += batch.column("id").to_pylist()
            sources += batch.column("source").to_pylist()
        return ids, sources


class PackedRows:
    """Batches by step. Created by `open_mixture` (endless, shuffled, mixed) and `open_in_order` (each row once).

    `maxlm.data.held_out` has the batches for validation.

    Attributes:
      batch_size: rows of a step, over all shards.
      row_length: L.
      num_steps: steps until every row has been read; None for an endless mixture.
    """

    def __init__(
        self, sources: list[OpenedSplit], *, rows: Any, num_rows: int | None, batch_size: int, row_length: int
    ):
        self._sources = sources
        self._rows = rows
        self._num_rows = num_rows
        self.batch_size = batch_size
        self.row_length = row_length
        self.num_steps = None if num_rows is None else -(-num_rows // batch_size)

    def batch(self, step: int, *, shard: int = 0, num_shards: int = 1) -> dict[str, np.ndarray]:
        """One shard's batch of a step; concatenating those of all shards gives the whole batch.

        Returns:
          `tokens`, `targets`, `segment_ids`, `positions`: `[B, L]` int32, and `loss_weights`: `[B, L]` float32. In the
          last step of `open_in_order`, missing rows are padding: weight and segment 0.

        Raises:
          DataError: if the shards do not divide the batch, or the step is past the end.
        """
        arrays = [row.arrays() if row else self._padding() for _, row in self._read(step, shard, num_shards)]
        return {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}

    def documents(self, step: int) -> list[StepDocument]:
        """The documents that a step reads, over all shards, in row order, each once."""
        found: dict[StepDocument, None] = {}
        for number, row in self._read(step, 0, 1):
            if row is not None:
                source = self._sources[number]
                ids, origins = source.documents
                for ordinal in row.documents:
                    found[StepDocument(str(source.folder), ordinal, ids[ordinal], origins[ordinal])] = None
        return list(found)

    def iterate(
        self, start_step: int = 0, *, shard: int = 0, num_shards: int = 1, num_threads: int = 2, prefetch: int = 4
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches from `start_step` on, with at most `prefetch` of them read ahead by `num_threads` threads.

        The same batches as `batch(start_step)`, `batch(start_step + 1)`, ...; 0 threads reads synchronously.
        """
        self._check(start_step, shard, num_shards)
        end = start_step + _ENDLESS if self.num_steps is None else self.num_steps
        steps = grain.MapDataset.range(start_step, end)
        batches = steps.map(lambda step: self.batch(int(step), shard=shard, num_shards=num_shards))
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
        yield from batches.to_iter_dataset(options)

    def _check(self, step: int, shard: int, num_shards: int) -> None:
        if self.batch_size % num_shards:
            raise DataError(f"batch_size ({self.batch_size}) must be a multiple of the number of shards ({num_shards})")
        if not 0 <= shard < num_shards:
            raise DataError(f"shard {shard} is not among {num_shards} shards, counted from 0")
        if step < 0 or (self.num_steps is not None and step >= self.num_steps):
            raise DataError(f"step {step} is outside of the data's {self.num_steps} steps, counted from 0")

    def _read(self, step: int, shard: int, num_shards: int) -> Iterator[tuple[int, Row | None]]:
        """The rows of one shard of a step, each with its source number; None past the last row."""
        self._check(step, shard, num_shards)
        size = self.batch_size // num_shards
        begin = step * self.batch_size + shard * size
        for index in range(begin, begin + size):
            if self._num_rows is not None and index >= self._num_rows:
                yield 0, None
            else:
                number, record = self._rows[index]
                yield number, decode_row(record)

    def _padding(self) -> dict[str, np.ndarray]:
        zeros = np.zeros(self.row_length, np.int32)
        return {
            "tokens": zeros,
            "targets": zeros,
            "loss_weights": zeros.astype(np.float32),
            "segment_ids": zeros,
            "positions": zeros,
        }


def open_mixture(
    sources: Sequence[tuple[str | Path, float]],
    *,
    seed: int,
    batch_size: int,
    split: str = "train",
    expected_fingerprint: str | None = None,
    expected_row_length: int | None = None,
) -> PackedRows:
    """An endless, shuffled mixture of data folders for training.

    Args:
      sources: folders of `maxlm data build`, each with its weight, relative to the sum of weights. Each
        epoch of a source visits each of its rows once, in a new order.
      seed: of the order.
      batch_size: rows of a step, over all shards.
      split: of the folders.
      expected_fingerprint: the model's tokenizer; None accepts any, if the sources agree.
      expected_row_length: tokens of a row; None accepts any, if the sources agree.

    Raises:
      DataError: if a folder is not a complete build, or its rows have another length.
      TokenizerError: if a folder's rows were made with another tokenizer.
    """
    opened, row_length = open_splits([path for path, _ in sources], split, expected_fingerprint, expected_row_length)
    # Every source repeats forever: a mixture ends when its first source ends.
    endless = [
        _numbered(source, number).shuffle(seed=_source_seed(seed, number)).repeat()
        for number, source in enumerate(opened)
    ]
    mixed = grain.MapDataset.mix(endless, weights=[weight for _, weight in sources])
    return PackedRows(opened, rows=mixed, num_rows=None, batch_size=batch_size, row_length=row_length)


def open_in_order(
    paths: Sequence[str | Path],
    *,
    batch_size: int,
    split: str = "valid",
    expected_fingerprint: str | None = None,
    expected_row_length: int | None = None,
) -> PackedRows:
    """Every row of data folders, once and in order. Arguments and errors: `open_mixture`."""
    opened, row_length = open_splits(paths, split, expected_fingerprint, expected_row_length)
    rows = grain.MapDataset.concatenate([_numbered(source, number) for number, source in enumerate(opened)])
    num_rows = sum(len(source.records) for source in opened)
    return PackedRows(opened, rows=rows, num_rows=num_rows, batch_size=batch_size, row_length=row_length)


def open_splits(
    paths: Sequence[str | Path],
    split: str,
    expected_fingerprint: str | None = None,
    expected_row_length: int | None = None,
) -> tuple[list[OpenedSplit], int]:
    """A split of each data folder, and their row length. Arguments and errors: `open_mixture`."""
    if not paths:
        raise DataError("no data folder is given")
    opened = []
    for path in map(Path, paths):
        manifest = read_manifest(path)
        if manifest["stage"] != "data":
            raise DataError(f"{path}: is a folder of the stage {manifest['stage']!r}, not of `maxlm data build`")
        metrics = manifest["metrics"]
        expected_fingerprint = expected_fingerprint or metrics["tokenizer_fingerprint"]
        if metrics["tokenizer_fingerprint"] != expected_fingerprint:
            raise TokenizerError(
                f"{path}: its rows were made with the tokenizer {metrics['tokenizer_fingerprint'][:12]}, but"
                f" {expected_fingerprint[:12]} is needed; rebuild the data with that tokenizer"
            )
        expected_row_length = expected_row_length or metrics["row_length"]
        if metrics["row_length"] != expected_row_length:
            raise DataError(
                f"{path}: its rows have {metrics['row_length']} tokens, but {expected_row_length} are needed;"
                f" build the data with row_length={expected_row_length}, or set row_length to {metrics['row_length']}"
            )
        if not metrics["splits"].get(split, {}).get("rows"):
            raise DataError(f"{path}: has no rows of the split {split!r}; build it with a larger valid_fraction")
        opened.append(OpenedSplit(path, split, open_records(path, split, metrics)))
    return opened, expected_row_length


def _numbered(source: OpenedSplit, number: int) -> grain.MapDataset:
    return grain.MapDataset.source(source.records).map(lambda record: (number, record))


def _source_seed(seed: int, number: int) -> int:
    """A separate 32-bit seed for each source, so that equal sources are shuffled differently."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
