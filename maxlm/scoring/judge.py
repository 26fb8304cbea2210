"""A chat model as a judge: which of two answers is better, and how good an answer is (arXiv:2306.05685)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xxhash

from maxlm.config.feedback import ConstitutionConfig, JudgePrompts, Principle
from maxlm.prompts.answer_formats import AnswerFormat, ChoiceFormat, UnreadableAnswer
from maxlm.prompts.prompt_template import PromptTemplate
from maxlm.scoring.chat_models import ChatModel, ChatRequest, Prompt

Outcome = Literal["first", "second", "tie"]
# An answer: its text, or messages.
Answer = str | list[dict[str, Any]]

_COMPARE_VARIABLES = ("conversation", "answer_a", "answer_b", "principle", "format")
_RATE_VARIABLES = ("conversation", "answer", "principle", "scale", "format")


class UnjudgedError(Exception):
    """No reply of the judge could be read; the message says what was wrong with the last one."""


@dataclass(frozen=True)
class Vote:
    """A comparison under one principle, in both orders.

    outcome: the answer that is better in both orders, else a tie.
    places: whether the answer shown first ("a") or second ("b") was called better, or neither ("tie"), in the order
      first-second and in the order second-first.
    """

    principle: str
    outcome: Outcome
    places: tuple[str, str]

    @property
    def orders_disagree(self) -> bool:
        """Whether the order of the answers decided."""
        return self.places in (("a", "a"), ("b", "b")) or self.places.count("tie") == 1


@dataclass(frozen=True)
class Verdict:
    """Votes on a pair; `unreadable` replies led to no vote."""

    votes: tuple[Vote, ...]
    unreadable: int = 0

    @property
    def first_probability(self) -> float:
        """The share of votes for the first answer; ties are half a vote for each."""
        values = {"first": 1.0, "tie": 0.5, "second": 0.0}
        return sum(values[vote.outcome] for vote in self.votes) / len(self.votes)

    @property
    def outcome(self) -> Outcome:
        """The answer with more votes, else a tie."""
        share = self.first_probability
        return "tie" if share == 0.5 else "first" if share > 0.5 else "second"

    @property
    def confidence(self) -> float:
        """The share of votes for the outcome, 0.5 (tie) to 1."""
        return max(self.first_probability, 1 - self.first_probability)


@dataclass(frozen=True)
class Rating:
    """Ratings of an answer by principle, from 1 to the scale; `unreadable` replies led to none."""

    ratings: tuple[tuple[str, int], ...]
    unreadable: int = 0

    @property
    def mean(self) -> float:
        return sum(value for _, value in self.ratings) / len(self.ratings)


@dataclass(frozen=True)
class _RatingFormat:
    """A whole number from 1 to `scale`, in a last line such as `Rating: 7` or `Rating: 7/10`, or alone."""

    scale: int

    def instruction(self) -> str:
        return f'End with one line, "Rating: X", where X is a whole number from 1 to {self.scale}.'

    def parse(self, text: str) -> int:
        number = rf"[\s*_`]*(\d{{1,4}})(?:\s*/\s*{self.scale})?[\s*_`.。]*"
        labelled = re.findall(rf"^[\s*_#>`]*rating[*_`]*\s*[:：]{number}$", text, re.MULTILINE | re.IGNORECASE)
        alone = re.fullmatch(number, text)
        found = int(labelled[-1]) if labelled else int(alone[1]) if alone else None
        if found is None:
            raise UnreadableAnswer(f"has no line Rating: X, where X is a whole number from 1 to {self.scale}")
        if not 1 <= found <= self.scale:
            raise UnreadableAnswer(f"rates {found}, which is not from 1 to {self.scale}")
        return found


@dataclass(frozen=True)
class Judge:
    """Asks a chat model about answers.

    Args:
      prompts: the messages to it.
      max_tokens, temperature: of its replies.
      where: names the prompts in messages.
      seed: replies under one principle differ by it where the temperature is above 0.

    Raises:
      ConfigError: a prompt is no template, or needs a variable that does not exist.
    """

    model: ChatModel
    prompts: JudgePrompts = field(default_factory=JudgePrompts)
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    where: str = "prompts"
    _compare: PromptTemplate = field(init=False)
    _rate: PromptTemplate = field(init=False)

    def __post_init__(self):
        for name, variables in (("compare", _COMPARE_VARIABLES), ("rate", _RATE_VARIABLES)):
            template = PromptTemplate(getattr(self.prompts, name), where=f"{self.where}.{name}")
            template.check(variables, what="there are")
            object.__setattr__(self, f"_{name}", template)

    def compare(self, prompt: Prompt, first: Answer, second: Answer, *, principles: Sequence[Principle]) -> Verdict:
        """Compare two answers: a vote for each principle, in both orders, so that a bias for a place is a tie.

        Raises:
          UnjudgedError: no vote could be read.
          ReplyError: a request failed.
        """
        choice = ChoiceFormat(("A", "B", "tie"), label="Verdict")
        votes, unreadable, problem = [], 0, ""
        conversation, texts = shown_prompt(prompt), (shown_answer(first), shown_answer(second))
        for number, principle in enumerate(principles):
            places = []
            for answer_a, answer_b in (texts, texts[::-1]):
                values = {
                    "conversation": conversation,
                    "answer_a": answer_a,
                    "answer_b": answer_b,
                    "principle": principle.prefer,
                    "format": choice.instruction(),
                }
                try:
                    places.append(self._ask(self._compare, values, choice, number).lower())
                except UnreadableAnswer as error:
                    unreadable, problem = unreadable + 1, str(error)
            if len(places) == 2:
                votes.append(Vote(principle.id, _outcome(places), (places[0], places[1])))
        if not votes:
            raise UnjudgedError(f"no verdict of {self.model.name} could be read: the last reply {problem}")
        return Verdict(tuple(votes), unreadable)

    def rate(self, prompt: Prompt, answer: Answer, *, principles: Sequence[Principle], scale: int = 10) -> Rating:
        """Rate an answer from 1 to `scale` under each principle.

        Raises:
          UnjudgedError: no rating could be read.
          ReplyError: a request failed.
        """
        form = _RatingFormat(scale)
        ratings, unreadable, problem = [], 0, ""
        for number, principle in enumerate(principles):
            values = {
                "conversation": shown_prompt(prompt),
                "answer": shown_answer(answer),
                "principle": principle.rate,
                "scale": scale,
                "format": form.instruction(),
            }
            try:
                ratings.append((principle.id, self._ask(self._rate, values, form, number)))
            except UnreadableAnswer as error:
                unreadable, problem = unreadable + 1, str(error)
        if not ratings:
            raise UnjudgedError(f"no rating of {self.model.name} could be read: the last reply {problem}")
        return Rating(tuple(ratings), unreadable)

    def _ask(self, template: PromptTemplate, values: dict[str, Any], form: AnswerFormat, number: int) -> Any:
        message = template.render(values, where=self.where)
        request = ChatRequest(
            [{"role": "user", "content": message}],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=request_seed(self.seed, number),
        )
        reply = self.model.reply(request)
        try:
            return form.parse(reply.text)
        except UnreadableAnswer as error:
            if reply.is_complete:
                raise
            raise UnreadableAnswer(f"is cut off after {self.max_tokens} tokens, and {error}") from None


def usable_principles(constitution: ConstitutionConfig, asks: Sequence[str]) -> tuple[Principle, ...]:
    """The principles that have the texts which are asked."""
    return tuple(
        principle for principle in constitution.principles if all(getattr(principle, name) is not None for name in asks)
    )


def draw_principles(principles: Sequence[Principle], count: int, *depends_on: Any) -> list[Principle]:
    """Principles in an order that `depends_on` decides; all are used before one repeats."""
    order = np.random.default_rng(request_seed(*depends_on)).permutation(len(principles))
    return [principles[order[number % len(order)]] for number in range(count)]


def position_bias(verdicts: Sequence[Verdict]) -> dict[str, float | int | None]:
    """How often the order of two answers decided, and which place wins.

    Returns:
      votes; order_disagreements: the share of votes in which both orders give different answers; shown_first_wins: of
      single comparisons that are no tie, the share that the answer shown first wins, 0.5 without a bias.
    """
    votes = [vote for verdict in verdicts for vote in verdict.votes]
    places = Counter(place for vote in votes for place in vote.places)
    decided = places["a"] + places["b"]
    return {
        "votes": len(votes),
        "order_disagreements": sum(vote.orders_disagree for vote in votes) / len(votes) if votes else None,
        "shown_first_wins": places["a"] / decided if decided else None,
    }


def shown_prompt(prompt: Prompt) -> str:
    """A prompt as a text for a judge."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def shown_answer(answer: Answer) -> str:
    """An answer as a text: what its message says, or all of its messages with their roles."""
    if isinstance(answer, str) or len(answer) > 1:
        return shown_prompt(answer)
    return answer[0]["content"]


def request_seed(*parts: Any) -> int:
    """A seed that depends on all parts: 31 bits, which every API takes."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode("utf-8", "surrogatepass")) & 0x7FFFFFFF


def _outcome(places: list[str]) -> Outcome:
    if places == ["a", "b"]:
        return "first"
    return "second" if places == ["b", "a"] else "tie"
