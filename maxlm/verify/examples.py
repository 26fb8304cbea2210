"""Synthetic data that exposes layout bugs, and the different layouts of the same data.

Documents of varying length share rows, followed by padding; one is a single token long; some tokens have no loss
weight; the id of the padding token occurs inside documents, also as a target; every fourth row has so few tokens that
a microbatch of such rows has far fewer weighted tokens than the others: a mean of means differs from the mean.

All arrays are numpy arrays. Shapes: B rows, L length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from maxlm.core.batch import Stream

# Value of padding, if it is not the loader's zeros.
_FILLER_TOKEN, _FILLER_TARGET = 5, 7


class Maker:
    """Synthetic streams of one size: an `ExampleMaker` of `maxlm.train.objective`.

    Args:
      log_probabilities: of the targets of a stream under the current model: [batch, length].
      unpacked: each document in its own row.
    """

    def __init__(
        self,
        random: np.random.Generator,
        *,
        num_rows: int,
        length: int,
        vocab_size: int,
        log_probabilities: Callable[[Stream], np.ndarray],
        unpacked: bool = False,
    ):
        self._random, self._unpacked = random, unpacked
        self._num_rows, self._length, self._vocab_size = num_rows, length, vocab_size
        self.log_probabilities = log_probabilities

    def documents(self) -> Stream:
        """Rows of documents of varying length and loss weight."""
        rows = make_documents(self._random, num_rows=self._num_rows, length=self._length, vocab_size=self._vocab_size)
        return unpack(rows, multiple=self._num_rows) if self._unpacked else lay_out_rows(rows, length=self._length)

    def sequences(self, *, shared: int = 0) -> Stream:
        """One sequence per row: the first `shared` tokens are a prompt; the loss weights of the others are 1."""
        rows = []
        for row in range(self._num_rows):
            room = self._length
            size = shared + 2 if row % 4 == 1 else int(self._random.integers(room // 3, room - 4))
            document = _document(self._random, size, self._vocab_size)
            weights = (np.arange(size) >= shared).astype(np.float32)
            weights[-1] = 0.0
            rows.append([replace(document, weights=weights)])
        return lay_out_rows(rows, length=self._length)

    def normal(self, shape: tuple[int, ...], *, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        """float32 noise."""
        return self._random.normal(mean, scale, shape).astype(np.float32)


@dataclass(frozen=True)
class SyntheticDocument:
    """A sequence in the form that a model reads; each field [length]."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def make_documents(
    random: np.random.Generator, *, num_rows: int, length: int, vocab_size: int
) -> list[list[SyntheticDocument]]:
    """The documents of each row: they fill a fifth of every fourth row, and all or almost all of the others."""
    rows = []
    for row in range(num_rows):
        room = length // 5 if row % 4 == 1 else length - int(random.integers(0, 9)) * (row > 0)
        documents = [_document(random, 1, vocab_size)] if row % 2 == 0 else []
        room -= len(documents)
        while room > 0:
            size = min(room, int(random.integers(2, length // 2)))
            documents.append(_document(random, size, vocab_size))
            room -= size
        rows.append(documents)
    return rows


def _document(random: np.random.Generator, length: int, vocab_size: int) -> SyntheticDocument:
    ids = random.integers(0, vocab_size, length + 1).astype(np.int32)
    ids[random.random(length + 1) < 0.15] = 0
    weights = random.uniform(0.2, 2.0, length).astype(np.float32) * (random.random(length) > 0.2)
    # The last token of a document has no target.
    weights[-1] = 0.0
    return SyntheticDocument(ids[:-1], ids[1:], weights.astype(np.float32))


def lay_out_rows(rows: Sequence[Sequence[SyntheticDocument]], *, length: int) -> Stream:
    """Each sequence of documents as a row, followed by zeros."""
    fields = {
        name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")
    }
    loss_weights = np.zeros((len(rows), length), np.float32)
    for row, documents in enumerate(rows):
        begin = 0
        for segment, document in enumerate(documents, start=1):
            place = slice(begin, begin + len(document.tokens))
            fields["tokens"][row, place], fields["targets"][row, place] = document.tokens, document.targets
            fields["segment_ids"][row, place] = segment
            fields["positions"][row, place] = np.arange(len(document.tokens))
            loss_weights[row, place] = document.weights
            begin = place.stop
    return Stream(**fields, loss_weights=loss_weights)


def unpack(rows: Sequence[Sequence[SyntheticDocument]], *, multiple: int) -> Stream:
    """Each document in its own row, and rows of padding up to a multiple."""
    alone = [[document] for documents in rows for document in documents]
    alone += [[]] * (-len(alone) % multiple)
    return lay_out_rows(alone, length=max(len(document.tokens) for row in alone for document in row))


def padded(batch: Any, *, rows: int, columns: int) -> Any:
    """The batch with extra rows and columns of padding, zeros, at the end."""
    return jax.tree.map(lambda x: np.pad(x, [(0, rows), (0, columns)][: x.ndim]), batch)


def with_filler(batch: Any) -> Any:
    """The batch with nonzero ids in its padding."""

    def fill(rows: Stream) -> Stream:
        empty = rows.segment_ids == 0
        return replace(
            rows,
            tokens=np.where(empty, _FILLER_TOKEN, rows.tokens).astype(np.int32),
            targets=np.where(empty, _FILLER_TARGET, rows.targets).astype(np.int32),
        )

    return map_rows(fill, batch)


def renamed(batch: Any, new_ids_V: np.ndarray) -> Any:
    """The batch with token ids replaced by new ones."""
    return map_rows(lambda rows: replace(rows, tokens=new_ids_V[rows.tokens], targets=new_ids_V[rows.targets]), batch)


def map_rows(function: Callable[[Stream], Stream], batch: Any) -> Any:
    """Apply a function to each `Stream` in a tree."""
    is_rows = lambda part: isinstance(part, Stream)  # noqa: E731
    return jax.tree.map(lambda part: function(part) if is_rows(part) else part, batch, is_leaf=is_rows)
