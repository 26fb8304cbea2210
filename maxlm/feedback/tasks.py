"""What is made of one record: preference pairs, revised chats, rated chats."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from maxlm.config.feedback import AnswersConfig, FeedbackConfig, Principle
from maxlm.feedback.records import Item
from maxlm.scoring.chat_models import ChatModel, ChatRequest, ReplyError
from maxlm.scoring.judge import (
    Answer,
    Judge,
    UnjudgedError,
    Verdict,
    draw_principles,
    request_seed,
    shown_answer,
    shown_prompt,
)


@dataclass
class Outcome:
    """What a record led to.

    made: the records of training data.
    aside: what was left out, each with its reason.
    failed: whether something is missing because a model gave no usable reply.
    verdicts, unreadable: for the summary.
    """

    made: list[dict[str, Any]] = field(default_factory=list)
    aside: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    unreadable: int = 0

    def set_aside(self, item: Item, reason: str, detail: str = "", **more: Any) -> None:
        """Leave something out; `reason` is for counting."""
        self.aside.append({"place": item.place, "reason": reason, **({"detail": detail} if detail else {}), **more})


@dataclass(frozen=True)
class Task:
    """One kind of feedback.

    file_name: of the data that it makes.
    asks: the part of a principle that it needs.
    run: makes the data of one record.
    """

    file_name: str
    asks: tuple[str, ...]
    run: Callable[["Context", Item, Outcome], None]


@dataclass(frozen=True)
class Context:
    """What a task needs: the settings, the principles that it can use, the judge and the model that answers.

    Without a constitution there is no judge.
    """

    config: FeedbackConfig
    principles: tuple[Principle, ...]
    judge: Judge | None
    model: ChatModel | None

    @property
    def task(self) -> Any:
        """The settings of the task, of its own class."""
        return self.config.task

    def perform(self, item: Item) -> Outcome:
        """What a record leads to; replies that are missing are counted and named in it."""
        outcome = Outcome()
        try:
            find_task(self.config).run(self, item, outcome)
        except ReplyError as error:
            outcome.failed = True
            outcome.set_aside(item, "no reply", str(error))
        return outcome


def prefer(context: Context, item: Item, outcome: Outcome) -> None:
    """Compare all pairs of answers."""
    answers, votes = _answers(context, item, outcome), context.task.votes
    for first, second in combinations(answers, 2):
        texts = [shown_answer(answer).strip() for answer in (first, second)]
        pair: dict[str, Any] = {"answers": [first, second]}
        if texts[0] == texts[1]:
            outcome.set_aside(item, "equal answers", **pair)
            continue
        principles = _drawn(context, item, votes, *texts)
        try:
            verdict = context.judge.compare(item.prompt, first, second, principles=principles)
        except UnjudgedError as error:
            outcome.failed = True
            outcome.unreadable += 2 * votes
            outcome.set_aside(item, "unreadable judge", str(error), **pair)
            continue
        outcome.verdicts.append(verdict)
        outcome.unreadable += verdict.unreadable
        said: dict[str, Any] = {
            "judge": context.judge.model.name,
            "principles": [vote.principle for vote in verdict.votes],
            "votes": [vote.outcome for vote in verdict.votes],
            "confidence": round(verdict.confidence, 6),
        }
        if verdict.outcome == "tie":
            outcome.set_aside(item, "tie", **pair, **said)
            continue
        chosen, rejected = (first, second) if verdict.outcome == "first" else (second, first)
        said["votes"] = [_relative(vote.outcome, verdict.outcome) for vote in verdict.votes]
        outcome.made.append(
            {
                "id": item.place,
                "prompt": item.prompt,
                "chosen": chosen,
                "rejected": rejected,
                **said,
                **_origin(context, item),
            }
        )


def revise(context: Context, item: Item, outcome: Outcome) -> None:
    """Let the judge criticize and rewrite an answer, once or more (arXiv:2212.08073, section 3.1)."""
    task, model = context.task, context.judge.model
    for answer in _answers(context, item, outcome):
        revised = shown_answer(answer)
        principles = _drawn(context, item, task.rounds, revised)
        critiques = []
        for number, principle in enumerate(principles):
            dialogue = _dialogue(item, revised)
            steps = []
            for question in (principle.critique, principle.revise):
                dialogue = [*dialogue, {"role": "user", "content": question}]
                reply = model.reply(
                    ChatRequest(
                        dialogue,
                        max_tokens=task.max_tokens,
                        temperature=task.temperature,
                        seed=request_seed(context.config.seed, number),
                    )
                )
                dialogue = [*dialogue, {"role": "assistant", "content": reply.text}]
                steps.append(reply)
            problem = "is empty" if not steps[1].text.strip() else "is cut off" if not steps[1].is_complete else None
            if problem is not None:
                outcome.failed = True
                outcome.set_aside(item, f"revision {problem}", principle=principle.id, revision=steps[1].text)
                break
            critiques.append(steps[0].text.strip())
            revised = steps[1].text.strip()
        else:
            origin = _origin(context, item)
            origin["metadata"] |= {
                "judge": model.name,
                "principles": [principle.id for principle in principles],
                "first_answer": shown_answer(answer),
                "critiques": critiques,
            }
            outcome.made.append({"id": item.place, **_chat(item, revised), **origin})


def rate(context: Context, item: Item, outcome: Outcome) -> None:
    """Rate answers, and keep those that are good enough."""
    task = context.task
    for answer in _answers(context, item, outcome):
        principles = _drawn(context, item, task.votes, shown_answer(answer))
        try:
            rating = context.judge.rate(item.prompt, answer, principles=principles, scale=task.scale)
        except UnjudgedError as error:
            outcome.failed = True
            outcome.unreadable += task.votes
            outcome.set_aside(item, "unreadable judge", str(error), answer=answer)
            continue
        outcome.unreadable += rating.unreadable
        said: dict[str, Any] = {
            "judge": context.judge.model.name,
            "principles": [name for name, _ in rating.ratings],
            "ratings": [value for _, value in rating.ratings],
            "rating": round(rating.mean, 6),
            "scale": task.scale,
        }
        if task.keep_at_least is not None and rating.mean < task.keep_at_least:
            outcome.set_aside(item, "low rating", answer=answer, **said)
            continue
        origin = _origin(context, item)
        origin["metadata"] |= said
        outcome.made.append({"id": item.place, **_chat(item, answer), **origin})


def answer(context: Context, item: Item, outcome: Outcome) -> None:
    """Keep the answers of a teacher, each text once."""
    texts: set[str] = set()
    for text in _answers(context, item, outcome):
        if (shown := shown_answer(text).strip()) in texts:
            outcome.set_aside(item, "equal answers", answer=text)
            continue
        texts.add(shown)
        outcome.made.append({"id": item.place, **_chat(item, text), **_origin(context, item)})


_TASKS = {
    "answer": Task("chats.jsonl", (), answer),
    "prefer": Task("preferences.jsonl", ("prefer",), prefer),
    "revise": Task("chats.jsonl", ("critique", "revise"), revise),
    "rate": Task("chats.jsonl", ("rate",), rate),
}


def find_task(config: FeedbackConfig) -> Task:
    """The task that a configuration names."""
    return _TASKS[config.task.kind]


def _answers(context: Context, item: Item, outcome: Outcome) -> list[Answer]:
    """The answers of a record, or sampled ones; empty and unfinished ones are set aside."""
    answers: list[Answer] = []
    for answer in item.answers:
        if shown_answer(answer).strip():
            answers.append(answer)
        else:
            outcome.set_aside(item, "empty answer")
    if item.answers:
        return answers
    settings: AnswersConfig = context.config.answers
    count = settings.count if context.config.task.kind in ("prefer", "answer") else 1
    for number in range(count):
        reply = context.model.reply(
            ChatRequest(
                item.prompt,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                seed=request_seed(context.config.seed, shown_prompt(item.prompt), number),
            )
        )
        if not reply.text.strip():
            outcome.set_aside(item, "empty answer")
        elif not reply.is_complete:
            # It would teach a model to stop in the middle.
            outcome.set_aside(item, "answer is cut off", answer=reply.text)
        else:
            answers.append(reply.text)
    return answers


def _drawn(context: Context, item: Item, count: int, *texts: str) -> list[Principle]:
    """Principles in random order, which depends only on the seed and the texts."""
    return draw_principles(context.principles, count, context.config.seed, shown_prompt(item.prompt), *texts)


def _dialogue(item: Item, answer: str) -> list[dict[str, Any]]:
    prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
    return [*prompt, {"role": "assistant", "content": answer}]


def _chat(item: Item, answer: Answer) -> dict[str, Any]:
    """A chat to train on, in the form of its prompt."""
    if isinstance(item.prompt, str):
        return {"prompt": item.prompt, "completion": answer}
    return {
        "messages": [*item.prompt, *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)]
    }


def _origin(context: Context, item: Item) -> dict[str, Any]:
    """Who answered."""
    return {"metadata": {"answers": "given" if item.answers else context.model.name}}


def _relative(vote: str, winner: str) -> str:
    return "tie" if vote == "tie" else "chosen" if vote == winner else "rejected"
