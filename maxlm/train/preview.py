"""The first training examples as the model sees them, with tokens colored by loss weight."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from maxlm.config.train import TrainConfig
from maxlm.core.batch import Stream
from maxlm.errors import CheckpointError
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import PreviewRow
from maxlm.train.setup import load_tokenizer, resolve_model

# Two alternating shades each, to show where a token ends.
LEARNED_STYLES = ("bold black on green", "bold black on bright_green")
READ_STYLES = ("white on grey23", "white on grey30")
BOUNDARY_STYLE = "bold black on yellow"
PADDING_STYLE = "dim"

_SHOWN = {"\n": "↵\n", "\t": "⇥\t"}


def preview(config: TrainConfig, *, num_examples: int) -> tuple[Tokenizer, Iterator[PreviewRow]]:
    """The tokenizer of a run, and its training examples from step 0 on, in order.

    Raises:
      MaxlmError: the tokenizer or the data cannot be read.
    """
    tokenizer = load_tokenizer(config)
    # The starting model may be trained later: then it is taken for a causal one.
    with contextlib.suppress(CheckpointError):
        config = resolve_model(config, tokenizer)
    return tokenizer, config.objective.preview(config, tokenizer, num_examples)


def render(example: PreviewRow, tokenizer: Tokenizer, *, plain: bool) -> RenderableType:
    """An example for the terminal.

    Args:
      plain: without colors: learned text is enclosed in ⟦ and ⟧.
    """
    notes = [Text(note, "dim") for note in (", ".join(example.places), example.note) if note]
    return Group(Text(example.title, "bold"), render_row(example.row, 0, tokenizer, plain=plain), *notes, "")


@dataclass(frozen=True)
class Token:
    """A token of a segment (a chat or document): its id, its place in it, and its weight in the loss."""

    id: int
    position: int
    weight: float


def segments_of(stream: Stream, row: int) -> list[list[Token]]:
    """The tokens of each segment of a row. The last target of a segment, which is not a token of the row, is the last
    one, if it is learned."""
    segments, found = stream.segment_ids[row], []
    count = int(np.sum(segments > 0))
    for start, end in pairwise([*_segment_starts(segments[:count]), count]):
        ids = stream.tokens[row, start:end].tolist()
        positions = stream.positions[row, start:end].tolist()
        weights = [0.0, *stream.loss_weights[row, start : end - 1].tolist()]
        if (weight := float(stream.loss_weights[row, end - 1])) > 0:
            ids, positions, weights = (
                [*ids, int(stream.targets[row, end - 1])],
                [*positions, positions[-1] + 1],
                [*weights, weight],
            )
        found.append([Token(*each) for each in zip(ids, positions, weights)])
    return found


def legend(*, plain: bool) -> Text:
    """The meaning of the colors."""
    if plain:
        return Text("⟦learned⟧ read only │ boundary of chats or documents ↵ line end")
    return Text(" ").join(
        [
            Text("learned", LEARNED_STYLES[0]),
            Text("read only", READ_STYLES[0]),
            Text("│ boundary of chats or documents", BOUNDARY_STYLE),
            Text("alternating shades: one token each", "dim"),
        ]
    )


def render_row(batch: Stream, row: int, tokenizer: Tokenizer, *, plain: bool) -> Text:
    """A row of a batch: its tokens, colored by whether they count in the loss."""
    text = Text()
    for number, tokens in enumerate(segments_of(batch, row)):
        if number:
            text.append("│", BOUNDARY_STYLE)
        _append_tokens(text, tokens, tokenizer, plain=plain)
    if padding := int(np.sum(batch.segment_ids[row] == 0)):
        text.append(f" + {padding} padding", PADDING_STYLE)
    return text


def _append_tokens(text: Text, tokens: list[Token], tokenizer: Tokenizer, *, plain: bool) -> None:
    learned = [token.weight > 0 for token in tokens]
    for place, (token, is_learned) in enumerate(zip(tokens, learned)):
        if plain and is_learned and not learned[place - 1]:
            text.append("⟦")
        text.append(visible(tokenizer, token.id), (LEARNED_STYLES if is_learned else READ_STYLES)[place % 2])
        if plain and is_learned and (place + 1 == len(tokens) or not learned[place + 1]):
            text.append("⟧")


def visible(tokenizer: Tokenizer, id_: int) -> str:
    """A token as text in which line ends and tabs can be seen."""
    shown = tokenizer.token_text(id_)
    for character, mark in _SHOWN.items():
        shown = shown.replace(character, mark)
    return shown


def _segment_starts(segments: np.ndarray) -> list[int]:
    return [index for index in range(len(segments)) if index == 0 or segments[index] != segments[index - 1]]
