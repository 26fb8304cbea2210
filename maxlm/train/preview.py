"""The first training examples as the model sees them, with tokens colored by loss weight."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from maxlm.config.train import TrainConfig
from maxlm.core.batch import Stream
from maxlm.errors import CheckpointError
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.setup import load_tokenizer, resolve_model

# Two alternating shades each, to show where a token ends.
LEARNED_STYLES = ("bold black on green", "bold black on bright_green")
READ_STYLES = ("white on grey23", "white on grey30")
BOUNDARY_STYLE = "bold black on yellow"
PADDING_STYLE = "dim"

_SHOWN = {"\n": "↵\n", "\t": "⇥\t"}


def preview(config: TrainConfig, *, num_examples: int, plain: bool) -> Iterator[RenderableType]:
    """The training examples from step 0 on, in order.

    Args:
      plain: without colors: learned text is enclosed in ⟦ and ⟧.

    Raises:
      MaxlmError: the tokenizer or the data cannot be read.
    """
    tokenizer = load_tokenizer(config)
    # The starting model may be trained later: then it is taken for a causal one.
    with contextlib.suppress(CheckpointError):
        config = resolve_model(config, tokenizer)
    for example in config.objective.preview(config, tokenizer, num_examples):
        note = [Text(example.note)] if example.note else []
        yield Group(Text(example.title, "bold"), render_row(example.row, 0, tokenizer, plain=plain), *note, "")


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
    tokens, segments = batch.tokens[row], batch.segment_ids[row]
    count = int(np.sum(segments > 0))
    text = Text()
    for start, end in pairwise([*_segment_starts(segments[:count]), count]):
        if start:
            text.append("│", BOUNDARY_STYLE)
        ids, learned = tokens[start:end].tolist(), [False, *(batch.loss_weights[row, start : end - 1] > 0)]
        # The last target of a segment is not a token of its row.
        if batch.loss_weights[row, end - 1] > 0:
            ids, learned = [*ids, int(batch.targets[row, end - 1])], [*learned, True]
        _append_tokens(text, ids, learned, tokenizer, plain=plain)
    if padding := len(tokens) - count:
        text.append(f" + {padding} padding", PADDING_STYLE)
    return text


def _append_tokens(text: Text, ids: list[int], learned: list[bool], tokenizer: Tokenizer, *, plain: bool) -> None:
    for place, (id_, is_learned) in enumerate(zip(ids, learned)):
        if plain and is_learned and not learned[place - 1]:
            text.append("⟦")
        shown = tokenizer.token_text(id_)
        for character, visible in _SHOWN.items():
            shown = shown.replace(character, visible)
        text.append(shown, (LEARNED_STYLES if is_learned else READ_STYLES)[place % 2])
        if plain and is_learned and (place + 1 == len(ids) or not learned[place + 1]):
            text.append("⟧")


def _segment_starts(segments: np.ndarray) -> list[int]:
    return [index for index in range(len(segments)) if index == 0 or segments[index] != segments[index - 1]]
