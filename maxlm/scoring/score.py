"""`maxlm score`: scores of the answers in a file under trained reward models."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maxlm.config.data import RecordFormat
from maxlm.core.interval import mean_interval, proportion_interval
from maxlm.data.examples.encoding import encode_answer, encode_chat
from maxlm.data.examples.messages import parse_messages
from maxlm.data.examples.records import field, parse_prompt, read_records
from maxlm.data.examples.steps import encode_steps, parse_steps
from maxlm.errors import CheckpointError, DataError
from maxlm.interop.load import load_reward_model
from maxlm.models.decoder import Decoder
from maxlm.scoring.reward_model import values_of_sequences
from maxlm.tokenizer.codec import Tokenizer

StepScore = Literal["min", "product", "last"]

_ACCEPTED = (
    "a record is {prompt, completion}, {prompt, completions}, {prompt, chosen, rejected}, {messages} ending with the"
    " answer, or {messages, completion}"
)
_ACCEPTED_STEPS = "a record for a process reward model is {prompt, steps}"
# Records between two writes of the output.
_CHUNK = 256


@dataclass(frozen=True)
class Answer:
    """The score of an answer, the scores of each model, and, of process reward models, those of its steps.

    mean, std: over the models. score: mean - uncertainty * std.
    steps: of each step, the mean over the models.
    """

    score: float
    mean: float
    std: float
    by_model: tuple[float, ...]
    steps: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        ensemble = {"mean": self.mean, "std": self.std, "by_model": [*self.by_model]} if len(self.by_model) > 1 else {}
        return {"score": self.score, **ensemble, **({"steps": [*self.steps]} if self.steps else {})}


@dataclass(frozen=True)
class Scored:
    """FILE:LINE of a record, and its answers, each with its name: several may have the name `completions`."""

    place: str
    answers: tuple[tuple[str, Answer], ...]

    def to_dict(self) -> dict[str, Any]:
        names = [name for name, _ in self.answers]
        values = [answer.to_dict() for _, answer in self.answers]
        if "completions" in names:
            return {"id": self.place, "completions": values}
        if "chosen" in names:
            pairs = ((f"{name}_{key}", value) for name, each in zip(names, values) for key, value in each.items())
            return {"id": self.place, **dict(pairs)}
        return {"id": self.place, **values[0]}


class RewardModels:
    """An ensemble of reward models, all of one kind, in memory at once.

    Args:
      uncertainty: how many standard deviations are subtracted from the mean of the models: a lower bound, which an
        answer that the models disagree on does not reach (arXiv:2310.02743 subtracts variances).
      step_score: what the score of a solution is of the probabilities of its steps.

    Raises:
      CheckpointError: one is no reward model, has no tokenizer, or another kind than the first.
    """

    def __init__(self, paths: Sequence[str | Path], *, uncertainty: float = 0.0, step_score: StepScore = "min"):
        self._uncertainty, self._step_score = uncertainty, step_score
        self._models: list[tuple[Decoder, Tokenizer]] = []
        for path in paths:
            model, tokenizer = load_reward_model(path)
            if tokenizer is None:
                raise CheckpointError(f"{path}: has no tokenizer; copy the one it was trained with into its run folder")
            self._models.append((model, tokenizer))
            if _is_process_model(model) != self.scores_steps:
                kinds = [
                    "a process reward model" if _is_process_model(m) else "a reward model" for m, _ in self._models
                ]
                raise CheckpointError(f"{path}: is {kinds[-1]}, and {paths[0]} is {kinds[0]}; score them separately")

    @property
    def scores_steps(self) -> bool:
        """Whether they score steps of solutions, not whole answers."""
        return _is_process_model(self._models[0][0])

    def check(self, records: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Read every record as each model does.

        Raises:
          DataError: one has no accepted form, or is too long; with file and line.
        """
        for where, record in records:
            for model, tokenizer in self._models:
                for _, ids, _ in self._encoded(record, tokenizer, where):
                    longest = model.execution.max_length
                    if len(ids) > longest:
                        raise DataError(
                            f"{where}: its {len(ids)} tokens exceed the model's context of {longest}; shorten or"
                            " remove it"
                        )

    def score(self, records: Sequence[tuple[str, dict[str, Any]]]) -> list[Scored]:
        """The scores of checked records, in order."""
        owners: list[tuple[str, str]] = []
        scores, steps = [], []
        for model, tokenizer in self._models:
            owners, sequences, ends = [], [], []
            for where, record in records:
                for name, ids, places in self._encoded(record, tokenizer, where):
                    owners.append((where, name))
                    sequences.append(ids)
                    ends.append(places)
            values = values_of_sequences(model, sequences)
            if self.scores_steps:
                steps.append([1 / (1 + np.exp(-value_L[places])) for value_L, places in zip(values, ends)])
                scores.append([_of_steps(probabilities, self._step_score) for probabilities in steps[-1]])
            else:
                scores.append([float(value_L[-1]) for value_L in values])
        found: dict[str, list[tuple[str, Answer]]] = {}
        for index, (where, name) in enumerate(owners):
            by_model = tuple(float(each[index]) for each in scores)
            mean, std = float(np.mean(by_model)), float(np.std(by_model))
            mean_steps = np.mean([each[index] for each in steps], axis=0) if steps else ()
            answer = Answer(mean - self._uncertainty * std, mean, std, by_model, tuple(map(float, mean_steps)))
            found.setdefault(where, []).append((name, answer))
        return [Scored(where, tuple(answers)) for where, answers in found.items()]

    def _encoded(
        self, record: dict[str, Any], tokenizer: Tokenizer, where: str
    ) -> Iterator[tuple[str, list[int], list[int]]]:
        """The name of each answer, the token ids of the prompt with it, and the ends of its steps."""
        if self.scores_steps:
            if "steps" not in record:
                raise DataError(f"{where}: has {', '.join(record) or 'nothing'}; {_ACCEPTED_STEPS}")
            prompt = parse_prompt(record, where, RecordFormat())
            yield "steps", *encode_steps(tokenizer, prompt, parse_steps(record, where), where)
        else:
            for name, ids in _encoded_answers(record, tokenizer, where):
                yield name, ids, []


