"""Model folder formats other than run folders: each is a module of this package that defines `FORMAT`."""

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
    """A quantized model, and a short description of the quantization."""

    description: str
    model: Decoder


@dataclass(frozen=True)
class Format:
    """A format of a model folder that is not a run of `maxlm train`.

    name: the value of `maxlm export --format`.
    title: description of a folder, such as "an int8 bundle".
    recognizes: whether a folder is of this format, by its name or content.
    load: the model on the first device, and its tokenizer or None; raises CheckpointError if the folder is corrupt.
    write: writes a model, its tokenizer and the receipt of its quantization (or {}) into an empty folder.
    stored: what of a model it stores; the rest, prediction modules, is left out.
    quantize: quantized models to try, smallest first: the first one whose receipt is within its bounds is written.
      None: the format stores the model as it is.
    """

    name: str
    title: str
    recognizes: Callable[[Path], bool]
    load: Callable[[Path], tuple[Decoder, Tokenizer | None]]
    write: Callable[[Path, Decoder, Tokenizer | None, dict[str, Any]], None]
    stored: Callable[[Decoder], Decoder]
    quantize: Callable[[Decoder], Iterable[Candidate]] | None = None


@functools.cache
def formats() -> tuple[Format, ...]:
    """All formats, sorted by name."""
    return tuple(sorted(collect("maxlm.interop", "FORMAT"), key=lambda found: found.name))


def find_format(path: Path) -> Format | None:
    """The format of a folder; None for a run, a checkpoint, or anything else."""
    return next((found for found in formats() if found.recognizes(path)), None)
