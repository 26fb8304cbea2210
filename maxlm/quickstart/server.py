"""Ask questions to a server in its own process."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxlm.errors import RequestError

START_SECONDS = 120


def ask_server(model: Path, questions: Sequence[str]) -> list[dict[str, Any]]:
    """Start `maxlm serve`, stream an answer to each question from it, and stop it.

    Returns:
      For each question reply: the text; events: the number of chunks; seconds: from request to last chunk.

    Raises:
      RequestError: the server did not start, or it failed.
    """
    command = [sys.executable, "-m", "maxlm.cli", "serve", str(model), "--port", "0", "--quiet"]
    # Ignore a key that the user has set for their own servers.
    environment = {name: value for name, value in os.environ.items() if name != "MAXLM_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        # A server that never prints its address is killed, which ends the wait for it.
        watch = threading.Timer(START_SECONDS, process.terminate)
        watch.daemon = True  # Ctrl-C does not wait for it either
        watch.start()
        found = re.search(r"http://\S+", process.stdout.readline())
        watch.cancel()
        if not found:
            raise RequestError(f"the server did not start; run it manually to see why: maxlm serve {model}")
        return [_stream(found[0].rstrip("/"), question) for question in questions]
    except (urllib.error.URLError, TimeoutError) as error:
        raise RequestError(
            f"the server did not answer: {error}; run it manually to see why: maxlm serve {model}"
        ) from error
    finally:
        process.terminate()
        process.wait(timeout=START_SECONDS)
        process.stdout.close()


def _stream(url: str, prompt: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 16, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, pieces = time.perf_counter(), []
    with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
        for raw in response:
            data = raw.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise RequestError(f"the server returned an error: {event['error']['message']}")
                choices = event["choices"]
                pieces.append((choices[0]["delta"].get("content") or "") if choices else "")
    return {"reply": "".join(pieces), "events": len(pieces), "seconds": round(time.perf_counter() - began, 3)}
