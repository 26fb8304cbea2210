"""Answers that were judged alone, good or bad: reading, tokenization, and padding to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.batch import Batch
from maxlm.data.examples.chat import check_some_left
from maxlm.data.examples.encoding import encode_answer
from maxlm.data.examples.preference import pad, round_up
from maxlm.data.examples.records import parse_judged, read_records
from maxlm.errors import DataError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class JudgedAnswer:
    """A prompt with its answer, whose tokens have weight 1; whether it is good; its FILE:LINE."""

    text: ChatTokens
    is_good: bool
    place: str

    @property
    def answer_start(self) -> int:
        """The index of the first token of the answer."""
        return int(np.argmax(np.array(self.text.loss_weights) > 0))


class JudgedAnswers:
    """The answers of a file as token ids.

    Each is also combined with the prompt of another one: the answer to the next example that has another prompt and
    fits. How much more likely the model makes such mismatched answers estimates its divergence (arXiv:2402.01306).
    """

    def __init__(self, answers: Sequence[JudgedAnswer], *, row_length: int, parts: int = 1):
        self._answers = answers
        self._mismatched = [_mismatched(answers, index, row_length) for index in range(len(answers))]
        longest = max(len(text.ids) for text in (*(answer.text for answer in answers), *self._mismatched))
        self.row_length = min(row_length, round_up(longest, parts))

    @classmethod
    def read(
        cls, path: str | Path, tokenizer: Tokenizer, *, row_length: int, parts: int = 1, form: RecordFormat
    ) -> Self:
        """Read the answers of a file; those too long are skipped and counted.

        Raises:
          DataError: a line is not an answer with a label, none is left, or all have the same label.
        """
        answers, num_too_long = [], 0
        for where, record in read_records(path, form):
            for prompt, answer, is_good in parse_judged(record, where, form):
                text = encode_answer(tokenizer, prompt, answer, where)
                if len(text.ids) > row_length:
                    num_too_long += 1
                else:
                    answers.append(JudgedAnswer(text, is_good, where))
        check_some_left(path, len(answers), num_too_long, what="judged answers", row_length=row_length)
        if len({answer.is_good for answer in answers}) == 1:
            label = "good" if answers[0].is_good else "bad"
            raise DataError(f"{path}: all answers are {label} (label), so there is nothing to tell apart; add others")
        return cls(answers, row_length=row_length, parts=parts)

    def __len__(self) -> int:
        return len(self._answers)

    def places(self, answer: int) -> list[str]:
        """FILE:LINE of an answer."""
        return [self._answers[answer].place]

    def batch(self, indices: np.ndarray) -> Batch:
        """These answers, in order, as the stream `answers`, with mismatched ones as the stream `mismatched`, and
        `is_good_B`; index -1 gives padding."""
        nothing = ChatTokens([], [])
        texts = [self._answers[index].text if index >= 0 else nothing for index in indices]
        mismatched = [self._mismatched[index] if index >= 0 else nothing for index in indices]
        is_good_B = np.array([index >= 0 and self._answers[index].is_good for index in indices], np.float32)
        streams = {"answers": pad(texts, self.row_length), "mismatched": pad(mismatched, self.row_length)}
        return Batch(streams, {"is_good_B": is_good_B})


def _mismatched(answers: Sequence[JudgedAnswer], index: int, row_length: int) -> ChatTokens:
    """The prompt of an answer with the answer to another prompt; its own if there is no other that fits."""
    own = answers[index]
    start = own.answer_start
    prompt = own.text.ids[:start]
    for offset in range(1, len(answers)):
        other = answers[(index + offset) % len(answers)]
        begin = other.answer_start
        if other.text.ids[:begin] != prompt and start + len(other.text.ids) - begin <= row_length:
            return ChatTokens(prompt + other.text.ids[begin:], [0.0] * start + other.text.loss_weights[begin:])
    return own.text
