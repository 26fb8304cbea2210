"""Rewards of length, language and repetition, which shape how a model answers and not whether it is right."""

import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from maxlm.data.shingles import hash_ngrams, hash_words
from maxlm.errors import TokenizerError
from maxlm.ops.advantages import overlong_penalty
from maxlm.tokenizer.scripts import runs_of

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]

# Scripts of languages that are told apart by their script; any other name is that of a script.
_SCRIPTS = {
    "ar": ("Arabic",), "bn": ("Bengali",), "el": ("Greek",), "en": ("Latin",), "he": ("Hebrew",),
    "hi": ("Devanagari",), "ja": ("Han", "Hiragana", "Katakana"), "ka": ("Georgian",), "ko": ("Hangul",),
    "ru": ("Cyrillic",), "ta": ("Tamil",), "te": ("Telugu",), "th": ("Thai",), "zh": ("Han",),
}  # fmt: skip
# Mathematics and code are in Latin letters in every language.
_NO_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$|\\[A-Za-z]+|</?[A-Za-z_]+>", re.DOTALL)


def length(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    num_tokens: list[int],
    low: Count = 0,
    high: Positive,
    margin: Positive,
    unit: Literal["tokens", "characters", "words"] = "tokens",
) -> list[float]:
    """1 for a length within [low, high], and 1 - distance / margin outside, at least 0."""
    count = {"tokens": None, "characters": len, "words": lambda text: len(hash_words(text))}[unit]
    lengths = num_tokens if count is None else [count(text) for text in completions]
    return [max(0.0, 1 - max(low - n, n - high, 0) / margin) for n in lengths]


def overlong(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    num_tokens: list[int],
    max_tokens: Positive,
    buffer: Positive,
) -> list[float]:
    """The soft overlong punishment of DAPO (arXiv:2503.14476, equation 13), of the number of tokens n.

    0                                       if n <= max_tokens - buffer
    (max_tokens - buffer - n) / buffer      up to n = max_tokens
    -1                                      above
    """
    return [-float(penalty) for penalty in overlong_penalty(np.array(num_tokens), longest=max_tokens, buffer=buffer)]


def _valid_language(name: str) -> str:
    try:
        runs_of(*_SCRIPTS.get(name, (name,)))
    except TokenizerError:
        raise ValueError(
            f"{name!r} is neither a script of Unicode, such as Cyrillic, nor one of {', '.join(_SCRIPTS)}"
        ) from None
    return name


def language(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    language: Annotated[str, AfterValidator(_valid_language)],
) -> list[float]:
    """The share of the completion's letters that belong to the scripts of a language, 0 if it has no letters.

    Code, mathematics and tags do not count. Languages of one script are not told apart: French is as good as English.
    """
    runs = runs_of(*_SCRIPTS.get(language, (language,)))

    def share(text: str) -> float:
        text = _NO_LANGUAGE.sub(" ", text)
        letters = sum(map(str.isalpha, text))
        return sum(sum(map(str.isalpha, run)) for run in runs.findall(text)) / letters if letters else 0.0

    return [share(text) for text in completions]


def repetition(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    size: Positive = 4,
) -> list[float]:
    """Minus the share of the completion's n-grams of `size` words that occurred in it before; 0 if it is shorter.

    In scripts without spaces between words, each character is a word.
    """

    def repeated(text: str) -> float:
        ngrams = hash_ngrams(hash_words(text), size)
        return len(np.unique(ngrams)) / len(ngrams) - 1.0 if len(ngrams) else 0.0

    return [repeated(text) for text in completions]
