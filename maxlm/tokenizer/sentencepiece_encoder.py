"""A SentencePiece model of `maxlm tokenizer train`.

SentencePiece writes a space as U+2581, so U+2581 itself in a text would be decoded as a space. That character is
therefore encoded as its three bytes, and decoding is done here, from a table of each id's bytes.
"""

from collections.abc import Sequence

import sentencepiece

from maxlm.errors import TokenizerError
from maxlm.tokenizer.convert import extend_sentencepiece, read_sentencepiece, sentencepiece_algorithm
from maxlm.tokenizer.encoder import SPACE_MARK, Additions, Algorithm, Encoder

MODEL_FILE = "tokenizer.model"


class SentencePieceEncoder(Encoder):
    """Encodes every text without loss; see `Encoder`. Names of control tokens in a text are text."""

    def __init__(self, model: bytes):
        """Read a model.

        Raises:
          TokenizerError: it is not one, or cannot encode every text.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError):
            raise TokenizerError("the tokenizer's model is not a SentencePiece model") from None
        processor = self._processor
        self.files = {MODEL_FILE: model}
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        self.pad_id, self.unk_id = processor.pad_id(), processor.unk_id()
        if min(self.bos_id, self.eos_id, self.pad_id, self.unk_id) < 0:
            raise TokenizerError("the tokenizer's model lacks one of the tokens bos, eos, pad and unk")
        self.begin_ids, self.stop_ids = [self.bos_id], [self.eos_id]
        self.control_tokens = {
            processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_control(i) or i == self.unk_id
        }
        self._pieces = [self._bytes_of(id_) for id_ in range(self.vocab_size)]
        byte_ids = {self._pieces[i][0]: i for i in range(self.vocab_size) if processor.is_byte(i)}
        if len(byte_ids) != 256:
            raise TokenizerError("the tokenizer's model has no byte fallback, so it cannot encode every text")
        self._space_mark_ids = [byte_ids[byte] for byte in SPACE_MARK.encode()]

    @property
    def algorithm(self) -> Algorithm | None:
        return sentencepiece_algorithm(read_sentencepiece(self.files[MODEL_FILE]))

    @property
    def pieces(self) -> Sequence[bytes]:
        return self._pieces

    @property
    def drops_first_space(self) -> bool:
        return False

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        # Most texts contain no U+2581 and are one part.
        parts = [text.split(SPACE_MARK) for text in texts]
        flat = [part for split in parts for part in split]
        if num_threads == 1:
            # Encoding a list starts a thread per call, which costs twenty times as much as encoding a short text.
            encoded = map(self._processor.encode, flat)
        else:
            encoded = iter(self._processor.encode(flat, num_threads=num_threads))
        results = []
        for split in parts:
            ids = next(encoded)
            for _ in split[1:]:
                ids += self._space_mark_ids
                ids += next(encoded)
            results.append(ids)
        return results

    def encode_plain(self, text: str) -> list[int]:
        return self.encode_batch([text], num_threads=1)[0]

    def encode_words(self, text: str) -> list[list[int]]:
        return [self.encode_plain(text)]

    def normalize(self, text: str) -> str:
        return text

    def piece_name(self, id_: int) -> str:
        return self._processor.id_to_piece(id_)

    def extended(self, additions: Additions) -> "SentencePieceEncoder":
        return SentencePieceEncoder(extend_sentencepiece(self.files[MODEL_FILE], additions, {}))

    def is_byte(self, id_: int) -> bool:
        return self._processor.is_byte(int(id_))

    def _bytes_of(self, id_: int) -> bytes:
        piece = self._processor.id_to_piece(id_)
        if piece in self.control_tokens:
            return b""
        if self.is_byte(id_):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()
