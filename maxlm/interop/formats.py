"""Folders in the formats of others, or for others: each is one module of this package that defines `FORMAT`."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config.registry import collect
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """A quantised model, and how it was quantised, in a few words."""

    description: str
    model: Decoder


@dataclass(frozen=True)
class Format:
    """How a model lies in a folder that is no run of `maxlm train`.

    name: as `maxlm export --format` takes it.
    title: what a folder of it is, such as "an int8 bundle".
    recognizes: whether a folder is of this format, by what it is named or holds.
    load: the model on the first device, and its tokenizer, or None where it has none; raises CheckpointError where the
      folder is damaged.
    write: puts a model, its tokenizer and the receipt of its quantisation (or {}) into an empty folder.
    quantize: models to write in the place of a float one, the smallest first: that one is written whose receipt lies
      within its bounds. None: the format holds the model as it is.
    """

    name: str
    title: str
    recognizes: Callable[[Path], bool]
    load: Callable[[Path], tuple[Decoder, Tokenizer | None]]
    write: Callable[[Path, Decoder, Tokenizer | None, dict[str, Any]], None]
    quantize: Callable[[Decoder], Iterable[Candidate]] | None = None


@functools.cache
def formats() -> tuple[Format, ...]:
    """All formats, by name."""
    return tuple(sorted(collect("maxlm.interop", "FORMAT"), key=lambda found: found.name))


def find_format(path: Path) -> Format | None:
    """The format of a folder; None for a run, a checkpoint, or what is nothing of the kind."""
    return next((found for found in formats() if found.recognizes(path)), None)
