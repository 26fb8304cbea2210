"""The HTTP API: the OpenAI endpoints, votes, health, metrics and the chat page."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from maxlm import __version__
from maxlm.errors import ConfigError, DataError, TokenizerError
from maxlm.generate import request as engine_request
from maxlm.generate.engine import Engine
from maxlm.generate.model import LoadedModel
from maxlm.prompts.answer_formats import AnswerFormat
from maxlm.serve.access import Access, AllowBrowsers, CheckKey, CheckSource
from maxlm.serve.body import StrictRoute
from maxlm.serve.errors import ApiError, add_error_handlers
from maxlm.serve.formats import asking_for
from maxlm.serve.metrics import ServerMetrics
from maxlm.serve.middleware import LimitBody, Observe
from maxlm.serve.page import add_page
from maxlm.serve.replies import ChatReply, CompletionReply, Reply, error_body, usage
from maxlm.serve.running import RunningRequests
from maxlm.serve.schema import ChatBody, CompletionBody, SamplingBody
from maxlm.serve.tools import linked_messages, usable_tools
from maxlm.serve.votes import Votes, add_votes
from maxlm.tokenizer.codec import Tokenizer


def create_app(
    model: LoadedModel,
    engine: Engine,
    *,
    name: str | None = None,
    access: Access | None = None,
    votes: Votes | None = None,
) -> FastAPI:
    """Create the application that serves one model, and its adapters, from one engine; the caller closes the engine.

    Args:
      name: the model's name in the API; None takes the model's own. Adapters have their own.
      access: the access rules; None allows requests to a loopback address, without a key.
      votes: where votes on two answers are kept; None keeps none.
    """
    # FastAPI's built-in API documentation pages load scripts from other hosts.
    app = FastAPI(title="maxlm", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    name = name or model.name
    # The adapter of each name; the first is the model itself.
    served: dict[str, str | None] = {name: None, **{each: each for each in model.adapters}}
    access = access or Access()
    metrics = ServerMetrics(
        slots=lambda: engine.num_slots, active=lambda: engine.num_active, waiting=lambda: engine.num_waiting
    )
    started = int(time.time())
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        adapter = _adapter_of(body.model, served)
        tokenizer = model.tokenizer_of(adapter)
        form = await run_in_threadpool(_form, body)
        tools = await run_in_threadpool(_tools, body, tokenizer)
        prompt_ids = await run_in_threadpool(_chat_ids, body, model, adapter, form, tools)
        seed = _seed(body)
        requests = _engine_requests(
            body,
            [prompt_ids],
            engine.max_length,
            adapter=adapter,
            seed=seed,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            top_tokens=body.top_logprobs or 0,
        )
        running = _submit(engine, requests, metrics, param="messages")
        reply = ChatReply(
            adapter or name,
            tokenizer,
            seed=seed,
            with_logprobs=bool(body.logprobs),
            form=form,
            tools=[tool["function"]["name"] for tool in tools],
        )
        return await _respond(http, body, reply, running, len(prompt_ids))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, http: Request) -> Response:
        adapter = _adapter_of(body.model, served)
        tokenizer = model.tokenizer_of(adapter)
        prompts = await run_in_threadpool(_prompt_ids, body, model, adapter)
        seed = _seed(body)
        requests = _engine_requests(
            body,
            prompts,
            engine.max_length,
            adapter=adapter,
            seed=seed,
            # 16 is the default of the OpenAI API for this endpoint.
            max_tokens=16 if body.max_tokens is None else body.max_tokens,
            top_tokens=body.logprobs or 0,
            score_prompt=bool(body.echo) and (body.logprobs is not None or body.max_tokens == 0),
        )
        running = _submit(engine, requests, metrics, param="prompt")
        echo = [tokenizer.decode(request.prompt_ids) for request in requests] if body.echo else []
        with_logprobs = body.logprobs is not None
        reply = CompletionReply(adapter or name, tokenizer, seed=seed, with_logprobs=with_logprobs, echo=echo)
        return await _respond(http, body, reply, running, sum(map(len, prompts)))

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model_entry(each) for each in served]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict:
        _adapter_of(asked, served)
        return _model_entry(asked)

    @app.get("/health")
    async def health() -> Response:
        if engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": engine.failure}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def scrape() -> Response:
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model_entry(id_: str) -> dict:
        return {
            "id": id_,
            "object": "model",
            "created": started,
            "owned_by": "maxlm",
            "max_model_len": engine.max_length,
            # As vLLM lists adapters.
            **({"parent": name} if served[id_] else {}),
            "takes_votes": votes is not None and not served[id_],
        }

    add_votes(app, votes, model)
    add_page(app)
    # The last one added is the outermost.
    app.add_middleware(LimitBody)
    app.add_middleware(CheckKey, access=access)
    app.add_middleware(AllowBrowsers, access=access)
    app.add_middleware(CheckSource, access=access)
    app.add_middleware(Observe, counter=metrics.requests)
    return app


def _adapter_of(asked: str | None, served: dict[str, str | None]) -> str | None:
    """The adapter that a request names; None: the model itself."""
    if asked is None:
        return None
    if asked not in served:
        message = f"model {asked!r} is not served here; use {' or '.join(map(repr, served))}"
        raise ApiError(message, param="model", code="model_not_found", status=404)
    return served[asked]


def _form(body: ChatBody) -> AnswerFormat | None:
    """The form that answers must have, if there is one; checking a schema may take a while."""
    if body.response_format is None:
        return None
    try:
        return body.response_format.build()
    except ConfigError as error:
        raise ApiError(str(error), param="response_format") from None


def _tools(body: ChatBody, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    try:
        return usable_tools(body.tools, body.tool_choice, tokenizer)
    except DataError as error:
        raise ApiError(str(error), param="tools") from None


def _chat_ids(
    body: ChatBody, model: LoadedModel, adapter: str | None, form: AnswerFormat | None, tools: list[dict]
) -> list[int]:
    try:
        messages = linked_messages([message.to_chat() for message in body.messages])
    except DataError as error:
        raise ApiError(str(error), param="messages") from None
    answering_role = model.tokenizer_of(adapter).answering_role
    ends_with_answer = messages[-1]["role"] == answering_role
    if ends_with_answer and not body.continue_final_message:
        raise ApiError(
            f"the last message is from the {answering_role}, which is to answer; end with another role, or send"
            " continue_final_message: true to continue it",
            param="messages",
        )
    if body.continue_final_message and not ends_with_answer:
        raise ApiError(
            f"continue_final_message needs a last message from the {answering_role}", param="continue_final_message"
        )
    try:
        asked = asking_for(form, messages)
        return model.encode(asked, continue_final=ends_with_answer, tools=tools or None, adapter=adapter)
    except TokenizerError as error:
        raise ApiError(str(error), param="messages") from None
    except ConfigError as error:
        raise ApiError(str(error), param="response_format") from None


def _prompt_ids(body: CompletionBody, model: LoadedModel, adapter: str | None) -> list[list[int]]:
    try:
        return [model.encode(prompt, adapter=adapter) if isinstance(prompt, str) else prompt for prompt in body.prompt]
    except TokenizerError as error:
        raise ApiError(str(error), param="prompt") from None


def _seed(body: SamplingBody) -> int:
    """The requested seed, or a random one that float64 holds exactly, as some JSON parsers have only float64."""
    return secrets.randbits(53) if body.seed is None else body.seed


def _engine_requests(
    body: SamplingBody,
    prompts: list[list[int]],
    max_length: int,
    *,
    adapter: str | None,
    seed: int,
    max_tokens: int | None,
    top_tokens: int,
    score_prompt: bool = False,
) -> list[engine_request.Request]:
    """n requests for each prompt, each with its own random stream and at most as many new tokens as fit the context."""

    def room(prompt: list[int]) -> int | None:
        # If none fits, the engine raises the error.
        return max_tokens and min(max_tokens, max(max_length - len(prompt), 1))

    return [
        engine_request.Request(
            tuple(prompt),
            max_new_tokens=room(prompt),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed,
            stream=(prompt_index, choice_index),
            stop=body.stop,
            top_tokens=top_tokens,
            score_prompt=score_prompt,
            adapter=adapter,
        )
        for prompt_index, prompt in enumerate(prompts)
        for choice_index in range(body.n or 1)
    ]


def _submit(
    engine: Engine, requests: Sequence[engine_request.Request], metrics: ServerMetrics, *, param: str
) -> RunningRequests:
    try:
        return RunningRequests(engine, requests, metrics)
    except engine_request.ContextLengthError as error:
        # Clients recognize this error by its code or by how it begins.
        message = f"This model's maximum context length is {engine.max_length} tokens: {error}"
        raise ApiError(message, param=param, code="context_length_exceeded") from None
    except engine_request.BatchTooLargeError as error:
        raise ApiError(str(error), param="n", code="batch_too_large") from None


async def _respond(http: Request, body: SamplingBody, reply: Reply, running: RunningRequests, num_prompt_tokens: int):
    if body.stream:
        chunks = _stream(reply, running, num_prompt_tokens, include_usage=body.include_usage)
        # Proxies must not buffer chunks.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
    return await _unless_client_leaves(http, _collect(reply, running, num_prompt_tokens))


async def _collect(reply: Reply, running: RunningRequests, num_prompt_tokens: int) -> Response:
    events: dict[int, list[engine_request.Event]] = {}
    async for index, event in running.events():
        if event.finish_reason in ("error", "cancelled"):
            return JSONResponse(_interrupted(event), 503)
        events.setdefault(index, []).append(event)
    choices = [await run_in_threadpool(reply.choice, index, events[index]) for index in sorted(events)]
    return JSONResponse(reply.whole(choices, usage(num_prompt_tokens, running.num_new_tokens)))


async def _stream(
    reply: Reply, running: RunningRequests, num_prompt_tokens: int, *, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, ending with `[DONE]`."""
    opened: set[int] = set()
    async for index, event in running.events():
        if event.finish_reason in ("error", "cancelled"):
            yield _sse(_interrupted(event))
            return
        if index not in opened:
            opened.add(index)
            if opening := reply.opening(index):
                yield _sse(reply.chunk(opening))
        if event.text or event.token or event.prompt or event.finish_reason:
            # The last one may read the whole answer.
            delta = (
                await run_in_threadpool(reply.delta, index, event) if event.finish_reason else reply.delta(index, event)
            )
            yield _sse(reply.chunk([delta]))
    if include_usage:
        yield _sse(reply.chunk([], usage(num_prompt_tokens, running.num_new_tokens)))
    yield "data: [DONE]\n\n"


def _sse(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _interrupted(event: engine_request.Event) -> dict:
    reason = event.error or "the server is shutting down"
    return error_body(f"the answer was interrupted: {reason}", kind="server_error", code="interrupted")


async def _unless_client_leaves(http: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`; cancelled if the client disconnects first."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        # Nobody reads this response, as the client has disconnected; 499 is for the metrics.
        return task.result() if task.done() else Response(status_code=499)
    finally:
        task.cancel()
        leaving.cancel()


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
