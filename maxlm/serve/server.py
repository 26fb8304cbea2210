"""Binding a port, and running the application until a signal."""

import asyncio
import signal
import socket

import uvicorn
from fastapi import FastAPI

from maxlm.errors import RequestError

DRAIN_SECONDS = 30


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
      RequestError: the port is in use, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise RequestError(f"cannot listen on port {port}: ports go from 0 to 65535; try --port 8000")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, ValueError):
        raise RequestError(f"cannot listen on {host!r}: not an address of this machine; try --host 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise RequestError(
            f"cannot listen on {host}:{port}: {error.strerror}; give another --port or stop what listens there"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then take no new requests, finish those that run, and return."""
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=DRAIN_SECONDS, timeout_keep_alive=30, lifespan="off"
    )
    # uvicorn raises the signal again once it has drained; here that is the end of the work, not an error.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
