"""`maxlm feedback`: a judge's feedback on the answers to a file of prompts, as training data."""

import json
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from etils import epath

from maxlm.config.feedback import (
    AnyChatModel,
    ConstitutionConfig,
    EndpointConfig,
    FeedbackConfig,
    LocalModelConfig,
    Principle,
)
from maxlm.config.load import load_config
from maxlm.config.recipes import find_config
from maxlm.errors import ConfigError, DataError, FaultError, RequestError
from maxlm.feedback.records import Item, read_items
from maxlm.feedback.tasks import Context, Outcome, find_task
from maxlm.runtime.manifest import FILE_NAME as MANIFEST
from maxlm.runtime.manifest import content_hash, write_manifest
from maxlm.runtime.output import check_output
from maxlm.runtime.progress import progress_bar
from maxlm.runtime.storage import locked, storage_path
from maxlm.scoring.chat_models import ChatModel, LocalChatModel, in_threads
from maxlm.scoring.judge import Judge, position_bias, usable_principles
from maxlm.scoring.ledger import Ledger
from maxlm.scoring.reply_log import RecordedModel, ReplyLog

REPLIES, ASIDE = "replies.jsonl", "aside.jsonl"
# The share of failures is judged over at least so many records.
_ENOUGH_RECORDS = 100


def run_feedback(config: FeedbackConfig) -> dict[str, Any]:
    """Ask for feedback on each record; write the data, what was left out, all replies and the manifest.

    The output is the same function of settings, records and replies in every run. Replies are recorded as they arrive,
    so that a rerun asks only for what is missing.

    Returns:
      The summary: counts, the shares of the judge's verdicts, requests, tokens and cost.

    Raises:
      ConfigError, DataError: a setting or a record is wrong; nothing was sent.
      RequestError: an endpoint refuses all requests, or a limit is reached; what is done is written.
      FaultError: too many records have no usable reply; what is done is written.
    """
    check_output(config.output, "feedback")
    output = storage_path(config.output)
    constitution = None if config.constitution is None else load_config(config.constitution, kind="constitution")
    items = read_items(config.records, config)
    if config.model is None and (bare := next((item for item in items if not item.answers), None)):
        raise DataError(f"{bare.place}: has no answer; set model, which answers such prompts, or add answers")
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, seconds=0) as is_mine:
        if not is_mine:
            raise ConfigError([f"output: another process writes {config.output}; wait for it, or stop it"])
        log = ReplyLog(output / REPLIES)
        limits = config.limits
        ledger = Ledger(
            cost=log.cost, requests=log.requests, max_cost=limits.max_cost, max_requests=limits.max_requests
        )
        stopping = threading.Event()
        sections = [section for section in (config.judge, config.model) if section is not None]
        sections = sections[:1] if sections[0] == sections[-1] else sections
        outcomes: dict[int, Outcome] = {}
        with ExitStack() as stack:
            models = [RecordedModel(_open(section, ledger, stopping), log) for section in sections]
            for model in models:
                stack.enter_context(closing(model))
            judge = None if constitution is None else _judge(config, constitution, models[0])
            principles = () if constitution is None else _principles(config, constitution)
            context = Context(config, principles, judge, None if config.model is None else models[-1])
            # It would describe other files than those that are written now.
            (output / MANIFEST).unlink(missing_ok=True)
            try:
                _ask(context, items, outcomes, ledger, stopping)
            except (RequestError, FaultError) as error:
                done = sum(not outcome.failed for outcome in outcomes.values())
                raise type(error)(
                    f"{error}; {done} of {len(items)} records are done, and kept in {config.output}: run the same"
                    " command to go on"
                ) from None
            finally:
                _write(output, config, outcomes)
        summary = _summary(outcomes, models, ledger)
        write_manifest(
            output,
            stage=f"feedback/{config.task.kind}",
            inputs=_inputs(config),
            config=config.model_dump(mode="json")
            | ({} if constitution is None else {"principles": constitution.model_dump(mode="json")["principles"]}),
            metrics=summary,
        )
    return summary


def _inputs(config: FeedbackConfig) -> dict[str, str | Path]:
    inputs: dict[str, str | Path] = {"records": config.records}
    if config.constitution is not None:
        inputs["constitution"] = find_config(config.constitution)
    for name, section in (("judge", config.judge), ("model", config.model)):
        if isinstance(section, LocalModelConfig):
            inputs[name] = section.path
    return inputs


