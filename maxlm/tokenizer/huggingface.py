"""Tokenizers of Hugging Face: tokenizer.json, or a SentencePiece model, with the settings in tokenizer_config.json."""

import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import tokenizers
from etils import epath
from tokenizers import AddedToken

from maxlm.errors import TokenizerError
from maxlm.prompts.jinja_template import JinjaTemplate
from maxlm.tokenizer.convert import extend_sentencepiece, to_tokenizers
from maxlm.tokenizer.encoder import SPACE_MARK, Additions, Algorithm, Encoder
from maxlm.tokenizer.tokenizer_json import extend_tokenizer_json, json_algorithm

TOKENIZER_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
FILES = (
    TOKENIZER_FILE,
    SENTENCEPIECE_FILE,
    CONFIG_FILE,
    SPECIAL_FILE,
    ADDED_FILE,
    TEMPLATE_FILE,
    GENERATION_FILE,
)
# Files of tokenizers whose splitting is code of transformers.
_OTHER_FILES = ("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tiktoken.model", "qwen.tiktoken")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def is_huggingface_tokenizer(folder: epath.Path) -> bool:
    """Whether a folder has a tokenizer of Hugging Face."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, CONFIG_FILE, *_OTHER_FILES))


def read_huggingface_tokenizer(folder: epath.Path) -> tuple["HuggingFaceEncoder", JinjaTemplate | None]:
    """The tokenizer of a folder, and its chat template if it has one.

    Raises:
      TokenizerError: a file is missing or corrupt.
    """
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if not files.keys() & {TOKENIZER_FILE, SENTENCEPIECE_FILE}:
        raise TokenizerError(
            f"has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}; convert its tokenizer with transformers:"
            ' python -c "from transformers import AutoTokenizer as Tokenizer;'
            f" Tokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    return huggingface_tokenizer(files)


def huggingface_tokenizer(files: dict[str, bytes]) -> tuple["HuggingFaceEncoder", JinjaTemplate | None]:
    """The tokenizer of these files, and its chat template if it has one; see `read_huggingface_tokenizer`."""
    settings = _Settings(files)
    encoder = HuggingFaceEncoder(files, settings)
    source = settings.chat_template()
    template = None if source is None else JinjaTemplate(source, settings.named_tokens())
    return encoder, template


class _Settings:
    """What the files beside the tokenizer say."""

    def __init__(self, files: dict[str, bytes]):
        self._files = files
        self.config = self._read(CONFIG_FILE)
        self._special = self._read(SPECIAL_FILE)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self._files.get(name, b"{}"))
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise TokenizerError(f"{name} is corrupt; copy the file again")
        return values

    def named_tokens(self) -> dict[str, str]:
        """The content of `bos_token` and the like."""
        found = {name: self.config.get(name, self._special.get(name)) for name in _NAMED}
        return {name: _content(token) for name, token in found.items() if token}

    def added_tokens(self) -> list[tuple[int | None, AddedToken]]:
        """Tokens that may be missing in the tokenizer's own file, with their ids where these are given."""
        listed = self.config.get("added_tokens_decoder", {}).items()
        found: list[tuple[int | None, AddedToken]] = [(int(id_), _added(token)) for id_, token in listed]
        found += [(id_, AddedToken(token, normalized=False)) for token, id_ in self._read(ADDED_FILE).items()]
        more = [
            *self.named_tokens().values(),
            *self._special.get("additional_special_tokens", []),
            *(self.config.get("additional_special_tokens") or []),
        ]
        names = {token.content for _, token in found}
        found.sort(key=lambda pair: pair[0])
        return found + [(None, _added(token, special=True)) for token in more if _content(token) not in names]

    def chat_template(self) -> str | None:
        if TEMPLATE_FILE in self._files:
            return self._files[TEMPLATE_FILE].decode()
        template = self.config.get("chat_template")
        if not isinstance(template, list):
            return template
        for each in template:
            if each["name"] == "default":
                return each["template"]
        raise TokenizerError(f"{CONFIG_FILE} has several chat templates, none of which is named default; rename one")

    def stop_ids(self) -> list[int]:
        """The ids that end a generated text."""
        ends = self._read(GENERATION_FILE).get("eos_token_id")
        return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _added(token: Any, *, special: bool = False) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(token, special=special, normalized=False)
    flags = {name: token[name] for name in ("lstrip", "rstrip", "normalized", "single_word") if name in token}
    return AddedToken(token["content"], special=token.get("special", special), **flags)


