"""Solutions in steps, each with a label: reading, tokenization, and padding to batches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.batch import Batch
from maxlm.data.examples.chat import check_some_left
from maxlm.data.examples.encoding import encode_prompt
from maxlm.data.examples.messages import check_keys
from maxlm.data.examples.preference import pad, round_up
from maxlm.data.examples.records import Text, field, parse_prompt, read_records
from maxlm.errors import DataError, TokenizerError
from maxlm.prompts.chat_template import ChatTokens
from maxlm.tokenizer.codec import Tokenizer

_SIGNS = {"+": 1.0, "-": 0.0}


class LabeledSteps:
    """The solutions of a file as token ids, with the label of each step at its last token.

    Args:
      solutions: token ids, and of each step the index of its last token and its label.
      parts: row_length must be divisible by this.
      places: FILE:LINE of each solution.
    """

    def __init__(
        self,
        solutions: Sequence[tuple[list[int], list[tuple[int, float]]]],
        *,
        row_length: int,
        places: Sequence[str] = (),
        parts: int = 1,
    ):
        self._solutions, self._places = solutions, places
        self.row_length = min(row_length, round_up(max(len(ids) for ids, _ in solutions), parts))

    @classmethod
    def read(
        cls, path: str | Path, tokenizer: Tokenizer, *, row_length: int, parts: int = 1, form: RecordFormat
    ) -> Self:
        """Read solutions with `prompt`, `steps` and `labels`; those too long for a row are skipped and counted.

        Raises:
          DataError: a line is not a solution, or no solution is left.
        """
        solutions, places, num_too_long = [], [], 0
        for where, record in read_records(path, form):
            prompt, steps = parse_prompt(record, where, form), parse_steps(record, where)
            check_keys(record, ("prompt", "messages", "conversations", "instruction", "input", "system", "history",
                                "steps", "labels"), where, form)  # fmt: skip
            labels = _labels(record, len(steps), where)
            ids, ends = encode_steps(tokenizer, prompt, steps, where)
            if len(ids) > row_length:
                num_too_long += 1
            else:
                labeled = [(end, label) for end, label in zip(ends, labels) if label is not None]
                solutions.append((ids, labeled))
                places.append(where)
        check_some_left(path, len(solutions), num_too_long, what="solutions", row_length=row_length)
        return cls(solutions, row_length=row_length, places=places, parts=parts)

    def __len__(self) -> int:
        return len(self._solutions)

    def places(self, solution: int) -> list[str]:
        """FILE:LINE of a solution."""
        return [self._places[solution]]

    def batch(self, indices: np.ndarray) -> Batch:
        """These solutions, one per row, as the stream `text`; index -1 gives padding.

        Loss weights are 1 at the last token of each labeled step, and the value `labels_BL` its label.
        """
        solutions = [self._solutions[index] if index >= 0 else ([], []) for index in indices]
        stream = pad([ChatTokens(ids, [0.0] * len(ids)) for ids, _ in solutions], self.row_length)
        weights_BL, labels_BL = np.zeros((2, *stream.tokens.shape), np.float32)
        for row, (_, labeled) in enumerate(solutions):
            for end, label in labeled:
                weights_BL[row, end], labels_BL[row, end] = 1.0, label
        return Batch({"text": replace(stream, loss_weights=weights_BL)}, {"labels_BL": labels_BL})


def encode_steps(tokenizer: Tokenizer, prompt: Text, steps: Sequence[str], where: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and steps, each ended by a line break, and the index of each step's last token.

    Steps are encoded one by one, so that what follows a step does not change its tokens.

    Raises:
      DataError: a text cannot be encoded.
    """
    if isinstance(prompt, str) and not prompt.endswith("\n"):
        prompt += "\n"
    ids, ends = list(encode_prompt(tokenizer, prompt, where)), []
    for step in steps:
        try:
            ids += tokenizer.encode_within(step.removesuffix("\n") + "\n")
        except TokenizerError as error:
            raise DataError(f"{where}: {error}") from None
        ends.append(len(ids) - 1)
    return ids, ends


def parse_steps(record: dict[str, Any], where: str) -> list[str]:
    """The steps of a record.

    Raises:
      DataError: they are not texts, or one is empty.
    """
    steps = field(record, "steps", where)
    if not isinstance(steps, list) or not steps:
        raise DataError(f"{where}: steps must be a list of texts, and not empty")
    for number, step in enumerate(steps, 1):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"{where}: step {number} must be a text, and not empty, not {str(step)[:40]!r}")
    return steps


def _labels(record: dict[str, Any], num_steps: int, where: str) -> list[float | None]:
    """The label of each step: a probability that it is right; None if it has none."""
    labels = field(record, "labels", where)
    if not isinstance(labels, list) or len(labels) != num_steps:
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise DataError(f"{where}: labels must be a list with one for each of the {num_steps} steps; it has {count}")
    found: list[float | None] = []
    for number, label in enumerate(labels, 1):
        value = _SIGNS.get(label, label) if isinstance(label, str) else label
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise DataError(
                f"{where}: label {number} must be true or false, + or -, a number from 0 to 1, or null for a step"
                f" without one, not {str(label)[:40]!r}"
            )
        found.append(None if value is None else float(value))
    if all(label is None for label in found):
        raise DataError(f"{where}: no step has a label, so there is nothing to learn; remove the line")
    return found
