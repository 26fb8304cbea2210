"""What a tokenizer is made of: an encoder splits text into ids; the rest is the same for all of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

SPACE_MARK = "\u2581"
Algorithm = Literal["bpe", "unigram"]


@dataclass(frozen=True)
class Additions:
    """New pieces of a vocabulary, as its files write them, in the order of their ids.

    merges: for BPE: the pairs that make pieces, in the order in which they are merged, after all earlier merges.
    log_probabilities: for unigram: of each piece, in the text that it was learned from; else None.
    num_known: pieces that were learned and are in the vocabulary already.
    """

    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...] = ()
    log_probabilities: tuple[float, ...] | None = None
    num_known: int = 0

    def scores(self, existing: Sequence[float]) -> list[float]:
        """The scores of the pieces, below those of existing pieces for BPE, and among them for unigram.

        A unigram model subtracts a constant from its lowest score for each unknown character: that score must stay. The
        text that pieces were learned from counts as half of all text.
        """
        if self.log_probabilities is None:
            return [min(existing) - 1 - rank for rank in range(len(self.pieces))]
        probable = [score for score in existing if score < 0]
        low, high = min(probable), max(probable)
        return [min(max(score - math.log(2), low), high) for score in self.log_probabilities]


class Encoder(Protocol):
    """Splits texts into ids, and knows the bytes of each.

    Attributes:
      vocab_size: number of ids.
      bos_id, eos_id, pad_id, unk_id: None where there is no such token.
      begin_ids: what precedes a text: often [bos_id], or nothing.
      control_tokens: the id of each token that has no text.
      stop_ids: ids that end a generated text, besides the end of a turn.
      pieces: the bytes of each id within a text, possibly part of a character; empty for control tokens.
      drops_first_space: the first id of a text has a space that the text does not have.
      files: content of the files that it is read from, by name.
      algorithm: how texts are split.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    begin_ids: Sequence[int]
    control_tokens: Mapping[str, int]
    stop_ids: Sequence[int]
    files: Mapping[str, bytes]

    @property
    def algorithm(self) -> Algorithm | None:
        """None: another one."""
        ...

    @property
    def pieces(self) -> Sequence[bytes]: ...

    @property
    def drops_first_space(self) -> bool: ...

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """The ids of each text."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a part of a text that is not its beginning; names of control tokens in it are text."""
        ...

    def encode_words(self, text: str) -> list[list[int]]:
        """The ids of each part of a text that no piece crosses the bounds of."""
        ...

    def normalize(self, text: str) -> str:
        """The text that is encoded."""
        ...

    def piece_name(self, id_: int) -> str:
        """A token as the files write it; empty if there is none."""
        ...

    def extended(self, additions: Additions) -> "Encoder":
        """The encoder with more pieces, whose ids follow all others.

        Raises:
          TokenizerError: its files cannot express it.
        """
        ...

    def is_byte(self, id_: int) -> bool:
        """Whether an id is one byte of a character that is no piece."""
        ...
