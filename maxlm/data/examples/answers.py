"""Prompts with their answers, one to a row, whose answers a model may replace by its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.batch import Batch
from maxlm.data.examples.chat import check_some_left
from maxlm.data.examples.encoding import encode_answer, encode_prompt
from maxlm.data.examples.preference import Prompt, pad, round_up
from maxlm.data.examples.records import parse_answer, parse_prompt, read_records
from maxlm.prompts.chat_template import ChatTokens
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class PromptWithAnswer:
    """A prompt, and a sequence of it and its answer, whose tokens have weight 1."""

    prompt: Prompt
    text: ChatTokens


class PromptsWithAnswers:
    """The last answers of the chats of a file.

    Args:
      room: for sampled answers, in tokens; then every prompt leaves so much of a row.
    """

    def __init__(self, examples: Sequence[PromptWithAnswer], *, row_length: int, parts: int = 1, room: int = 0):
        self._examples = examples
        longest = max(max(len(each.text.ids), len(each.prompt.ids) + room) for each in examples)
        self.row_length = min(row_length, round_up(longest, parts))

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        row_length: int,
        parts: int = 1,
        form: RecordFormat,
        room: int = 0,
        prompts_alone: bool = False,
    ) -> Self:
        """Read a file of chats; those too long are skipped and counted.

        Args:
          prompts_alone: the answers are not needed: records may have none.

        Raises:
          DataError: a line is not a chat with an answer, or none is left.
        """
        read = partial(_prompt_alone if prompts_alone else _with_answer, tokenizer=tokenizer, form=form)
        examples, num_too_long = [], 0
        for where, record in read_records(path, form):
            example = read(record, where)
            if max(len(example.text.ids), len(example.prompt.ids) + room) > row_length:
                num_too_long += 1
            else:
                examples.append(example)
        what = "prompts with their answers"
        check_some_left(path, len(examples), num_too_long, what=what, row_length=row_length)
        return cls(examples, row_length=row_length, parts=parts, room=room)

    def __len__(self) -> int:
        return len(self._examples)

    def places(self, index: int) -> list[str]:
        """FILE:LINE of an example."""
        return [self._examples[index].prompt.place]

    def prompts(self, indices: np.ndarray) -> list[Prompt]:
        """The prompts of these examples."""
        return [self._examples[index].prompt for index in indices]

    def batch(self, indices: np.ndarray) -> Batch:
        """These examples, in order, as the stream `answers`; index -1 gives padding."""
        texts = [self._examples[index].text if index >= 0 else ChatTokens([], []) for index in indices]
        return Batch({"answers": pad(texts, self.row_length)})


def _with_answer(record: dict, where: str, *, tokenizer: Tokenizer, form: RecordFormat) -> PromptWithAnswer:
    prompt, answer = parse_answer(record, where, form)
    text = encode_answer(tokenizer, prompt, answer, where)
    # Where sampling begins: at the first token with weight.
    ids = text.ids[: int(np.argmax(np.array(text.loss_weights) > 0))]
    return PromptWithAnswer(Prompt(ids, record, where, prompt), text)


def _prompt_alone(record: dict, where: str, *, tokenizer: Tokenizer, form: RecordFormat) -> PromptWithAnswer:
    prompt = parse_prompt(record, where, form)
    if isinstance(prompt, list) and len(prompt) > 1 and prompt[-1].get("role") == tokenizer.answering_role:
        prompt = prompt[:-1]
    ids = encode_prompt(tokenizer, prompt, where)
    return PromptWithAnswer(Prompt(ids, record, where, prompt), ChatTokens(ids, [0.0] * len(ids)))
