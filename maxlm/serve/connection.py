"""Connections with timeouts against slow or stalled clients."""

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from maxlm.serve.middleware import log, request_id
from maxlm.serve.replies import error_body

# How long a client may take to send a request's head, and to read what has been written to it.
HEAD_SECONDS = 20.0
READ_SECONDS = 20.0
TICK_SECONDS = 1.0


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with more timeouts; uvicorn itself only has the keep-alive timeout.

    Once a second it checks what the connection is waiting for. One that waits too long for its client is aborted,
    which cancels the response in progress. (`LimitBody` has the timeout for bodies.)
    """

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._waits_for: tuple[str, object] | None = None
        self._seconds = 0.0
        self._tick()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ticking.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Shut down: complete requests are answered, incomplete ones are dropped."""
        super().shutdown()
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Like uvicorn's, in the format of all other errors."""
        id_ = request_id()
        log.info("%s %s sent an invalid HTTP request: 400", id_, self.client[0] if self.client else "-")
        response = JSONResponse(error_body("this is not a valid HTTP/1.1 request"), 400)
        headers = [*response.raw_headers, (b"connection", b"close"), (b"x-request-id", id_.encode())]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _tick(self) -> None:
        limits = {"head": HEAD_SECONDS, "reading": READ_SECONDS}
        waits_for = self._wait()
        self._seconds = self._seconds + TICK_SECONDS if waits_for == self._waits_for else 0.0
        self._waits_for = waits_for
        if waits_for is not None and self._seconds >= limits[waits_for[0]]:
            self.transport.abort()
        else:
            self._ticking = self.loop.call_later(TICK_SECONDS, self._tick)

    def _wait(self) -> tuple[str, object] | None:
        """What the connection waits for, and the request, which distinguishes this wait from the next of its kind."""
        if self.transport.is_closing() or self.flow.write_paused:
            return "reading", self.cycle
        is_between = self.cycle is None or self.cycle.response_complete
        if is_between and self.timeout_keep_alive_task is None:
            return "head", self.cycle
        return None
