"""Error responses in the format of the OpenAI API, from every part of the server."""

from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from maxlm.errors import MaxlmError, RequestError
from maxlm.generate.request import EngineStoppedError, QueueFullError
from maxlm.serve.replies import error_body


class ApiError(RequestError):
    """An error response with the field at fault and a machine-readable code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers that turn exceptions of the routes into responses."""

    def handle(kind: type[Exception]) -> Callable:
        return app.exception_handler(kind)

    @handle(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        if "json" not in http.headers.get("content-type", ""):
            message = "send the body as JSON, with the header Content-Type: application/json"
            return JSONResponse(error_body(message), 400)
        problems = [_describe(item) for item in error.errors()]
        return JSONResponse(error_body("; ".join(message for _, message in problems), param=problems[0][0]), 400)

    @handle(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> Response:
        body = error_body(str(error), kind="rate_limit_error", code="queue_full")
        return JSONResponse(body, 429, headers={"Retry-After": "1"})

    @handle(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error_body(str(error), param=error.param, code=error.code), error.status)

    @handle(MaxlmError)
    async def impossible(_: Request, error: MaxlmError) -> Response:
        return JSONResponse(error_body(str(error)), 400)

    @handle(EngineStoppedError)
    async def stopped(_: Request, error: EngineStoppedError) -> Response:
        return JSONResponse(error_body(str(error), kind="server_error"), 503)

    @handle(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        problem = {404: "there is no such path", 405: "this path does not support the method"}.get(
            error.status_code, error.detail
        )
        hint = "; the API is POST /v1/chat/completions, POST /v1/completions and GET /v1/models"
        message = f"{http.method} {http.url.path}: {problem}{hint if error.status_code in (404, 405) else ''}"
        return JSONResponse(error_body(message), error.status_code, headers=error.headers)


def _describe(item: dict) -> tuple[str | None, str]:
    """(dotted path of the field, what is wrong with it) for one of pydantic's errors."""
    context = item.get("ctx", {})
    if item["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {context.get('error', item['msg'])}"
    path = ".".join(str(part) for part in item["loc"][1:])
    if item["type"] == "fields":
        return context["field"], f"{context['field']} {context['problem']}"
    if item["type"] == "not_supported":
        return path, f"{path} {item['msg']}"
    problem = "unknown field" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
    return path or None, f"{path}: {problem}" if path else problem
