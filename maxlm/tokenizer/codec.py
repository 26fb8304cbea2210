"""Text to token ids and back: an encoder, with a chat template."""

import codecs
import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from maxlm.errors import TokenizerError
from maxlm.prompts import chat_template as chat
from maxlm.prompts.chat_template import ChatTemplate, ChatTokens
from maxlm.prompts.jinja_template import JinjaTemplate
from maxlm.prompts.named_templates import read_template, template_tokens
from maxlm.prompts.tools import texts_in
from maxlm.runtime.storage import storage_path
from maxlm.tokenizer.convert import huggingface_files
from maxlm.tokenizer.encoder import Additions, Encoder
from maxlm.tokenizer.huggingface import (
    GENERATION_FILE,
    TEMPLATE_FILE,
    HuggingFaceEncoder,
    huggingface_tokenizer,
    is_huggingface_tokenizer,
    read_huggingface_tokenizer,
)
from maxlm.tokenizer.sentencepiece_encoder import MODEL_FILE, SentencePieceEncoder

BOS, EOS, PAD, UNKNOWN = "<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"


class Tokenizer:
    """Splits text into ids, and joins their bytes.

    Those of `maxlm tokenizer train` are lossless, `decode(encode(text)) == text` for every valid Unicode text, and no
    text becomes a control token. Those of Hugging Face encode as `transformers` does, control tokens in a text
    included, but for those in messages of a chat, which are text.

    Attributes:
      vocab_size: number of ids, some of which may have no token: see `with_vocab_size`.
      bos_id, eos_id, unk_id: ids of control tokens; None where there is no such token.
      pad_id: an id to fill rows with, where segment ids tell padding from text.
      control_tokens: token -> id of every control token.
      fingerprint: hash of what changes ids or their meaning; equal for equal tokenizers.
    """

    def __init__(self, encoder: Encoder, template: ChatTemplate | JinjaTemplate | None):
        self._encoder = encoder
        self._template = template
        self.vocab_size = encoder.vocab_size
        self.bos_id, self.eos_id, self.unk_id = encoder.bos_id, encoder.eos_id, encoder.unk_id
        self.pad_id = next((i for i in (encoder.pad_id, encoder.eos_id) if i is not None), 0)
        self.control_tokens = dict(encoder.control_tokens)
        self._control_names = {id_: name for name, id_ in encoder.control_tokens.items()}
        if isinstance(template, ChatTemplate) and (
            missing := sorted(template.control_tokens() - {*self.control_tokens})
        ):
            raise TokenizerError(f"the chat template names {missing[0]!r}, which is not a control token of the model")
        identity = xxhash.xxh3_128()
        for name, content in sorted(encoder.files.items()):
            if name != GENERATION_FILE:
                identity.update(content)
        if isinstance(template, ChatTemplate):
            identity.update(template.to_json().encode())
        identity.update(repr(sorted(self.control_tokens.items())).encode())
        self.fingerprint = identity.hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder of `maxlm tokenizer train`, or of Hugging Face.

        Raises:
          TokenizerError: if the folder or a file in it is missing or corrupt.
        """
        folder = storage_path(folder)
        try:
            if is_huggingface_tokenizer(folder):
                return cls(*read_huggingface_tokenizer(folder))
            try:
                model = (folder / MODEL_FILE).read_bytes()
            except OSError:
                raise TokenizerError(
                    f"has no {MODEL_FILE}; train a tokenizer there with `maxlm tokenizer train`"
                ) from None
            return cls(SentencePieceEncoder(model), ChatTemplate.load(folder / chat.FILE_NAME))
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None

    def with_vocab_size(self, vocab_size: int) -> "Tokenizer":
        """The same tokenizer for a model whose table has more rows; the ids without a token have no text.

        Raises:
          TokenizerError: the table has fewer rows.
        """
        if vocab_size < self._encoder.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {self._encoder.vocab_size} tokens but the model only {vocab_size}; use the"
                " tokenizer that the model was trained with"
            )
        padded = copy.copy(self)
        padded.__dict__.pop("byte_lengths", None)
        padded.vocab_size = vocab_size
        return padded

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """`[vocab_size]` int32: the number of UTF-8 bytes of each id; 0 for control tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        lengths[: self._encoder.vocab_size] = [len(piece) for piece in self._encoder.pieces]
        return lengths

    # Text

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text.

        Args:
          bos: begin with what this tokenizer puts before a text: often a bos token, or nothing.
          eos: end with the eos token, if there is one.

        Raises:
          TokenizerError: if the text contains a lone surrogate, which cannot be encoded.
        """
        begin = [*self._encoder.begin_ids] if bos else []
        return begin + self.encode_batch([text])[0] + self._end_ids * eos

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """The ids of each text, on `num_threads` threads."""
        for text in texts:
            _check_encodable(text)
        return self._encoder.encode_batch(texts, num_threads=num_threads)

    def encode_within(self, text: str) -> list[int]:
        """The ids of a part of a text that is not its beginning; names of control tokens in it are text.

        Raises:
          TokenizerError: if the text contains a lone surrogate, which cannot be encoded.
        """
        _check_encodable(text)
        return self._encoder.encode_plain(text)

    def encode_documents(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """The ids of each text between `document_begin` and the eos token."""
        return [self.document_begin + ids + self._end_ids for ids in self.encode_batch(texts, num_threads=num_threads)]

    @property
    def document_begin(self) -> list[int]:
        """What precedes a text whose first token is predicted too: the eos token, if the tokenizer adds nothing."""
        return [*self._encoder.begin_ids] or self._end_ids

    @property
    def _end_ids(self) -> list[int]:
        return [] if self.eos_id is None else [self.eos_id]

    def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
        """Decode ids. Bytes that are not UTF-8 become U+FFFD; `skip_control=False` includes control tokens.

        Raises:
          TokenizerError: if an id is outside the vocabulary.
        """
        text = b"".join(self._pieces(ids, skip_control=skip_control)).decode("utf-8", errors="replace")
        return text[1:] if self._encoder.drops_first_space and text.startswith(" ") else text

    def stream_decoder(self, *, skip_control: bool = True) -> "StreamDecoder":
        """A decoder that takes the ids after a text one by one, and returns text once its characters are complete."""
        return StreamDecoder(self, skip_control=skip_control)

    def text_ends(self, ids: Sequence[int]) -> np.ndarray:
        """Where each id of an encoded text ends, in UTF-8 bytes of the decoded text: int64 [len(ids)]."""
        ends = np.cumsum(self.byte_lengths[np.asarray(ids, np.int64)], dtype=np.int64)
        first = next((piece for piece in self._pieces(ids, skip_control=True) if piece), b"")
        return np.maximum(ends - 1, 0) if self._encoder.drops_first_space and first.startswith(b" ") else ends

    def token_text(self, id_: int) -> str:
        """Human-readable form of an id: its text, a control token's name, or `<0xNN>` for a byte."""
        self._check_id(id_)
        if self.is_control(id_):
            return self._control_names.get(id_, f"<unused {id_}>")
        piece = self._encoder.pieces[id_]
        if self._encoder.is_byte(id_):
            return f"<0x{piece[0]:02X}>"
        return piece.decode(errors="backslashreplace")

    def token_bytes(self, id_: int) -> bytes:
        """The UTF-8 bytes of an id, possibly part of a character; empty for a control token."""
        self._check_id(id_)
        return b"" if self.is_control(id_) else self._encoder.pieces[id_]

    def is_control(self, id_: int) -> bool:
        """Whether an id has no text: it is a control token, or no token at all."""
        return int(id_) in self._control_names or id_ >= self._encoder.vocab_size

    # Chat

    def encode_chat(
        self, messages: Sequence[dict], *, tools: Sequence[dict] | None = None, generation_prompt: bool = False
    ) -> ChatTokens:
        """Encode a chat with the chat template; see `ChatTemplate.encode`.

        Raises:
          TokenizerError: the template refuses it, or there is none.
        """
        _check_messages(messages)
        for text in texts_in(tools):
            _check_encodable(text)
        encoder: Any = self._encoder
        return self.template.encode(messages, encoder, tools=tools, generation_prompt=generation_prompt)

    @property
    def template(self) -> ChatTemplate | JinjaTemplate:
        if self._template is None:
            raise TokenizerError(
                "the tokenizer has no chat template, so it takes texts but no chats; put one into chat_template.jinja,"
                " or name one when training: chat_template=chatml"
            )
        return self._template

    def with_template(self, name: str) -> "Tokenizer":
        """The same tokenizer with a chat template: one of maxlm by its name, or a Jinja file.

        Raises:
          TokenizerError: there is no such template, the tokenizer has one already, or the two do not fit.
        """
        source = read_template(name)
        if self._template is not None or not isinstance(self._encoder, HuggingFaceEncoder):
            raise TokenizerError(
                "the tokenizer has a chat template, which its model was trained with; leave chat_template out"
            )
        files = {**self._encoder.files, TEMPLATE_FILE: source.encode()}
        found = Tokenizer(*huggingface_tokenizer(files))
        found.check_template(template_tokens(name))
        return found

    def check_template(self, tokens: Sequence[str] = ()) -> None:
        """Check that answers in the chat template can be learned with this tokenizer.

        Args:
          tokens: texts that must be one token each, besides those that look like control tokens.

        Raises:
          TokenizerError: it has no template, or one with control tokens that it lacks, or that does not end answers.
        """
        template = self.template
        if isinstance(template, JinjaTemplate):
            encoder: Any = self._encoder
            problem = template.problem(encoder, tokens)
        else:
            ends = template.end_of_turn(self.control_tokens) is not None
            problem = None if ends else "the chat template ends an answer with no control token; give it one as suffix"
        if problem is not None:
            raise TokenizerError(problem)

    @property
    def answering_role(self) -> str:
        """The role whose messages the model learns to generate."""
        return self.template.answering_role

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The id that ends an answer: the stop token of chat generation."""
        end = None if self._template is None else self._template.end_of_turn(self.control_tokens)
        return self.eos_id if end is None else self.control_tokens[end]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text."""
        ends = {self.end_of_turn_id, self.eos_id, *self._encoder.stop_ids} - {None}
        return tuple(sorted(ends))

    # Inside

    @property
    def encoder(self) -> Encoder:
        """What splits texts, for those that change it."""
        return self._encoder

    def extended(self, additions: Additions) -> "Tokenizer":
        """The same tokenizer with more pieces, whose ids follow all others; see `Encoder.extended`."""
        return Tokenizer(self._encoder.extended(additions), self._template)

    def save(self, folder: str | Path) -> None:
        """Write its files; the caller writes the manifest last."""
        folder = storage_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._encoder.files.items():
            (folder / name).write_bytes(content)
        if isinstance(self._template, ChatTemplate):
            (folder / chat.FILE_NAME).write_text(self._template.to_json(), encoding="utf-8")

    def huggingface_files(self) -> dict[str, bytes]:
        """The tokenizer as files of Hugging Face, by name; unchanged if it was read from such files."""
        if isinstance(self._template, ChatTemplate):
            return huggingface_files(self._encoder.files[MODEL_FILE], self._template)
        return dict(self._encoder.files)

    def _check_id(self, id_: int) -> None:
        if not 0 <= id_ < self.vocab_size:
            raise TokenizerError(f"token id {id_} is outside the vocabulary of {self.vocab_size}")

    def _pieces(self, ids: Iterable[int], *, skip_control: bool) -> Iterable[bytes]:
        for id_ in ids:
            self._check_id(id_)
            if not self.is_control(id_):
                yield self._encoder.pieces[id_]
            elif not skip_control:
                yield self._control_names.get(int(id_), "").encode()


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


def _check_messages(messages: Sequence[Any]) -> None:
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise TokenizerError(f"message {number} of the chat must have a role and a string content")
        for text in texts_in(message):
            _check_encodable(text)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text cannot be encoded: its character {error.start + 1}, {text[error.start]!r}, is a lone surrogate"
        ) from None
