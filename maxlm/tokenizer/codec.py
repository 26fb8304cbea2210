"""Text to token ids and back: a SentencePiece model with a chat template.

SentencePiece writes a space as U+2581, so U+2581 itself in a text would be decoded as a space. That character is
therefore encoded as its three bytes, and decoding is done here, from a table of each id's bytes.
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import xxhash

from maxlm.errors import TokenizerError
from maxlm.prompts import chat_template as chat
from maxlm.prompts.chat_template import ChatTemplate
from maxlm.runtime.storage import storage_path

MODEL_FILE = "tokenizer.model"
BOS, EOS, PAD, UNKNOWN = "<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"
_SPACE_MARK = "\u2581"


@dataclass(frozen=True)
class ChatTokens:
    """A chat as token ids, with a loss weight for each id: 1.0 if the model learns to generate it, else 0.0."""

    ids: list[int]
    loss_weights: list[float]


class Tokenizer:
    """A lossless tokenizer: `decode(encode(text)) == text` for every valid Unicode text.

    Attributes:
      vocab_size: number of ids.
      bos_id, eos_id, pad_id, unk_id: ids of the control tokens.
      control_tokens: token -> id of every control token, including the chat tokens.
      fingerprint: hash of the model's bytes, the template and the control tokens; equal for equal tokenizers.
      byte_lengths: `[vocab_size]` int32: the number of UTF-8 bytes of each id; 0 for control tokens.
      template: the chat template.
    """

    def __init__(self, model: bytes, template: ChatTemplate):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError):
            raise TokenizerError("the tokenizer's model is not a SentencePiece model") from None
        processor = self._processor
        self.model_bytes = model
        self.template = template
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        self.pad_id, self.unk_id = processor.pad_id(), processor.unk_id()
        if min(self.bos_id, self.eos_id, self.pad_id, self.unk_id) < 0:
            raise TokenizerError("the tokenizer's model lacks one of the tokens bos, eos, pad and unk")

        self._bytes = [self._bytes_of(id_) for id_ in range(self.vocab_size)]
        self._byte_ids = {self._bytes[i][0]: i for i in range(self.vocab_size) if processor.is_byte(i)}
        if len(self._byte_ids) != 256:
            raise TokenizerError("the tokenizer's model has no byte fallback, so it cannot encode every text")
        self.byte_lengths = np.array([len(b) for b in self._bytes], np.int32)
        self.control_tokens = {
            processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_control(i) or i == self.unk_id
        }
        if missing := sorted(template.control_tokens() - {*self.control_tokens}):
            raise TokenizerError(f"the chat template names {missing[0]!r}, which is not a control token of the model")
        identity = xxhash.xxh3_128(model)
        identity.update(template.to_json().encode())
        identity.update(repr(sorted(self.control_tokens.items())).encode())
        self.fingerprint = identity.hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder of `maxlm tokenizer train`.

        Raises:
          TokenizerError: if the folder or a file in it is missing or corrupt.
        """
        folder = storage_path(folder)
        try:
            model = (folder / MODEL_FILE).read_bytes()
        except OSError:
            raise TokenizerError(
                f"{folder}: has no {MODEL_FILE}; train a tokenizer there with `maxlm tokenizer train`"
            ) from None
        try:
            return cls(model, ChatTemplate.load(folder / chat.FILE_NAME))
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None

    # Text

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text.

        Raises:
          TokenizerError: if the text contains a lone surrogate, which cannot be encoded.
        """
        return self._framed(self.encode_batch([text])[0], bos=bos, eos=eos)

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """The ids of each text; SentencePiece runs on `num_threads` threads."""
        for text in texts:
            _check_encodable(text)
        # Most texts contain no U+2581 and are one part.
        parts = [text.split(_SPACE_MARK) for text in texts]
        flat = [part for split in parts for part in split]
        if num_threads == 1:
            # Encoding a list starts a thread per call, which costs twenty times as much as encoding a short text.
            encoded = map(self._processor.encode, flat)
        else:
            encoded = iter(self._processor.encode(flat, num_threads=num_threads))
        space_mark_ids = [self._byte_ids[byte] for byte in _SPACE_MARK.encode()]
        results = []
        for split in parts:
            ids = next(encoded)
            for _ in split[1:]:
                ids += space_mark_ids
                ids += next(encoded)
            results.append(self._framed(ids, bos=bos, eos=eos))
        return results

    def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
        """Decode ids. Bytes that are not UTF-8 become U+FFFD; `skip_control=False` includes control tokens.

        Raises:
          TokenizerError: if an id is outside the vocabulary.
        """
        return b"".join(self._pieces(ids, skip_control=skip_control)).decode("utf-8", errors="replace")

    def stream_decoder(self, *, skip_control: bool = True) -> "StreamDecoder":
        """A decoder that takes ids one by one and returns text as soon as its characters are complete."""
        return StreamDecoder(self, skip_control=skip_control)

    def token_text(self, id_: int) -> str:
        """Human-readable form of an id: its text, a control token's name, or `<0xNN>` for a byte."""
        self._check_id(id_)
        if self.is_control(id_) or self._processor.is_byte(id_):
            return self._processor.id_to_piece(int(id_))
        return self._bytes[id_].decode()

    def token_bytes(self, id_: int) -> bytes:
        """The UTF-8 bytes of an id, possibly part of a character; empty for a control token."""
        self._check_id(id_)
        return self._bytes[id_]

    def is_control(self, id_: int) -> bool:
        """Whether an id is a control token, which has no text."""
        return self._processor.is_control(int(id_)) or id_ == self.unk_id

    # Chat

    def encode_chat(self, messages: Sequence[dict], *, generation_prompt: bool = False) -> ChatTokens:
        """Encode a chat with the chat template.

        Args:
          messages: `{"role": ..., "content": ...}` each; a `weight` multiplies the loss on an answer.
          generation_prompt: end with the prefix of the answering role, for generation.

        Returns:
          The ids, with loss weight 1, or the message's `weight`, exactly on the answering role's content and suffix.

        Raises:
          TokenizerError: for an unknown role, or content that is not a string.
        """
        ids = self._control_and_text(self.template.begin)
        weights = [0.0] * len(ids)
        for position, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise TokenizerError(f"message {position + 1} of the chat must have a role and a string content")
            role = self.template.role(message.get("role"))
            prefix = self._control_and_text(role.prefix)
            answer = self.encode(message["content"]) + self._control_and_text(role.suffix)
            ids += prefix + answer
            weights += [0.0] * len(prefix)
            is_learned = message["role"] == self.template.answering_role
            weights += [float(message.get("weight", 1.0)) if is_learned else 0.0] * len(answer)
        if generation_prompt:
            prefix = self._control_and_text(self.template.role(self.template.answering_role).prefix)
            ids += prefix
            weights += [0.0] * len(prefix)
        return ChatTokens(ids, weights)

    @property
    def end_of_turn_id(self) -> int:
        """The id that ends an answer: the stop token of chat generation."""
        suffix = self.template.role(self.template.answering_role).suffix
        controls = [self.control_tokens[part["control"]] for part in suffix if "control" in part]
        return controls[0] if controls else self.eos_id

    # Inside

    def save(self, folder: str | Path) -> None:
        """Write the model and the template; the caller writes the manifest last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model_bytes)
        (folder / chat.FILE_NAME).write_text(self.template.to_json(), encoding="utf-8")

    def _framed(self, ids: list[int], *, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def _control_and_text(self, parts: Iterable[dict[str, str]]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [self.control_tokens[part["control"]]] if "control" in part else self.encode(part["text"])
        return ids

    def _bytes_of(self, id_: int) -> bytes:
        piece = self._processor.id_to_piece(id_)
        if self.is_control(id_):
            return b""
        if self._processor.is_byte(id_):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()

    def _check_id(self, id_: int) -> None:
        if not 0 <= id_ < self.vocab_size:
            raise TokenizerError(f"token id {id_} is outside the vocabulary of {self.vocab_size}")

    def _pieces(self, ids: Iterable[int], *, skip_control: bool) -> Iterable[bytes]:
        for id_ in ids:
            self._check_id(id_)
            if not skip_control and self.is_control(id_):
                yield self._processor.id_to_piece(int(id_)).encode()
            else:
                yield self._bytes[id_]


class StreamDecoder:
    """Incremental decoder of ids to text; bytes of an incomplete character are buffered."""

    def __init__(self, tokenizer: Tokenizer, *, skip_control: bool):
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, *ids: int) -> str:
        """The text completed by these ids; may be empty."""
        return self._decoder.decode(b"".join(self._tokenizer._pieces(ids, skip_control=self._skip_control)))

    def flush(self) -> str:
        """The remaining text at the end: U+FFFD for a truncated character, else empty."""
        return self._decoder.decode(b"", final=True)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text cannot be encoded: its character {error.start + 1}, {text[error.start]!r}, is a lone surrogate"
        ) from None
