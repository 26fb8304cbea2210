"""Headless Chromium, driven by the DevTools protocol over pipes: no port, no package."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


@contextmanager
def chromium(profile):
    """A browser with its data in the folder `profile`, until the block ends."""
    commands_in, commands = os.pipe()
    replies, replies_out = os.pipe()
    # The browser reads from descriptor 3 and writes to 4, which the shell redirects.
    script = f'exec "$0" "$@" 3<&{commands_in} 4>&{replies_out}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    options += [
        "--no-first-run",
        "--disable-extensions",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    process = subprocess.Popen(
        ["bash", "-c", script, CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(commands_in, replies_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_in)
    os.close(replies_out)
    try:
        yield Browser(commands, replies)
    finally:
        process.terminate()
        process.wait()
        os.close(commands)
        os.close(replies)


class Browser:
    """Protocol commands, one at a time; events are kept for later."""

    def __init__(self, commands: int, replies: int):
        self._commands, self._replies = commands, replies
        self._ids = itertools.count(1)
        self._pending = b""
        self.events: list[dict] = []

    def call(self, method, *, session=None, **params):
        message = {"id": next(self._ids), "method": method, "params": params}
        if session:
            message["sessionId"] = session
        sent = memoryview(json.dumps(message).encode() + b"\0")
        while sent:
            sent = sent[os.write(self._commands, sent) :]
        while (reply := self._receive()).get("id") != message["id"]:
            self.events.append(reply)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def _receive(self, seconds=30):
        while b"\0" not in self._pending:
            assert select.select([self._replies], [], [], seconds)[0], "the browser does not respond"
            piece = os.read(self._replies, 1 << 20)
            assert piece, "the browser has ended"
            self._pending += piece
        message, self._pending = self._pending.split(b"\0", 1)
        return json.loads(message)

    @contextmanager
    def tab(self, *, before=""):
        """A tab with its own cookies and storage; `before` is a script that runs before each page's own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        if before:
            tab.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        try:
            yield tab
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)


class Tab:
    """User actions on one page, and its visible state."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def call(self, method, **params):
        return self._browser.call(method, session=self._session, **params)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && document.querySelector('#model-name')?.textContent")

    def js(self, expression):
        """The awaited value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, (expression, reply["exceptionDetails"])
        return reply["result"].get("value")

    def wait_for(self, expression, seconds=20):
        deadline = time.monotonic() + seconds
        while (value := self.js(expression)) in (None, False, 0, ""):
            assert time.monotonic() < deadline, f"{expression} did not become true; the page: {self.text('body')}"
            time.sleep(0.02)
        return value

    def text(self, selector):
        return self.js(f"document.querySelector({json.dumps(selector)})?.innerText")

    def texts(self, selector):
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")

    def is_shown(self, selector):
        return self.js(f"document.querySelector({json.dumps(selector)}).checkVisibility()")

    def click(self, selector, text=""):
        """Click the center of the first visible element that contains `text`."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find((node) => node.checkVisibility() &&"
        found += f" node.textContent.includes({json.dumps(text)}))"
        box = self.wait_for(
            f"((node) => node && (node.scrollIntoView(), node.getBoundingClientRect().toJSON()))({found})"
        )
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, *, code=None, modifiers=0):
        code = code or _KEYS[key]
        text = {"text": "\r"} if key == "Enter" and code == 13 else {}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def ask(self, text):
        self.click("#question")
        self.type(text)
        self.press("Enter")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def complaints(self):
        """Exceptions, CSP violations, and other errors that the browser logged."""
        self.js("0")  # flushes pending events
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [e["params"] for e in mine if e["method"] == "Runtime.exceptionThrown"]
        logged = [e["params"]["entry"] for e in mine if e["method"] == "Log.entryAdded"]
        # The browser logs each 4xx and 5xx response.
        return thrown + [entry for entry in logged if entry["level"] == "error" and entry["source"] != "network"]

    def requested_urls(self):
        self.js("0")
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [e["params"]["request"]["url"] for e in mine if e["method"] == "Network.requestWillBeSent"]
