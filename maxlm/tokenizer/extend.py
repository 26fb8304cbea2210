"""Add pieces to the vocabulary of a tokenizer, for a script that it splits into bytes (arXiv:2304.08177).

The ids of its tokens, its control tokens, its chat template and the ids of texts without the script stay as they are:
all of it is checked before anything is written.
"""

import builtins
import inspect
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from maxlm.errors import ConfigError, TokenizerError
from maxlm.runtime.manifest import write_manifest
from maxlm.runtime.output import check_output, check_replaceable, replaced_folder, temporary_name
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.extension import check_extends
from maxlm.tokenizer.learn_pieces import learn_pieces
from maxlm.tokenizer.scripts import runs_of
from maxlm.tokenizer.texts import draw_texts, find_documents

# Learn from at most this much text, sampled evenly.
_MAX_CHARACTERS = 10_000_000


@dataclass(frozen=True)
class Fertility:
    """How many tokens a text takes."""

    characters_per_token: float
    tokens_per_character: float
    tokens_per_word: float


@dataclass(frozen=True)
class Extended:
    """What was added to a tokenizer.

    pieces_known: pieces that were learned and that it had already.
    pieces_used: added pieces that are ids of the text that they were learned from.
    text_before, text_after: on the tenth of the text that nothing was learned from.
    english_before, english_after: on documentation of Python.
    """

    fingerprint: str
    vocab_size: int
    pieces_added: int
    pieces_known: int
    pieces_used: int
    text_before: Fertility
    text_after: Fertility
    english_before: Fertility
    english_after: Fertility
    seconds: float


def extend_tokenizer(
    folder: str | os.PathLike,
    text: str | os.PathLike,
    output: str | os.PathLike,
    *,
    add: int,
    scripts: Sequence[str] = (),
    character_coverage: float = 0.9995,
    seed: int = 0,
) -> Extended:
    """Write a tokenizer with up to `add` more pieces, learned from a text, atomically.

    Args:
      folder: a tokenizer of `maxlm tokenizer train` or of Hugging Face.
      text: a folder of `maxlm data build`, or a text file.
      output: a new folder, or one of an earlier tokenizer, which is replaced.
      scripts: learn only pieces of characters of these scripts; see `runs_of`.
      character_coverage: share of these characters that get a piece of their own.
      seed: of the sample of a text that is longer than 10 million characters.

    Raises:
      TokenizerError: the tokenizer cannot be read or extended, or there is no such script.
      DataError: there is no such text.
      ConfigError: `output` contains something else.
    """
    check_output(output, "tokenizer", key="OUT", suffix=len(temporary_name("")))
    folder, output = Path(folder), Path(os.path.abspath(output))
    check_replaceable(output)
    if output == Path(os.path.abspath(folder)):
        raise ConfigError([f"OUT: {output} is the tokenizer to extend; give a new folder"])
    start = time.perf_counter()
    runs = runs_of(*scripts)
    old = Tokenizer.load(folder)
    documents = find_documents(os.fspath(text))
    texts = draw_texts(documents, _MAX_CHARACTERS, seed)
    learned = [text[: -len(text) // 10] for text in texts]
    held_out = [text[-len(text) // 10 :] for text in texts]
    try:
        additions = learn_pieces(old.encoder, learned, runs, add=add, character_coverage=character_coverage)
        new = old.extended(additions)
    except TokenizerError as error:
        raise TokenizerError(f"{folder} with the text {text}: {error}") from None
    english = _english_sample()
    try:
        check_extends(new, old)
        _check_texts(new, old, [*english, *held_out], runs)
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: cannot be extended, because it would change: it {error}") from None
    used = {id_ for ids in new.encode_batch(learned) for id_ in ids if id_ >= old.vocab_size}
    if not used:
        raise TokenizerError(f"{folder}: has all pieces that are frequent in {text}, so none was added; give more text")
    found = Extended(
        fingerprint=new.fingerprint,
        vocab_size=new.vocab_size,
        pieces_added=len(additions.pieces),
        pieces_known=additions.num_known,
        pieces_used=len(used),
        text_before=_fertility(old, held_out),
        text_after=_fertility(new, held_out),
        english_before=_fertility(old, english),
        english_after=_fertility(new, english),
        seconds=round(time.perf_counter() - start, 2),
    )
    config = {"add": add, "scripts": [*scripts], "character_coverage": character_coverage, "seed": seed}
    with replaced_folder(output) as temporary:
        new.save(temporary)
        inputs = {"tokenizer": folder, "documents": documents}
        write_manifest(temporary, stage="tokenizer", inputs=inputs, config=config, metrics=asdict(found))
    return found


def _check_texts(new: Tokenizer, old: Tokenizer, texts: Sequence[str], runs: re.Pattern[str]) -> None:
    """Raise TokenizerError if a text without the script has other ids, or a text is decoded worse than before."""
    for text, before, after in zip(texts, old.encode_batch(texts), new.encode_batch(texts)):
        if before != after and not runs.search(text):
            raise TokenizerError(f"splits a text without the script in another way: {text[:40]!r}")
        if old.decode(before) == text != new.decode(after):
            raise TokenizerError(f"does not decode a text as it was: {text[:40]!r}")


def _fertility(tokenizer: Tokenizer, texts: Sequence[str]) -> Fertility:
    characters, words = sum(map(len, texts)), sum(len(text.split()) for text in texts)
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return Fertility(
        characters_per_token=round(characters / max(1, tokens), 3),
        tokens_per_character=round(tokens / max(1, characters), 3),
        tokens_per_word=round(tokens / max(1, words), 3),
    )


def _english_sample() -> list[str]:
    """Documentation of Python's built-in types and functions."""
    found = (inspect.getdoc(value) for _, value in sorted(vars(builtins).items()))
    return [text for text in dict.fromkeys(found) if text]
