"""Middleware of every request: its id, its log line, metrics, and a limit on bodies.

Plain ASGI, so that streams are not buffered.
"""

import asyncio
import logging
import re
import time
import uuid

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maxlm.serve.access import header
from maxlm.serve.metrics import Counter
from maxlm.serve.replies import error_body

MAX_BODY_BYTES = 8 * 1024 * 1024
# How long a body may take to arrive, and how long to drain a rejected one.
BODY_SECONDS = 60.0
REFUSED_BODY_SECONDS = 2.0

_COUNTED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/votes", "/health", "/metrics", "/")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

log = logging.getLogger("maxlm.serve")


def request_id(given: str = "") -> str:
    """The client's request id, or a new one if that is missing or unsafe to log."""
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class Observe:
    """Give every request an id, count responses by path and status, and log one line for each.

    Nonexistent paths share one label. HEAD is handled as GET; the HTTP layer drops the body. An uncaught exception is
    logged with its traceback and answered with 500.
    """

    def __init__(self, app: ASGIApp, *, counter: Counter):
        self._app, self._counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        id_, started, status = request_id(header(scope, b"x-request-id")), time.perf_counter(), None

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id_.encode())]}
            await send(message)

        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        try:
            await self._app({**scope, "method": method}, receive, observed_send)
        except Exception as error:
            log.exception("%s failed: %s", id_, error)
            if status is None:
                body = error_body(f"internal error: {type(error).__name__}", kind="server_error")
                await JSONResponse(body, 500)(scope, receive, observed_send)
        finally:
            path = scope["path"] if scope["path"] in _COUNTED_PATHS else "other"
            if status is not None:
                self._counter.add(path=path, status=str(status))
            asked = f"{scope['method']} {scope['raw_path'].decode('ascii', 'backslashreplace'):.200}"
            client = scope["client"][0] if scope["client"] else "-"
            # The chat page calls this for every piece of an answer.
            level = logging.DEBUG if scope["path"] == "/render" else logging.INFO
            log.log(level, "%s %s %s %s %.3f s", id_, client, asked, status or "-", time.perf_counter() - started)


class LimitBody:
    """Answer 413 to a body of more than MAX_BODY_BYTES, before it is held in memory, and 408 to a slow one."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await self._app(scope, receive, send)
            return
        declared = header(scope, b"content-length")
        if declared.isdigit() and int(declared[:20]) > MAX_BODY_BYTES:
            await self._refuse(413, scope, receive, send)
            return
        # A chunked body declares no length: it is read here and passed on whole.
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY_BYTES:
                        break
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            await self._refuse(408, scope, receive, send)
            return
        if len(body) > MAX_BODY_BYTES:
            await self._refuse(413, scope, receive, send)
            return
        pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        message = {
            408: f"the body did not arrive in full within {BODY_SECONDS:g} seconds",
            413: f"the body is larger than {MAX_BODY_BYTES} bytes",
        }[status]
        response = JSONResponse(error_body(message), status, headers={"Connection": "close"})
        await send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        # Closing a connection with unread data resets it, and the client may lose the response: drain it first.
        try:
            async with asyncio.timeout(REFUSED_BODY_SECONDS):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body"})
