"""What a judge thinks of sampled answers, as a reward: a number from 0 to 1 for each, or none.

Dimensions: R answers.
"""

import itertools
import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import xxhash
from etils import epath

from maxlm.config.feedback import JudgedReward, Principle
from maxlm.config.load import load_config
from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError, FaultError, RequestError
from maxlm.runtime.storage import LineLog
from maxlm.runtime.time_limit import TimeLimitExceeded, within
from maxlm.runtime.written import read_written_lines
from maxlm.scoring.chat_models import ReplyError, in_threads
from maxlm.scoring.judge import Judge, UnjudgedError, draw_principles, shown_prompt, usable_principles
from maxlm.scoring.ledger import Ledger
from maxlm.scoring.reply_log import RecordedModel, ReplyLog

# The share of failures is judged over at least so many answers.
_ENOUGH = 100


@dataclass(frozen=True)
class _Question:
    """One answer to rate, or two to compare.

    key: the same for the same question in any run of these settings.
    """

    key: str
    prompt: Prompt
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Problem:
    """Why a question has no answer; `no_reply`: the endpoint gave none, rather than one that cannot be read."""

    message: str
    no_reply: bool


class JudgeOfAnswers:
    """Asks a judge about the answers of whole rounds, `judge.concurrent` questions at a time.

    What the judge said, and about which answers it said nothing usable, is kept in `folder` for a resumed run, which
    asks nothing twice and so gets the same rewards. Thread-safe.

    Args:
      name: for messages.
      folder: for replies and what was left out, of this process alone; None keeps nothing.
      share: of the limits on cost and requests, for one of several processes.
      time_limit: seconds for the answers to one prompt.

    Raises:
      ConfigError: the constitution is missing, or has no principle that asks this; the API key is missing.
    """

    def __init__(
        self, config: JudgedReward, *, name: str, folder: epath.Path | None, seed: int, share: float, time_limit: float
    ):
        self._config, self._name, self._seed, self._time_limit = config, name, seed, time_limit
        constitution = load_config(config.constitution, kind="constitution")
        asks = "rate" if config.measure == "rating" else "prefer"
        self._principles = usable_principles(constitution, (asks,))
        if not self._principles:
            raise ConfigError([f"{name}: no principle of {config.constitution} has {asks}, which the judge is asked"])
        if config.votes > len(self._principles) and config.temperature == 0:
            raise ConfigError(
                [
                    f"{name}: {config.votes} votes under {len(self._principles)} principles repeat one, and without"
                    " sampling its verdict too; set temperature above 0, add principles, or lower votes"
                ]
            )
        log, self._aside_log, self._aside = None, None, set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            log, aside = ReplyLog(folder / "replies.jsonl"), folder / "aside.jsonl"
            self._aside = {line["key"] for line in read_written_lines(aside)}
            self._aside_log = LineLog(aside)
        limits = config.limits
        ledger = Ledger(
            cost=0.0 if log is None else log.cost,
            requests=0 if log is None else log.requests,
            max_cost=None if limits.max_cost is None else limits.max_cost * share,
            max_requests=None if limits.max_requests is None else max(int(limits.max_requests * share), 1),
        )
        # Here, since it imports an HTTP client, which other rewards do not need.
        from maxlm.scoring.chat_endpoint import ChatEndpoint

        self._stopping = threading.Event()
        endpoint = ChatEndpoint(config.judge, ledger=ledger, stopping=self._stopping)
        self._judge = Judge(
            endpoint if log is None else RecordedModel(endpoint, log),
            constitution.prompts,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=seed,
            where=f"{config.constitution}: prompts",
        )
        asked = config.model_dump(mode="json", include={"measure", "votes", "scale", "max_tokens", "temperature"})
        self._identity = [endpoint.identity, asked, constitution.model_dump(mode="json"), seed]
        # Whether each of the last questions failed.
        self._failures: deque[bool] = deque()
        self._lock = threading.Lock()

    def try_out(self, prompt: Prompt) -> None:
        """Ask one question.

        Raises:
          RequestError: there is no reply.
        """
        texts = (str(prompt.record.get("answer", "")), "") if self._config.measure != "rating" else ("",)
        found = self._ask(self._question(prompt, *texts))
        if isinstance(found, _Problem) and found.no_reply:
            raise RequestError(f"{self._name}: {found.message}")

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> np.ndarray:
        """What each answer is worth: float32 [R], from 0 to 1.

        NaN: the judge said nothing usable about it, or it has no other answers in its group to be compared with.

        Raises:
          FaultError: there were too many of these among the last answers.
          ConfigError: the time limit has passed.
          RequestError: the endpoint refuses all requests, or a limit on cost or requests is reached.
        """
        asked = list(self._questions(prompts, texts))
        values = self._values([question for _, question in asked], num_prompts=len({id(prompt) for prompt in prompts}))
        sums, counts = np.zeros(len(texts)), np.zeros(len(texts))
        for rows, question in asked:
            value = values[question.key]
            # Of two answers, one wins what the other loses.
            for row, number in zip(rows, (value, 1 - value)):
                if np.isfinite(number):
                    sums[row], counts[row] = sums[row] + number, counts[row] + 1
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)

    def _questions(
        self, prompts: Sequence[Prompt], texts: Sequence[str]
    ) -> Iterator[tuple[tuple[int, ...], _Question]]:
        """The questions, each with the rows of the answers that it is about."""
        for _, group in itertools.groupby(range(len(prompts)), key=lambda row: id(prompts[row])):
            rows = list(group)
            prompt = prompts[rows[0]]
            if self._config.measure == "wins_in_group":
                for first, second in itertools.combinations(rows, 2):
                    yield (first, second), self._question(prompt, texts[first], texts[second])
            elif self._config.measure == "wins_over_reference":
                for row in rows:
                    yield (row,), self._question(prompt, texts[row], prompt.record["answer"])
            else:
                for row in rows:
                    yield (row,), self._question(prompt, texts[row])

    def _question(self, prompt: Prompt, *texts: str) -> _Question:
        content = json.dumps([self._identity, prompt.text, texts], sort_keys=True, ensure_ascii=False)
        return _Question(xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass")), prompt, texts)

    def _values(self, asked: Sequence[_Question], *, num_prompts: int) -> dict[str, float]:
        """The judge's answers by key, NaN where it has none; equal questions are asked once."""
        values: dict[str, float] = {}
        questions = []
        for question in {question.key: question for question in asked}.values():
            if question.key in self._aside:
                values[question.key] = np.nan
            else:
                questions.append(question)
        problems: list[tuple[_Question, _Problem]] = []

        def ask_all() -> None:
            workers = self._config.judge.concurrent
            with closing(in_threads(self._ask, questions, workers=workers, stopping=self._stopping)) as results:
                for index, found in results:
                    question = questions[index]
                    if isinstance(found, _Problem):
                        problems.append((question, found))
                        values[question.key] = np.nan
                    else:
                        values[question.key] = found
                    self._count(question, found, len(questions))

        limit = self._time_limit * num_prompts
        try:
            within(limit, ask_all)
        except TimeLimitExceeded:
            self._stopping.set()
            raise ConfigError(
                [
                    f"{self._name}: the judge has answered {len(values)} of {len(questions)} questions about"
                    f" {num_prompts} prompts after {limit:g} seconds; raise judge.concurrent, lower"
                    " judge.timeout_seconds or judge.retries, or raise objective.reward_time_limit"
                ]
            ) from None
        self._set_aside(problems)
        return values

    def _ask(self, question: _Question) -> float | _Problem:
        config, prompt = self._config, question.prompt.text
        principles = draw_principles(self._principles, config.votes, self._seed, shown_prompt(prompt), *question.texts)
        try:
            return self._answer(prompt, question.texts, principles)
        except (ReplyError, UnjudgedError) as error:
            return _Problem(str(error), isinstance(error, ReplyError))

    def _answer(self, prompt: str | list, texts: tuple[str, ...], principles: Sequence[Principle]) -> float:
        if self._config.measure == "rating":
            rating = self._judge.rate(prompt, texts[0], principles=principles, scale=self._config.scale)
            return (rating.mean - 1) / (self._config.scale - 1)
        if texts[0] == texts[1]:
            return 0.5
        return self._judge.compare(prompt, texts[0], texts[1], principles=principles).first_probability

    def _count(self, question: _Question, found: float | _Problem, size: int) -> None:
        """Remember whether a question failed, and end the run if too many of the last ones have."""
        with self._lock:
            self._failures.append(isinstance(found, _Problem))
            while len(self._failures) > max(size, _ENOUGH):
                self._failures.popleft()
            failed, most = sum(self._failures), self._config.limits.max_failed_fraction
            if isinstance(found, _Problem) and failed > most * max(size, _ENOUGH):
                raise FaultError(
                    f"{self._name}: {failed} of the last {len(self._failures)} questions have no usable reply, which is"
                    f" above limits.max_failed_fraction={most:g} of {max(size, _ENOUGH)}; the last is"
                    f" {question.prompt.place}: {found.message}"
                )

    def _set_aside(self, problems: Sequence[tuple[_Question, _Problem]]) -> None:
        """Record which questions have no answer, before anything is trained without it."""
        with self._lock:
            for question, problem in sorted(problems, key=lambda each: each[0].key):
                self._aside.add(question.key)
                if self._aside_log is not None:
                    line = {"key": question.key, "place": question.prompt.place, "answers": question.texts}
                    self._aside_log.append(json.dumps({**line, "reason": problem.message}, ensure_ascii=False))
