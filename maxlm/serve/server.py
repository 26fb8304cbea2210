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
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError, UnicodeError):
        raise RequestError(f"{host}:{port} is not an address to listen on; try --host 127.0.0.1 --port 8000") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        hint = (
            "stop what listens there or give another --port" if error.errno == 98 else "give another --host or --port"
        )
        raise RequestError(f"cannot listen on {host}:{port}: {error.strerror}; {hint}") from None
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
