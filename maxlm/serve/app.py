"""The HTTP API: the OpenAI endpoints, health, metrics and the chat page."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from maxlm import __version__
from maxlm.errors import MaxlmError
from maxlm.generate import request as engine_request
from maxlm.generate.engine import Engine, EngineStoppedError, QueueFullError
from maxlm.generate.model import LoadedModel
from maxlm.serve.metrics import ServerMetrics
from maxlm.serve.middleware import CountRequests, LimitBody
from maxlm.serve.page import add_page
from maxlm.serve.replies import ChatReply, CompletionReply, error_body, usage
from maxlm.serve.running import RunningRequests
from maxlm.serve.schema import ChatBody, CompletionBody, SamplingBody

MAX_BODY_BYTES = 8 * 1024 * 1024


class UnknownModelError(MaxlmError):
    """A request names a model that is not served here."""


def create_app(model: LoadedModel, engine: Engine) -> FastAPI:
    """The application that serves one model from one engine; the engine stays the caller's to close."""
    # The pages of API documentation that FastAPI adds load scripts from elsewhere.
    app = FastAPI(title="maxlm", version=__version__, docs_url=None, redoc_url=None)
    metrics = ServerMetrics(
        slots=lambda: engine.num_slots, active=lambda: engine.num_active, waiting=lambda: engine.num_waiting
    )
    started = int(time.time())
    _add_error_handlers(app)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        _check_model(body, model)
        prompt_ids = await run_in_threadpool(model.encode, [message.to_chat() for message in body.messages])
        top_tokens = body.top_logprobs or 0
        requests = _engine_requests(body, [prompt_ids], body.max_completion_tokens or body.max_tokens, top_tokens)
        reply = ChatReply(model.name, model.tokenizer, with_logprobs=bool(body.logprobs))
        return await _respond(http, body, reply, RunningRequests(engine, requests, metrics), len(prompt_ids))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, http: Request) -> Response:
        _check_model(body, model)
        prompts = await run_in_threadpool(
            lambda: [model.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        )
        # 16 is the default of the OpenAI API for this endpoint.
        requests = _engine_requests(body, prompts, body.max_tokens or 16, body.logprobs or 0)
        reply = CompletionReply(model.name, model.tokenizer, with_logprobs=body.logprobs is not None)
        num_prompt_tokens = sum(map(len, prompts))
        return await _respond(http, body, reply, RunningRequests(engine, requests, metrics), num_prompt_tokens)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model_entry()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        if name != model.name:
            raise UnknownModelError(f"model {name!r} is not served here; there is {model.name!r}")
        return _model_entry()

    @app.get("/health")
    async def health() -> Response:
        if engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": engine.failure}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def scrape() -> Response:
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model_entry() -> dict:
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "maxlm",
            "max_model_len": engine.max_length,
        }

    add_page(app)
    app.add_middleware(LimitBody, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(CountRequests, counter=metrics.requests)
    return app


def _engine_requests(
    body: SamplingBody, prompts: list[list[int]], max_new_tokens: int | None, top_tokens: int
) -> list[engine_request.Request]:
    """n requests for each prompt; choice i samples with seed + i."""
    seed = secrets.randbits(63) if body.seed is None else body.seed
    choices = body.n or 1
    return [
        engine_request.Request(
            tuple(prompt),
            max_new_tokens=max_new_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed + choice,
            stop=body.stop_strings,
            top_tokens=top_tokens,
        )
        for prompt in prompts
        for choice in range(choices)
    ]


def _check_model(body: SamplingBody, model: LoadedModel) -> None:
    if body.model is not None and body.model != model.name:
        raise UnknownModelError(f"model {body.model!r} is not served here; there is {model.name!r}")


async def _respond(
    http: Request, body: SamplingBody, reply: CompletionReply, running: RunningRequests, num_prompt_tokens: int
) -> Response:
    if body.stream:
        chunks = _stream(reply, running, num_prompt_tokens, include_usage=body.include_usage)
        # Proxies must hand each chunk on at once.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
    return await _unless_client_leaves(http, _collect(reply, running, num_prompt_tokens))


async def _collect(reply: CompletionReply, running: RunningRequests, num_prompt_tokens: int) -> Response:
    texts, tokens, reasons = {}, {}, {}
    async for index, event in running.events():
        if event.finish_reason in ("error", "cancelled"):
            return JSONResponse(_interrupted(event), 503)
        texts[index] = texts.get(index, "") + event.text
        if event.token is not None:
            tokens.setdefault(index, []).append(event.token)
        reasons[index] = event.finish_reason
    choices = [reply.choice(index, texts[index], tokens.get(index, ()), reasons[index]) for index in sorted(texts)]
    return JSONResponse(reply.whole(choices, usage(num_prompt_tokens, running.num_new_tokens)))


async def _stream(
    reply: CompletionReply, running: RunningRequests, num_prompt_tokens: int, *, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, `[DONE]` at the end."""
    opened: set[int] = set()
    async for index, event in running.events():
        if event.finish_reason in ("error", "cancelled"):
            yield _sse(_interrupted(event))
            return
        if index not in opened:
            opened.add(index)
            if opening := reply.opening(index):
                yield _sse(reply.chunk(opening))
        if event.text or event.token or event.finish_reason:
            tokens = () if event.token is None else (event.token,)
            yield _sse(reply.chunk([reply.delta(index, event.text, tokens, event.finish_reason)]))
    if include_usage:
        yield _sse(reply.chunk([], usage(num_prompt_tokens, running.num_new_tokens)))
    yield "data: [DONE]\n\n"


def _sse(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _interrupted(event: engine_request.Event) -> dict:
    reason = event.error or "the server is shutting down"
    return error_body(f"the answer was interrupted: {reason}", kind="server_error", code="interrupted")


async def _unless_client_leaves(http: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`, which is cancelled if the client closes the connection first."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        # Nobody reads what is sent to a client that left; 499 is for the metrics.
        return task.result() if task.done() else Response(status_code=499)
    finally:
        task.cancel()
        leaving.cancel()


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI) -> None:
    """Every error has the shape that clients of the OpenAI API expect."""

    def handle(kind: type[Exception]) -> Callable:
        return app.exception_handler(kind)

    @handle(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        if "json" not in http.headers.get("content-type", ""):
            message = "send the body as JSON, with the header Content-Type: application/json"
            return JSONResponse(error_body(message), 400)
        problems = [_describe(item) for item in error.errors()]
        message = "; ".join(f"{param}: {told}" if param else told for param, told in problems)
        return JSONResponse(error_body(message, param=problems[0][0]), 400)

    @handle(UnknownModelError)
    async def unknown_model(_: Request, error: UnknownModelError) -> Response:
        return JSONResponse(error_body(str(error), param="model", code="model_not_found"), 404)

    @handle(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> Response:
        body = error_body(str(error), kind="rate_limit_error", code="queue_full")
        return JSONResponse(body, 429, headers={"Retry-After": "1"})

    @handle(MaxlmError)
    async def impossible(_: Request, error: MaxlmError) -> Response:
        return JSONResponse(error_body(str(error)), 400)

    @handle(EngineStoppedError)
    async def stopped(_: Request, error: EngineStoppedError) -> Response:
        return JSONResponse(error_body(str(error), kind="server_error"), 503)

    @handle(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}"
        return JSONResponse(error_body(message), error.status_code, headers=error.headers)

    @handle(Exception)
    async def our_mistake(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(f"internal error: {type(error).__name__}", kind="server_error"), 500)


def _describe(item: dict) -> tuple[str | None, str]:
    """(dotted path of the field, what is wrong with it) for one of pydantic's errors."""
    if item["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {item.get('ctx', {}).get('error', item['msg'])}"
    path = [str(part) for part in item["loc"][1:] if not str(part).startswith(("list[", "function-", "constrained-"))]
    told = "this field is unknown" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
    return ".".join(path) or None, told
