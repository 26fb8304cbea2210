"""The first training examples as a page: a file of its own, in which tokens are colored by their weight in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from maxlm.errors import RequestError
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import PreviewRow
from maxlm.train.preview import Token, segments_of, visible

_environment = Environment(loader=PackageLoader("maxlm.train"), autoescape=True, undefined=StrictUndefined)
# Of the color of the largest and of the smallest weight.
_STRONGEST, _WEAKEST = 0.45, 0.12


@dataclass(frozen=True)
class _ShownToken:
    shown: str
    is_control: bool
    weight: float
    strength: float
    about: str


@dataclass(frozen=True)
class _ShownSegment:
    title: str
    tokens: Sequence[_ShownToken]


@dataclass(frozen=True)
class _ShownExample:
    title: str
    note: str
    segments: Sequence[_ShownSegment]


def write_preview(path: str | Path, title: str, examples: Sequence[PreviewRow], tokenizer: Tokenizer) -> None:
    """Write the page.

    Raises:
      RequestError: the file cannot be written.
    """
    rows = [(example, segments_of(example.row, 0)) for example in examples]
    tokens = [token for _, segments in rows for segment in segments for token in segment]
    weights = sorted({token.weight for token in tokens if token.weight > 0}, reverse=True)
    learned = sum(token.weight > 0 for token in tokens)
    padding = sum(int((example.row.segment_ids == 0).sum()) for example in examples)
    shown = [
        _ShownExample(
            example.title,
            example.note,
            [_shown_segment(example, number, segment, weights, tokenizer) for number, segment in enumerate(segments)],
        )
        for example, segments in rows
    ]
    page = _environment.get_template("preview.html").render(
        title=title,
        summary=f"{len(examples)} examples: {len(tokens):,} tokens, {learned:,} of them learned; {padding:,} padding",
        strengths=[(_strength(weight, weights), f"learned, weight {weight:g}") for weight in _few(weights)],
        examples=shown,
    )
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror}; give another file after --html") from None


def _shown_segment(
    example: PreviewRow, number: int, segment: list[Token], weights: list[float], tokenizer: Tokenizer
) -> _ShownSegment:
    place = f"{example.places[number]} · " if example.places else ""
    learned = sum(token.weight > 0 for token in segment)
    title = f"segment {number + 1} · {place}{learned} of {len(segment)} tokens learned"
    return _ShownSegment(title, [_shown_token(token, number + 1, weights, tokenizer) for token in segment])


def _shown_token(token: Token, segment: int, weights: list[float], tokenizer: Tokenizer) -> _ShownToken:
    about = (
        f"id {token.id}: {tokenizer.token_text(token.id)!r}\nposition {token.position}, segment {segment}"
        f"\nloss weight {token.weight:g}"
    )
    strength = _strength(token.weight, weights) if token.weight else 0.0
    return _ShownToken(visible(tokenizer, token.id), tokenizer.is_control(token.id), token.weight, strength, about)


def _strength(weight: float, weights: list[float]) -> float:
    return round(_WEAKEST + (_STRONGEST - _WEAKEST) * weight / weights[0], 3)


def _few(weights: list[float]) -> list[float]:
    """The largest, a middle and the smallest weight."""
    return sorted({weights[0], weights[len(weights) // 2], weights[-1]}, reverse=True) if weights else []
