"""Train a SentencePiece model on documents.

The settings suit both prose and code: text is not normalized, runs of spaces and newlines may become pieces, each digit
is a token, and a character outside the vocabulary is encoded as its bytes.
"""

import io
import re
import time
from pathlib import Path

import sentencepiece

from maxlm.config import TokenizerConfig
from maxlm.errors import DataError, TokenizerError
from maxlm.prompts.chat_template import CONTROL_TOKENS, default_chat_template
from maxlm.runtime.manifest import FILE_NAME, content_hash, read_manifest, write_manifest
from maxlm.runtime.output import check_output
from maxlm.runtime.progress import console
from maxlm.runtime.storage import locked, storage_path
from maxlm.tokenizer.codec import BOS, EOS, PAD, UNKNOWN, Tokenizer
from maxlm.tokenizer.encoder import SPACE_MARK
from maxlm.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from maxlm.tokenizer.texts import draw_texts, find_documents

# SentencePiece's trainer reserves these and skips every text that contains one.
RESERVED = re.compile("[\0\t\u2581\u2585]+")


def train_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Train a tokenizer, and write `tokenizer.model`, `chat_template.json` and `manifest.json`.

    An existing folder of the same input and configuration is loaded instead.

    Raises:
      ConfigError: the folder cannot be written, or is another stage's.
      DataError: if the input is missing or empty, or another process writes to the folder.
      TokenizerError: if the input is too small, or its alphabet too large, for the vocabulary.
    """
    check_output(config.output, "tokenizer")
    output = Path(config.output)
    documents = find_documents(config.input)
    resolved = config.model_dump(mode="json")
    if _is_up_to_date(output, resolved, documents):
        console.out(f"{output}: is up to date")
        return Tokenizer.load(output)

    start = time.perf_counter()
    texts = draw_texts(documents, config.max_characters, config.seed)
    tokenizer = Tokenizer(SentencePieceEncoder(_train_model(texts, config)), default_chat_template(BOS))
    seconds = time.perf_counter() - start

    sample = texts[:: max(1, len(texts) // 1000)]
    characters = sum(map(len, sample))
    metrics = {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "trained_on_characters": sum(map(len, texts)),
        "characters_per_token": round(characters / max(1, sum(map(len, tokenizer.encode_batch(sample)))), 3),
        "seconds": round(seconds, 2),
    }
    _write(output, tokenizer, documents, resolved, metrics)
    return tokenizer


def _write(output: Path, tokenizer: Tokenizer, documents: Path, resolved: dict, metrics: dict) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with locked(storage_path(output), seconds=0) as alone:
        if not alone:
            raise DataError(f"{output}: another process writes there; wait until it ends, or give another output")
        (output / FILE_NAME).unlink(missing_ok=True)
        tokenizer.save(output)
        write_manifest(output, stage="tokenizer", inputs={"documents": documents}, config=resolved, metrics=metrics)


def _train_model(texts: list[str], config: TokenizerConfig) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in RESERVED.split(text) if piece),
            model_writer=model,
            model_type=config.algorithm,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            required_chars=SPACE_MARK,  # a space without a piece would be encoded as the bytes of this character
            user_defined_symbols=["\t"],
            control_symbols=[*CONTROL_TOKENS, *config.control_tokens],
            pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            pad_piece=PAD, bos_piece=BOS, eos_piece=EOS, unk_piece=UNKNOWN,
            max_sentence_length=1 << 24,
            num_threads=4,  # affects the result for unigram: sums are computed per thread
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), config)) from None
    return model.getvalue()


def _explain(message: str, config: TokenizerConfig) -> str:
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        return (
            f"vocab_size {config.vocab_size} is too large for {config.input}:"
            f" set vocab_size to at most {match[1]}, or give more text"
        )
    if match := re.search(r"\d+ vs (\d+)\. Increase vocab_size", message):
        return (
            f"vocab_size {config.vocab_size} is too small for the characters of {config.input}:"
            f" set vocab_size to at least {match[1]}, or lower character_coverage ({config.character_coverage})"
        )
    return f"{config.input}: SentencePiece cannot train on it: {message}"


def _is_up_to_date(output: Path, resolved: dict, documents: Path) -> bool:
    if not (output / FILE_NAME).is_file():
        return False
    manifest = read_manifest(output)
    return manifest["config"] == resolved and manifest["inputs"]["documents"]["hash"] == content_hash(documents)
