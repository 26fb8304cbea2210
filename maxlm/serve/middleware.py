"""What surrounds every request: counting, and a limit on bodies. Plain ASGI, so that streams pass untouched."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maxlm.serve.metrics import Counter
from maxlm.serve.replies import error_body

_COUNTED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/")


class CountRequests:
    """Counts answers by path and status; paths that do not exist share one label."""

    def __init__(self, app: ASGIApp, *, counter: Counter):
        self._app, self._counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _COUNTED_PATHS else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counter.add(path=path, status=str(message["status"]))
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        except Exception:
            self._counter.add(path=path, status="500")
            raise


class LimitBody:
    """Answers 413 to a body of more than `max_bytes`, before it is held in memory."""

    def __init__(self, app: ASGIApp, *, max_bytes: int):
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        # A body sent in chunks declares no length: it is read here, and handed on whole.
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body is larger than {self._max_bytes} bytes"
        await JSONResponse(error_body(message), 413, headers={"Connection": "close"})(scope, receive, send)
