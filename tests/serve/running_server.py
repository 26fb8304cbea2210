"""A real server on a free loopback port, and helpers to read from it."""

import json
import threading
import time
from contextlib import contextmanager

from maxlm.serve import server as serving
from maxlm.serve.app import create_app


@contextmanager
def serve(model, *, num_slots=4, max_waiting=16, **settings):
    """Run a server until the block ends; gives its address and engine. `settings` go to `create_app`."""
    listener = serving.bind("127.0.0.1", 0)
    with model.engine(num_slots=num_slots, max_waiting=max_waiting) as engine:
        server = serving.server_of(create_app(model, engine, **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield serving.url_of(listener), engine
        finally:
            server.should_exit = True
            thread.join()


def sse_events(text):
    """Bodies of server-sent events, and whether the stream ended with [DONE]."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(item) for item in data if item != "[DONE]"], data[-1] == "[DONE]"


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)
