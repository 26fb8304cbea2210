"""A real HTTP server on a loopback port that plays a judge, well or badly."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, *, usage=(10, 5), finish_reason="stop", **more):
    """Status, headers and content of a chat completion."""
    tree = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": usage and {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
        **more,
    }
    return 200, {"content-type": "application/json"}, json.dumps(tree).encode()


def failure(status, message="no", **headers):
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, message.encode()


class JudgeServer:
    """`reply(body, number)` gives the reply to a request: a completion, a failure, or None to break the connection.

    Content may be an iterator of bytes, which are sent as they come.
    """

    def __init__(self):
        self.reply = lambda body, number: completion("fine")
        self.bodies, self.headers, self.paths, self.times = [], [], [], []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    def receive(self, path, headers, body):
        with self.lock:
            self.paths.append(path)
            self.headers.append(headers)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            return len(self.bodies) - 1


def _handler(server: JudgeServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            number = server.receive(self.path, dict(self.headers.items()), body)
            try:
                found = server.reply(body, number)
                if found is None:
                    self.close_connection = True
                    return
                self.send(*found)
            except OSError:
                self.close_connection = True  # the client is gone
            finally:
                with server.lock:
                    server.running -= 1

        def send(self, status, headers, content):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if isinstance(content, bytes):
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return
            self.send_header("connection", "close")
            self.end_headers()
            for piece in content:
                self.wfile.write(piece)
                self.wfile.flush()
            self.close_connection = True

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def judge_server():
    """Runs a `JudgeServer` until the block ends; gives it with its `base_url`."""
    judge = JudgeServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(judge))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    judge.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