def _open(section: AnyChatModel, ledger: Ledger, stopping: threading.Event) -> ChatModel:
    if isinstance(section, EndpointConfig):
        # Here, since it imports an HTTP client, which local models do not need.
        from maxlm.scoring.chat_endpoint import ChatEndpoint

        return ChatEndpoint(section, ledger=ledger, stopping=stopping)
    hashed = content_hash(section.path)
    return LocalChatModel(section.path, content_hash=hashed, concurrent=section.concurrent, ledger=ledger)


def _principles(config: FeedbackConfig, constitution: ConstitutionConfig) -> tuple[Principle, ...]:
    """The principles that the task can use.

    Raises:
      ConfigError: there is none, or there are fewer than votes, and no sampling.
    """
    settings: Any = config.task
    task = find_task(config)
    principles = usable_principles(constitution, task.asks)
    if not principles:
        raise ConfigError(
            [f"{config.constitution}: no principle has {' and '.join(task.asks)}, which {settings.kind} asks"]
        )
    votes = getattr(settings, "votes", 1)
    if votes > len(principles) and settings.temperature == 0:
        raise ConfigError(
            [
                f"task.votes: {votes} votes under {len(principles)} principles repeat one, and without sampling its"
                " verdict too; set task.temperature above 0, add principles, or lower task.votes"
            ]
        )
    return principles


def _judge(config: FeedbackConfig, constitution: ConstitutionConfig, model: ChatModel) -> Judge:
    settings: Any = config.task
    return Judge(
        model,
        constitution.prompts,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=config.seed,
        where=f"{config.constitution}: prompts",
    )


def _ask(
    context: Context, items: Sequence[Item], outcomes: dict[int, Outcome], ledger: Ledger, stopping: threading.Event
) -> None:
    """Fill `outcomes` by index, until all are there or too many have failed."""
    most = context.config.limits.max_failed_fraction
    asked = [context.model, None if context.judge is None else context.judge.model]
    workers = max(model.concurrent for model in asked if model is not None)
    failed = 0
    with (
        progress_bar("feedback", len(items)) as (progress, bar),
        closing(in_threads(context.perform, items, workers=workers, stopping=stopping)) as results,
    ):
        for index, outcome in results:
            outcomes[index] = outcome
            failed += outcome.failed
            progress.update(bar, advance=1, note=f"cost {ledger.cost:.4g}" if ledger.cost else "")
            enough = min(max(len(outcomes), _ENOUGH_RECORDS), len(items))
            if outcome.failed and failed > most * enough:
                aside = outcome.aside[-1]
                last = f"{aside['place']}: {aside.get('detail', aside['reason'])}"
                raise FaultError(
                    f"{failed} of {len(outcomes)} records have no usable reply, which is above"
                    f" limits.max_failed_fraction={most:g} of {enough}; the last is {last}"
                )


def _write(output: epath.Path, config: FeedbackConfig, outcomes: dict[int, Outcome]) -> None:
    """Replace the files of data and of what was left out, in the order of the records."""
    ordered = [outcomes[index] for index in sorted(outcomes)]
    for name, lines in (
        (find_task(config).file_name, (line for outcome in ordered for line in outcome.made)),
        (ASIDE, (line for outcome in ordered for line in outcome.aside)),
    ):
        temporary = output / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        temporary.replace(output / name)


def _summary(outcomes: dict[int, Outcome], models: Sequence[RecordedModel], ledger: Ledger) -> dict[str, Any]:
    found = list(outcomes.values())
    verdicts = [verdict for outcome in found for verdict in outcome.verdicts]
    summary: dict[str, Any] = {
        "records": len(found),
        "made": sum(len(outcome.made) for outcome in found),
        "aside": dict(Counter(line["reason"] for outcome in found for line in outcome.aside).most_common()),
        "failed": sum(outcome.failed for outcome in found),
        "unreadable": sum(outcome.unreadable for outcome in found),
    }
    if verdicts:
        confidences = [verdict.confidence for verdict in verdicts]
        summary |= {**position_bias(verdicts), "mean_confidence": sum(confidences) / len(confidences)}
    return summary | {
        "replies": sum(model.replies for model in models),
        "replies_from_log": sum(model.from_log for model in models),
        "retries": sum(model.retries for model in models),
        "prompt_tokens": sum(model.prompt_tokens for model in models),
        "completion_tokens": sum(model.completion_tokens for model in models),
        "requests_total": ledger.requests,
        "cost_total": ledger.cost,
    }
