"""The chat page on a server with scripted responses."""

import json
import threading
import time
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from maxlm.serve import server as serving
from maxlm.serve.page import add_page
from maxlm.serve.replies import error_body


def sse(content="", *, finish=None, usage=None, index=0):
    choices = [{"index": index, "delta": {"content": content}, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n".encode()


def answer(*pieces, finish="stop", total_tokens=9):
    """The bytes of a stream with the text `pieces`."""
    ending = sse(finish=finish, usage={"completion_tokens": len(pieces), "total_tokens": total_tokens})
    return [*map(sse, pieces), ending, b"data: [DONE]\n\n"]


def two_answers(first, second, finish="stop"):
    """The bytes of a stream of two choices."""
    parts = [sse(text, index=index) for index, text in enumerate((first, second))]
    return [*parts, *(sse(finish=finish, index=index) for index in (0, 1)), b"data: [DONE]\n\n"]


def failure(status, message, **fields):
    return JSONResponse(error_body(message, **fields), status)


class Script:
    """`reply(body)` returns a response, or a list of bytes to stream; in the list, a number is a pause in seconds,
    None waits for `go_on`, and an exception aborts the connection.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.reply = lambda body: answer("fine")
        self.bodies = []  # of all requests
        self.votes = []  # bodies of all votes
        self.refuse_vote = None  # a response to the next vote, instead of taking it
        self.key = None
        self.renderings = []  # body length of each render request
        self.go_on = threading.Event()


def create_scripted_app(script):
    app = FastAPI()

    @app.middleware("http")
    async def check_and_note(http, call_next):
        asks_for_key = http.url.path.startswith("/v1") or http.url.path == "/render"
        if script.key and asks_for_key and http.headers.get("authorization") != f"Bearer {script.key}":
            return failure(401, "this server requires an API key", code="invalid_api_key")
        if http.url.path == "/render":
            script.renderings.append(int(http.headers["content-length"]))
        return await call_next(http)

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": "scripted", "max_model_len": 128, "takes_votes": True}]}

    @app.post("/v1/chat/completions")
    async def chat(http: Request):
        body = await http.json()
        script.bodies.append(body)
        reply = script.reply(body)
        return (
            reply if isinstance(reply, JSONResponse) else StreamingResponse(play(reply), media_type="text/event-stream")
        )

    @app.post("/v1/votes")
    async def vote(http: Request):
        refusal, script.refuse_vote = script.refuse_vote, None
        if refusal is not None:
            return refusal
        script.votes.append(await http.json())
        return {"object": "vote", "votes": len(script.votes)}

    def play(pieces):
        for piece in pieces:
            if piece is None:
                script.go_on.wait(20)
                script.go_on.clear()
            elif isinstance(piece, bytes):
                yield piece
            elif isinstance(piece, Exception):
                raise piece
            else:
                time.sleep(piece)

    add_page(app)
    return app


@contextmanager
def serve_script(script):
    listener = serving.bind("127.0.0.1", 0)
    config = uvicorn.Config(
        create_scripted_app(script), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield serving.url_of(listener)
    finally:
        script.go_on.set()
        server.should_exit = True
        thread.join()
