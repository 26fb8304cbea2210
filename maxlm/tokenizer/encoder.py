"""What a tokenizer is made of: an encoder splits text into ids; the rest is the same for all of them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

SPACE_MARK = "\u2581"


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
    def pieces(self) -> Sequence[bytes]: ...

    @property
    def drops_first_space(self) -> bool: ...

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """The ids of each text."""
        ...

    def is_byte(self, id_: int) -> bool:
        """Whether an id is one byte of a character that is no piece."""
        ...
