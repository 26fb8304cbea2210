"""Access control: host names that the server answers to, origins that may call it, and an API key.

A browser sends requests wherever a page's scripts direct them. A foreign page can reach a server on this machine by
resolving its own name to 127.0.0.1 (DNS rebinding), which shows in the Host header, or by a cross-origin request,
which shows in the Origin header.
"""

import ipaddress
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maxlm.errors import RequestError
from maxlm.serve.replies import error_body

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Paths that need no key: the page, because it asks for the key, and the health check.
_OPEN_PATHS = ("/", "/health")


@dataclass(frozen=True)
class Access:
    """Access rules of the server.

    hosts: host names and addresses to answer to, besides those of the loopback; "*" allows any.
    any_address: whether to answer to any IP address, as on a server that listens on all of a machine's
      addresses. DNS rebinding needs a name, so an address is safe.
    origins: other origins whose web pages may call the API; "*" allows any.
    api_key: the key in `Authorization: Bearer ...`; None requires no key.

    Raises:
      RequestError: a host, an origin or the key is malformed.
    """

    hosts: tuple[str, ...] = ()
    any_address: bool = False
    origins: tuple[str, ...] = ()
    api_key: str | None = None

    def __post_init__(self):
        for host in self.hosts:
            if host != "*" and _hostname(host) is None:
                raise RequestError(f"--allowed-host {host!r} is not a name such as llm.example.com, or * for any")
        for origin in self.origins:
            parts = _split(origin)
            if origin not in ("*", "null") and (parts is None or origin != f"{parts.scheme}://{parts.netloc}"):
                raise RequestError(f"--cors {origin!r} is not an origin such as https://example.com, or * for any")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise RequestError("the API key is empty or has characters not allowed in a header; use letters and digits")
        if self.api_key is not None and " " in self.api_key:
            raise RequestError("the API key contains a space; use letters and digits")

    def takes_host(self, header: str) -> bool:
        """Whether this Host header names this server."""
        host = _hostname(header)
        if host is None:
            return False
        allowed = (*_LOOPBACK, *(_hostname(one) for one in self.hosts))
        return "*" in self.hosts or host in allowed or (self.any_address and _is_address(host))

    def lists_origin(self, origin: str) -> bool:
        """Whether pages of this origin may read responses."""
        return "*" in self.origins or origin in self.origins

    def takes_origin(self, origin: str) -> bool:
        """Whether this Origin header is the server's own page or a listed origin."""
        parts = _split(origin)
        is_own = parts is not None and parts.scheme in ("http", "https") and self.takes_host(parts.netloc)
        return is_own or self.lists_origin(origin)

    def takes_key(self, authorization: str) -> bool:
        """Whether the Authorization header holds the key; constant-time comparison."""
        scheme, _, given = authorization.partition(" ")
        is_equal = secrets.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.api_key.encode())
        return is_equal and scheme.lower() == "bearer"


class CheckSource:
    """Reject requests addressed to another host, or from pages of an unlisted origin."""

    def __init__(self, app: ASGIApp, *, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, origin = header(scope, b"host"), header(scope, b"origin")
        # A request without Host is HTTP/1.0, so not from a browser.
        if host and not self._access.takes_host(host):
            remedy = "start the server with --allowed-host NAME to make it answer to that name"
            await _refuse(f"this server is not {host!r}; {remedy}", code="host_not_allowed")(scope, receive, send)
        elif origin and not self._access.takes_origin(origin):
            remedy = "start the server with --cors ORIGIN to allow them"
            message = f"pages of {origin!r} may not call this server; {remedy}"
            await _refuse(message, code="origin_not_allowed")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class AllowBrowsers:
    """CORS: add the headers that let listed origins read responses, and answer preflight requests."""

    def __init__(self, app: ASGIApp, *, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = header(scope, b"origin")
        if not origin or not self._access.lists_origin(origin):
            await self._app(scope, receive, send)
            return
        allowed = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "x-request-id",
            "Vary": "Origin",
        }
        if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method"):
            allowed |= {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": header(scope, b"access-control-request-headers") or "*",
                "Access-Control-Allow-Private-Network": "true",
                "Access-Control-Max-Age": "600",
            }
            await Response(status_code=204, headers=allowed)(scope, receive, send)
            return
        added = [(name.lower().encode(), value.encode("latin-1")) for name, value in allowed.items()]

        async def allowing_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._app(scope, receive, allowing_send)


class CheckKey:
    """Require the API key, if one is set, on all paths except the page's and `/health`."""

    def __init__(self, app: ASGIApp, *, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["path"] in _OPEN_PATHS or scope["path"].startswith("/static/")
        given = header(scope, b"authorization")
        if self._access.api_key is None or is_open or self._access.takes_key(given):
            await self._app(scope, receive, send)
            return
        what = "the API key is wrong" if given else "this server requires an API key"
        message = f"{what}; send the header Authorization: Bearer KEY"
        body = error_body(message, code="invalid_api_key")
        await JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)


def header(scope: Scope, name: bytes) -> str:
    """A header of a request; empty if missing."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _refuse(message: str, *, code: str) -> Response:
    return JSONResponse(error_body(message, kind="permission_error", code=code), 403)


def _split(url: str):
    try:
        parts = urlsplit(url)
        return parts if parts.scheme and parts.hostname and parts.port != 0 else None
    except ValueError:
        return None


def _hostname(netloc: str) -> str | None:
    """The host of `host:port` in canonical form, without brackets; None if it is not valid."""
    parts = _split(f"http://{netloc}") or _split(f"http://[{netloc}]")
    if parts is None or parts.netloc.strip("[]") != netloc.strip("[]") or "@" in netloc:
        return None
    host = parts.hostname.rstrip(".")
    return str(ipaddress.ip_address(host)) if _is_address(host) else host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False