def read_answers(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The records of a file; raises DataError if there are none."""
    records = list(read_records(path))
    if not records:
        raise DataError(f"{path}: contains no records; {_ACCEPTED}")
    return records


def score_chunks(
    models: RewardModels, records: Sequence[tuple[str, dict[str, Any]]], *, chunk: int = _CHUNK
) -> Iterator[list[Scored]]:
    """The scores of records, a chunk at a time."""
    for start in range(0, len(records), chunk):
        yield models.score(records[start : start + chunk])


def summarize(lines: Sequence[dict[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Mean score and, for pairs, the accuracy and mean margin of the chosen answer; with 95% confidence intervals.

    Args:
      lines: of the output, as `Scored.to_dict` gives them.
    """
    scores = [score for line in lines for score in _scores(line)]
    summary: dict[str, Any] = {"records": len(lines), "answers": len(scores)}
    summary["mean"] = mean_interval(np.array(scores), seed=seed).to_dict()
    margins = np.array([line["chosen_score"] - line["rejected_score"] for line in lines if "chosen_score" in line])
    if len(margins):
        summary["pairs"] = len(margins)
        summary["accuracy"] = proportion_interval((margins > 0).astype(np.int64), seed=seed).to_dict()
        summary["margin"] = mean_interval(margins, seed=seed).to_dict()
    return summary


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The complete lines of an interrupted output; the last one may have been cut off."""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _scores(line: dict[str, Any]) -> list[float]:
    if "completions" in line:
        return [each["score"] for each in line["completions"]]
    return [line[name] for name in ("score", "chosen_score", "rejected_score") if name in line]


def _is_process_model(model: Decoder) -> bool:
    return model.config.labels == ("process_reward",)


def _of_steps(probabilities: np.ndarray, step_score: StepScore) -> float:
    if step_score == "last":
        return float(probabilities[-1])
    return float(probabilities.min() if step_score == "min" else probabilities.prod())


def _encoded_answers(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Iterator[tuple[str, list[int]]]:
    """The name of each answer in a record, and the token ids of the prompt with it."""
    names = [name for name in ("chosen", "rejected", "completion", "completions") if name in record]
    if names in (["chosen", "rejected"], ["completion"], ["completions"]):
        if ("prompt" in record) == ("messages" in record):
            raise DataError(f"{where}: must have either prompt or messages with {' and '.join(names)}; {_ACCEPTED}")
        prompt = record["prompt"] if "prompt" in record else record["messages"]
        answers = [(name, record[name]) for name in names]
        if names == ["completions"]:
            if not isinstance(record["completions"], list) or not record["completions"]:
                raise DataError(f"{where}: completions must be a list of answers, and not empty")
            answers = [("completions", answer) for answer in record["completions"]]
        for name, answer in answers:
            yield name, encode_answer(tokenizer, prompt, answer, where).ids
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