class HuggingFaceEncoder(Encoder):
    """A tokenizer of `tokenizers`; see `Encoder`. Control tokens in a text become their ids."""

    def __init__(self, files: dict[str, bytes], settings: _Settings):
        self.files = files
        self._tokenizer = self._read(settings)
        self._add_tokens(settings)
        tokenizer = self._tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._described = json.loads(tokenizer.to_str())
        self._ids = tokenizer.get_vocab()
        self.vocab_size = max(self._ids.values()) + 1
        named = settings.named_tokens()
        self.unk_id, self.pad_id = (self._ids.get(named.get(name)) for name in ("unk_token", "pad_token"))
        self.bos_id = self._ids.get(named.get("bos_token", named.get("cls_token")))
        self.eos_id = self._ids.get(named.get("eos_token", named.get("sep_token")))
        self._added = tokenizer.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in self._added.items() if token.special}
        self.control_tokens = special | {token: self._ids[token] for token in named.values()}
        self._control_ids = set(self.control_tokens.values())
        self.begin_ids = self._find_begin(settings)
        self.stop_ids = settings.stop_ids()

    def _read(self, settings: _Settings) -> tokenizers.Tokenizer:
        if TOKENIZER_FILE not in self.files:
            # As transformers did before version 4.34.
            prefix: Any = "always" if settings.config.get("legacy") else "first"
            return to_tokenizers(self.files[SENTENCEPIECE_FILE], prefix=prefix)
        try:
            return tokenizers.Tokenizer.from_str(self.files[TOKENIZER_FILE].decode())
        # `tokenizers` raises Exception itself.
        except Exception as error:
            raise TokenizerError(f"{TOKENIZER_FILE} is corrupt ({error}); copy the file again") from None

    def _add_tokens(self, settings: _Settings) -> None:
        for id_, token in settings.added_tokens():
            found = self._tokenizer.token_to_id(token.content)
            if found is None:
                self._tokenizer.add_tokens([token])
                found = self._tokenizer.token_to_id(token.content)
            elif token.special:
                # It may be an ordinary piece so far, which a text would not be split at.
                self._tokenizer.add_special_tokens([token])
            if id_ not in (None, found):
                raise TokenizerError(
                    f"the token {token.content!r} has the id {id_} in {CONFIG_FILE} or {ADDED_FILE}, but {found} in the"
                    " tokenizer; these files are of different models, copy them again"
                )

    def _find_begin(self, settings: _Settings) -> list[int]:
        """What precedes a text: as the settings say, or else the tokenizer's own file."""
        config = settings.config
        if "add_bos_token" in config or "add_eos_token" in config or self._tokenizer.post_processor is None:
            return [self.bos_id] if config.get("add_bos_token") and self.bos_id is not None else []
        encoded = self._tokenizer.encode("a")
        first_of_text = encoded.special_tokens_mask.index(0) if 0 in encoded.special_tokens_mask else 0
        return encoded.ids[:first_of_text]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        if num_threads == 1:
            return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_ranges(self, text: str, plain: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and the characters that each is of; control tokens in `plain` ranges are text."""
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        bounds = [
            (0, False),
            *((at, is_plain) for start, end in plain for at, is_plain in ((start, True), (end, False))),
        ]
        for (start, is_plain), end in zip(bounds, [*(at for at, _ in bounds[1:]), len(text)]):
            for id_, (its_start, its_end) in self._encode_part(text[start:end], is_first=start == 0, is_plain=is_plain):
                ids.append(id_)
                ranges.append((start + its_start, start + its_end))
        return ids, ranges

    def encode_plain(self, text: str) -> list[int]:
        return [id_ for id_, _ in self._encode_part(text, is_first=False, is_plain=True)]

    def encode_words(self, text: str) -> list[list[int]]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        groups = itertools.groupby(zip(encoded.word_ids, encoded.ids), key=lambda pair: pair[0])
        return [[id_ for _, id_ in group] for _, group in groups]

    def normalize(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text).replace(SPACE_MARK, " ")

    def piece_name(self, id_: int) -> str:
        return self._names.get(id_, "")

    @property
    def algorithm(self) -> Algorithm | None:
        return json_algorithm(self._described)

    def extended(self, additions: Additions) -> "HuggingFaceEncoder":
        vocabulary = {*self._tokenizer.get_vocab(with_added_tokens=False).values()}
        # Added tokens whose ids follow the vocabulary: there must be no others between them and the new pieces.
        after = {id_: token for id_, token in sorted(self._added.items()) if id_ not in vocabulary}
        files = dict(self.files)
        if TOKENIZER_FILE in files:
            ids = {token.content: id_ for id_, token in after.items()}
            files[TOKENIZER_FILE] = extend_tokenizer_json(self._described, additions, ids, first=self.vocab_size)
            # It would be another tokenizer than tokenizer.json.
            files.pop(SENTENCEPIECE_FILE, None)
        else:
            is_special = {token.content: token.special for token in after.values()}
            files[SENTENCEPIECE_FILE] = extend_sentencepiece(files[SENTENCEPIECE_FILE], additions, is_special)
        return HuggingFaceEncoder(files, _Settings(files))

    def _encode_part(self, part: str, *, is_first: bool, is_plain: bool) -> list[tuple[int, tuple[int, int]]]:
        """Ids and ranges of a part of a text."""
        if not is_plain:
            return self._encode_after(self._tokenizer, part, is_first=is_first)
        encoded = self._encode_after(self._plain, part, is_first=is_first)
        if len(part) > 1 and any(id_ in self._control_ids for id_, _ in encoded):
            # The control token is a piece of the vocabulary too, which neither half of it is.
            half = len(part) // 2
            encoded = self._encode_part(part[:half], is_first=is_first, is_plain=True)
            rest = self._encode_part(part[half:], is_first=False, is_plain=True)
            encoded += [(id_, (start + half, end + half)) for id_, (start, end) in rest]
        return encoded

    @staticmethod
    def _encode_after(
        tokenizer: tokenizers.Tokenizer, part: str, *, is_first: bool
    ) -> list[tuple[int, tuple[int, int]]]:
        if not is_first:
            # After a line break, no space is put in front of it, unlike at the beginning of a text.
            encoded = tokenizer.encode("\n" + part, add_special_tokens=False)
            if all(start >= 1 or end <= 1 for start, end in encoded.offsets):
                after = [(start - 1, end - 1) for start, end in encoded.offsets]
                return [(id_, place) for id_, place in zip(encoded.ids, after) if place[1] > 0]
        encoded = tokenizer.encode(part, add_special_tokens=False)
        return list(zip(encoded.ids, encoded.offsets))

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    def is_byte(self, id_: int) -> bool:
        return self._has_bytes and id_ in self._names and _BYTE.fullmatch(self._names[id_]) is not None

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id_: name for name, id_ in self._ids.items()}

    @cached_property
    def _decoders(self) -> set[str]:
        decoder = self._described["decoder"] or {"type": None}
        return {each["type"] for each in decoder.get("decoders", [decoder])}

    @property
    def _has_bytes(self) -> bool:
        return "ByteFallback" in self._decoders

    @cached_property
    def pieces(self) -> list[bytes]:
        return [self._piece(id_) for id_ in range(self.vocab_size)]

    def _piece(self, id_: int) -> bytes:
        name = self._names.get(id_)
        if name is None or id_ in self._control_ids:
            return b""
        if id_ in self._added:
            return name.encode()
        if "ByteLevel" in self._decoders:
            return bytes(_BYTES[character] for character in name)
        if self.is_byte(id_):
            return bytes([int(name[3:5], 16)])
        if self._decoders <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
            return name.replace(SPACE_MARK, " ").encode()
        # What it adds to the text of another piece.
        before = self._tokenizer.decode([self._anchor])
        return self._tokenizer.decode([self._anchor, id_]).removeprefix(before).encode()

    @cached_property
    def _anchor(self) -> int:
        """A piece that begins a word."""
        return next(id_ for id_, name in sorted(self._names.items()) if name.isalnum())

    @cached_property
    def drops_first_space(self) -> bool:
        words = (id_ for id_, piece in enumerate(self.pieces) if piece[:1] == b" " and piece[1:].isalpha())
        id_ = next(words, None)
        return id_ is not None and not self._tokenizer.decode([id_]).startswith(" ")


def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: printable Latin-1 as itself, the rest from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_character()
