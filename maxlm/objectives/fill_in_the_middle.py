"""Fill-in-the-middle (arXiv:2207.14255): documents are cut in three, and the middle is moved to the end.

So the model learns to write what stands between two texts, and everything that next-token prediction teaches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from maxlm.config.base import Fraction
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream
from maxlm.errors import TokenizerError
from maxlm.objectives.packed_rows import PackedRowsData, as_batch, open_rows
from maxlm.objectives.pretrain import Pretraining
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import PreviewRow, RunContext

# A document with fewer tokens is left as it is.
_SHORTEST = 8

Name = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens before the prefix, the suffix and the middle, and of the end of a document."""

    prefix: int
    suffix: int
    middle: int
    eos: int


class FillInTheMiddle(Pretraining):
    """Next-token prediction on packed rows, some documents of which have their middle at the end."""

    kind: Literal["fim"] = "fim"  # type: ignore[assignment]
    rate: Fraction = Field(0.5, description="Share of the documents that are cut.")
    suffix_first_rate: Fraction = Field(
        0.5, description="Share of those whose suffix comes first: prefix and middle are then one text."
    )
    prefix_token: Name = Field("<|fim_prefix|>", description="Control token before the prefix.")
    suffix_token: Name = Field("<|fim_suffix|>", description="Control token before the suffix.")
    middle_token: Name = Field("<|fim_middle|>", description="Control token before the middle.")

    def open_data(self, context: RunContext) -> "FillInTheMiddleData":
        return FillInTheMiddleData(context, self.marks(context.tokenizer))

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        marks, mixture = self.marks(tokenizer), open_rows(config, tokenizer)
        for number in range(num_examples):
            step, row = divmod(number, config.batch_size)
            rows = {name: values[row : row + 1] for name, values in mixture.batch(step).items()}
            rows = self.rearranged(rows, marks, config.seed, step, row)
            yield PreviewRow(f"row {number + 1}", Stream.from_rows(rows))

    def marks(self, tokenizer: Tokenizer) -> Marks:
        """The ids of the tokens.

        Raises:
          TokenizerError: the tokenizer lacks one of them.
        """
        ids = {}
        for key in ("prefix_token", "suffix_token", "middle_token"):
            name = getattr(self, key)
            if name not in tokenizer.control_tokens:
                raise TokenizerError(
                    f"objective.{key}: {name!r} is no control token of the tokenizer; name the one that it has, or"
                    " train a tokenizer with control_tokens"
                )
            ids[key.removesuffix("_token")] = tokenizer.control_tokens[name]
        if tokenizer.eos_id is None:
            raise TokenizerError("objective.kind=fim needs a tokenizer with an eos token, which ends the middle")
        return Marks(**ids, eos=tokenizer.eos_id)

    def rearranged(
        self, rows: dict[str, np.ndarray], marks: Marks, seed: int, step: int, first_row: int
    ) -> dict[str, np.ndarray]:
        """Rows of the loader with the middle of some documents at their end: a function of the seed, step and row.

        Documents that end in the row are cut at two places drawn evenly. Three tokens before the end of the suffix
        make room for the marks, so that nothing else in the row moves.
        """
        tokens, targets = rows["tokens"].copy(), rows["targets"].copy()
        for number, segments in enumerate(rows["segment_ids"]):
            random = np.random.default_rng([seed, step, first_row + number])
            ends = np.flatnonzero(np.append(segments[1:] != segments[:-1], True)) + 1
            for start, end in zip(np.append(0, ends[:-1]), ends):
                is_cut, suffix_first, *cuts = random.random(4)
                document = tokens[number, start:end]
                is_whole = segments[start] and document[-1] == marks.eos and end - start >= _SHORTEST
                if is_whole and is_cut < self.rate:
                    # The first token, such as bos, and eos stay.
                    body = _with_middle_last(document[1:-1], marks, sorted(cuts), suffix_first < self.suffix_first_rate)
                    tokens[number, start + 1 : end - 1] = body
                    targets[number, start : end - 2] = body
        return {**rows, "tokens": tokens, "targets": targets}


def _with_middle_last(body: np.ndarray, marks: Marks, cuts: list[float], suffix_first: bool) -> np.ndarray:
    """As many tokens as `body` has: three marks, the prefix, the suffix without its end, and the middle.

    cuts: where the middle begins and ends, as shares of the length.
    """
    kept = body[: len(body) - 3]
    begin, end = (int(cut * (len(kept) + 1)) for cut in cuts)
    prefix, middle, suffix = np.split(kept, [begin, end])
    parts: list[Any]
    if suffix_first:
        parts = [[marks.prefix, marks.suffix], suffix, [marks.middle], prefix, middle]
    else:
        parts = [[marks.prefix], prefix, [marks.suffix], suffix, [marks.middle], middle]
    return np.concatenate(parts).astype(body.dtype)


class FillInTheMiddleData(PackedRowsData):
    """Packed rows with documents rearranged; held-out rows are left as they are."""

    def __init__(self, context: RunContext, marks: Marks):
        super().__init__(context)
        self._marks = marks

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        mine, config = self._context.rows, self._context.config
        first_row = mine.index * (config.batch_size // mine.count)
        for step, rows in enumerate(self.rows_of_steps(start_step), start_step):
            yield as_batch(config.objective.rearranged(rows, self._marks, config.seed, step, first_row))


OBJECTIVE = FillInTheMiddle
