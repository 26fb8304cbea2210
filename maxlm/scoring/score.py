"""`maxlm score`: scores of the answers in a file under a trained reward model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.interval import mean_interval, proportion_interval
from maxlm.data.chat import encode_answer, encode_chat
from maxlm.data.messages import parse_messages
from maxlm.data.records import field, read_records
from maxlm.errors import CheckpointError, DataError
from maxlm.interop.load import load_reward_model
from maxlm.scoring.reward_model import reward_of_sequences
from maxlm.tokenizer.codec import Tokenizer

_ACCEPTED = (
    "a record is {prompt, completion}, {prompt, chosen, rejected}, {messages} ending with the answer, or"
    " {messages, completion}"
)


@dataclass(frozen=True)
class Scored:
    """FILE:LINE of a record, and the score of its `completion`, or the scores of its `chosen` and `rejected`."""

    place: str
    scores: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        if "completion" in self.scores:
            return {"id": self.place, "score": self.scores["completion"]}
        return {"id": self.place, **{f"{name}_score": value for name, value in self.scores.items()}}


def score_file(model_path: str | Path, path: str | Path) -> list[Scored]:
    """The score of each record of a JSONL file, in order.

    Raises:
      DataError: a record has no accepted form, or is longer than the model's context; with file and line.
      CheckpointError: the model is not a trained reward model.
    """
    model, tokenizer = load_reward_model(model_path)
    if tokenizer is None:
        raise CheckpointError(f"{model_path}: has no tokenizer; copy the one it was trained with into its run folder")
    longest = model.execution.max_length
    places, sequences = [], []
    for where, record in read_records(path):
        for name, ids in _encoded(record, tokenizer, where):
            if len(ids) > longest:
                raise DataError(
                    f"{where}: its {len(ids)} tokens exceed the model's context of {longest}; shorten or remove it"
                )
            places.append((where, name))
            sequences.append(ids)
    if not sequences:
        raise DataError(f"{path}: contains no records; {_ACCEPTED}")
    by_place: dict[str, dict[str, float]] = {}
    for (where, name), value in zip(places, reward_of_sequences(model, sequences)):
        by_place.setdefault(where, {})[name] = float(value)
    return [Scored(where, scores) for where, scores in by_place.items()]


def summarize(scored: list[Scored], *, seed: int = 0) -> dict[str, Any]:
    """Mean score and, for pairs, the accuracy and mean margin of the chosen answer; with 95% confidence intervals."""
    values = [value for item in scored for value in item.scores.values()]
    summary = {"records": len(scored), "mean": mean_interval(np.array(values), seed=seed).to_dict()}
    margins = np.array([item.scores["chosen"] - item.scores["rejected"] for item in scored if "chosen" in item.scores])
    if len(margins):
        summary["pairs"] = len(margins)
        summary["accuracy"] = proportion_interval((margins > 0).astype(np.int64), seed=seed).to_dict()
        summary["margin"] = mean_interval(margins, seed=seed).to_dict()
    return summary


def _encoded(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Iterator[tuple[str, list[int]]]:
    """The name of each answer in a record, and the token ids of the prompt with it."""
    names = [name for name in ("chosen", "rejected", "completion") if name in record]
    if names in (["chosen", "rejected"], ["completion"]):
        if ("prompt" in record) == ("messages" in record):
            raise DataError(f"{where}: must have either prompt or messages with {' and '.join(names)}; {_ACCEPTED}")
        prompt = record["prompt"] if "prompt" in record else record["messages"]
        for name in names:
            yield name, encode_answer(tokenizer, prompt, record[name], where).ids
        return
    if names:
        raise DataError(f"{where}: has {' and '.join(names)}; {_ACCEPTED}")
    if "messages" not in record:
        raise DataError(f"{where}: has {', '.join(record) or 'nothing'}; {_ACCEPTED}")
    messages = parse_messages(field(record, "messages", where), where, RecordFormat())
    ids = encode_chat(tokenizer, messages, where).ids
    if messages[-1]["role"] != tokenizer.answering_role:
        raise DataError(f"{where}: must end with a message of role {tokenizer.answering_role!r}; {_ACCEPTED}")
    yield "completion", ids
