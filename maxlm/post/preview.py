"""The first training examples as the model sees them, tokens coloured by loss weight."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from maxlm.config.train import PACKED_OBJECTIVES, TrainConfig
from maxlm.core.batch import Batch
from maxlm.data.chat import EpochOrder, PackedChats
from maxlm.data.loader import open_mixture
from maxlm.data.preference import PreferencePairs, pad, read_prompts
from maxlm.tokenizer.codec import ChatTokens, Tokenizer
from maxlm.train.run import find_tokenizer

# Two shades each, taken in turn, so that one sees where a token ends.
LEARNED_STYLES = ("bold black on green", "bold black on bright_green")
READ_STYLES = ("white on grey23", "white on grey30")
BOUNDARY_STYLE = "bold black on yellow"
PADDING_STYLE = "dim"

_SHOWN = {"\n": "↵\n", "\t": "⇥\t"}


def preview(config: TrainConfig, *, num_examples: int, plain: bool) -> Iterator[RenderableType]:
    """The examples that step 0 and those after it train on, in that order.

    Args:
      plain: for where there are no colours: what is learned stands between ⟦ and ⟧.

    Raises:
      MaxlmError: the tokenizer or the data cannot be read.
    """
    tokenizer = Tokenizer.load(find_tokenizer(config))
    objective, length = config.objective, config.row_length

    def first(num_available: int) -> np.ndarray:
        return EpochOrder(num_available, seed=config.seed).indices(0, batch_size=min(num_examples, num_available))

    def row_text(batch: Batch, row: int) -> Text:
        return render_row(batch, row, tokenizer, plain=plain)

    if objective.kind in PACKED_OBJECTIVES:
        sources = [(source.path, source.weight) for source in objective.sources]
        mixture = open_mixture(
            sources,
            seed=config.seed,
            batch_size=config.batch_size,
            expected_fingerprint=tokenizer.fingerprint,
            expected_row_length=length,
        )
        for number in range(num_examples):
            step, row = divmod(number, config.batch_size)
            yield _titled(f"row {number + 1}", row_text(Batch.from_rows(mixture.batch(step)), row))
    elif objective.kind == "sft":
        chats = PackedChats.read(objective.train_file, tokenizer, row_length=length, form=objective)
        batch = chats.batch(first(len(chats.rows)))
        for row in range(len(batch.tokens)):
            yield _titled(f"row {row + 1}", row_text(batch, row))
    elif objective.kind in ("dpo", "reward"):
        pairs = PreferencePairs.read(objective.train_file, tokenizer, row_length=length, form=objective)
        batch = pairs.batch(first(len(pairs)))
        for row in range(len(batch.chosen.tokens)):
            yield _titled(f"pair {row + 1}, chosen", row_text(batch.chosen, row))
            yield _titled(f"pair {row + 1}, rejected", row_text(batch.rejected, row))
    else:
        room = length - objective.max_new_tokens
        prompts = read_prompts(
            objective.train_file, tokenizer, max_prompt_length=room, row_length=length, form=objective
        )
        for number, index in enumerate(first(len(prompts))):
            ids = prompts[index].ids
            batch = pad([ChatTokens(ids, [0.0] * len(ids))], len(ids))
            note = Text(f"answer: {prompts[index].record['answer']}   reward: {objective.reward}")
            yield _titled(f"prompt {number + 1}", Group(row_text(batch, 0), note))


def legend(*, plain: bool) -> Text:
    """What the colours mean."""
    if plain:
        return Text("⟦learned⟧ read only │ boundary of chats or documents ↵ line end")
    return Text(" ").join(
        [
            Text("learned", LEARNED_STYLES[0]),
            Text("read only", READ_STYLES[0]),
            Text("│ boundary of chats or documents", BOUNDARY_STYLE),
            Text("two shades in turn: one token each", "dim"),
        ]
    )


def render_row(batch: Batch, row: int, tokenizer: Tokenizer, *, plain: bool) -> Text:
    """A row of a batch: its tokens, coloured by whether the model learns to write them."""
    tokens, segments = batch.tokens[row], batch.segment_ids[row]
    count = int(np.sum(segments > 0))
    text = Text()
    for start, end in pairwise([*_segment_starts(segments[:count]), count]):
        if start:
            text.append("│", BOUNDARY_STYLE)
        ids, learned = tokens[start:end].tolist(), [False, *(batch.loss_weights[row, start : end - 1] > 0)]
        # The last target of a segment is no token of its row.
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


def _titled(title: str, body: RenderableType) -> Group:
    return Group(Text(title, "bold"), body, "")
