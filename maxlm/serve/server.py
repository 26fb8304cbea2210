"""Bind a port, and run the application until a signal."""

import ipaddress
import signal
import socket

import uvicorn
from fastapi import FastAPI

from maxlm.errors import RequestError
from maxlm.serve.connection import BoundedConnection

DRAIN_SECONDS = 30


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 picks a free one.

    Raises:
      RequestError: the port is in use, or the address does not belong to this machine.
    """
    if not 0 <= port <= 65535:
        raise RequestError(f"cannot listen on port {port}: ports are 0 to 65535; try --port 8000")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError):
        raise RequestError(f"cannot listen on {host!r}: not an address of this machine; try --host 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise RequestError(
            f"cannot listen on {host}:{port}: {error.strerror}; use another --port or stop what listens there"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def address_of(listener: socket.socket) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])


def server_of(app: FastAPI) -> uvicorn.Server:
    """A server with connection timeouts; it logs only its own faults."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=BoundedConnection,
        ws="none",
        lifespan="off",
        log_level="error",
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=30,
    )
    return uvicorn.Server(config)


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then accept no new requests, finish the running ones, and return."""
    # uvicorn re-raises the signal once it has drained; here that is a normal exit, not an error.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server_of(app).run(sockets=[listener])
