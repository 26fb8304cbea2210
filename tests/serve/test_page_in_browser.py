"""The chat page in a real browser, on a server with scripted responses."""

import json
import time

import pytest
from browser import CHROMIUM, chromium
from running_server import wait_until
from scripted_server import Script, answer, failure, serve_script, sse, two_answers

if CHROMIUM is None:
    pytest.skip("the page tests need Chromium: apt-get install chromium", allow_module_level=True)

DENY_STORAGE = """
for (const name of ["localStorage", "sessionStorage"])
  Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
"""
DENY_CLIPBOARD = """
Object.defineProperty(navigator, "clipboard", { value: undefined });
Document.prototype.execCommand = () => false;
"""
ENDED = "document.querySelector('#stop').hidden"
FAILED = "!document.querySelector('#error').hidden"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def served():
    script = Script()
    with serve_script(script) as url:
        yield script, url


@pytest.fixture
def script(served):
    served[0].reset()
    return served[0]


@pytest.fixture
def url(served):
    return served[1]


@pytest.fixture
def tab(browser, script, url):
    with browser.tab() as tab:
        tab.open(url)
        yield tab
        script.go_on.set()
        assert tab.complaints() == []


def ask(tab, text, until=ENDED):
    tab.ask(text)
    tab.wait_for(f"document.querySelector('#question').value === '' && {until}")


def test_chat_and_its_requests(tab, script, url):
    script.reply = lambda body: answer("An ", "**answer**\n\n", "- one\n  ```\n  x\n  ```\n", "\n| a |\n|--:|\n| 1 |\n")
    ask(tab, "  First\nquestion ")
    tab.wait_for("document.querySelector('.body td')")
    assert tab.js("document.querySelector('.body').innerHTML").startswith("<p>An <strong>answer</strong></p><ul>")
    assert tab.js("getComputedStyle(document.querySelector('.body td')).textAlign").endswith("right")
    assert tab.text(".body li pre").strip() == "x"
    assert "4 tokens" in tab.text(".meta")
    script.reply = lambda body: answer(
        "<script>throw 1</script> [x](javascript:alert(1)) ![i](https://example.org/i.png)"
    )
    ask(tab, "Second")
    tab.wait_for("document.querySelectorAll('.body')[1].querySelector('a')")
    assert tab.js("document.querySelectorAll('.body img, .body script, a[href^=javascript]').length") == 0
    said = [(message["role"], message["content"]) for message in script.bodies[1]["messages"]]
    assert [role for role, _ in said] == ["user", "assistant", "user"]
    assert said[0][1] == "First\nquestion"
    assert script.bodies[1]["temperature"] == 0.7
    assert all(asked.startswith((url, "data:")) for asked in tab.requested_urls())
    unnamed = "[...document.querySelectorAll('button, input, textarea')].filter((node) => node.checkVisibility() &&"
    assert tab.js(unnamed + " !(node.ariaLabel || node.innerText?.trim() || node.labels?.length)).length") == 0


def test_long_chat_continues_without_its_oldest_messages(tab, script):
    def reply(body):
        if len(body["messages"]) > 3:
            return failure(400, "the prompt has 200 tokens", code="context_length_exceeded")
        return answer(f"heard {body['messages'][-1]['content']}")

    script.reply = reply
    for question in ("one", "two", "three", "four"):
        ask(tab, question)
        assert (
            tab.js("document.querySelectorAll('.assistant').length")
            == ["one", "two", "three", "four"].index(question) + 1
        )
    assert not tab.is_shown("#error")
    notes = tab.js(
        "[...document.querySelectorAll('.note')].map((note) => [note.innerText, note.nextSibling.innerText])"
    )
    assert len(notes) == 1
    assert "no longer fit" in notes[0][0]
    assert notes[0][1] == "three"
    assert [message["content"] for message in script.bodies[-1]["messages"]] == ["three", "heard three", "four"]

    # A single message that is too long: nothing else is dropped for it, and it can be edited.
    script.reply = lambda body: failure(400, "the prompt has 200 tokens", code="context_length_exceeded")
    tab.ask("too long")
    tab.wait_for(FAILED)
    assert "longer than the model’s context of 128 tokens" in tab.text("#error-text")
    assert not tab.is_shown("#retry")
    assert tab.js("document.querySelector('#question').value") == "too long"
    assert tab.js("document.querySelector('.note').nextSibling.innerText") == "three"

    # An answer truncated by the context can be regenerated with more room.
    script.reply = lambda body: answer("and so", finish="length", total_tokens=128)
    tab.js("document.querySelector('#question').value = ''")
    ask(tab, "five")
    script.reply = lambda body: answer("and so on")
    tab.click(".meta button", "Drop the oldest")
    tab.wait_for(f"{ENDED} && document.body.innerText.includes('and so on')")
    assert [message["content"] for message in script.bodies[-1]["messages"]] == ["four", "heard four", "five"]


def test_only_transient_failures_can_be_retried(tab, script):
    stopped = b'data: {"error": {"message": "stopped", "type": "server_error"}}\n\n'
    impossible = b'data: {"error": {"message": "impossible", "type": "invalid_request_error"}}\n\n'
    cases = [
        (failure(429, "the queue is full"), "The queue is full", True),
        (failure(408, "too slow"), "Too slow", True),
        (failure(503, "failed"), "Failed", True),
        ([sse("Half"), 0.1, ConnectionError()], "The connection was lost before the answer was complete.", True),
        ([sse("Half")], "The connection was lost before the answer was complete.", True),
        ([b"data: no JSON\n\n"], "The connection was lost before the answer was complete.", True),
        ([stopped], "Stopped", True),
        ([impossible], "Impossible", False),
        (failure(400, "top_k: no"), "Top_k: no", False),
        (failure(403, "not this host"), "Not this host", False),
        (failure(404, "no such model"), "No such model", False),
    ]
    for reply, shown, is_transient in cases:
        script.reply = lambda body, reply=reply: reply
        tab.ask("Question")
        tab.wait_for(FAILED)
        assert (tab.text("#error-text"), tab.is_shown("#retry")) == (shown, is_transient)
        script.reply = lambda body: answer("Now")
        if is_transient:
            tab.click("#retry")
        else:
            assert tab.js("document.querySelector('#question').value") == "Question"
            tab.press("Enter")
        tab.wait_for(f"{ENDED} && document.body.innerText.includes('Now')")
        assert not tab.is_shown("#error")
        assert tab.texts(".user") == ["Question"]
        assert [message["content"] for message in script.bodies[-1]["messages"]] == ["Question"]
        tab.click("#new-chat")


def test_input_method_composition_does_not_send(tab, script):
    tab.click("#question")
    tab.call("Input.imeSetComposition", text="ni", selectionStart=2, selectionEnd=2)
    tab.press("Enter", code=229)
    tab.press("Enter")  # while composing
    assert script.bodies == []
    tab.type("你")
    tab.press("Enter", code=229)  # Safari: after the composition has ended
    assert script.bodies == []
    tab.press("Enter", modifiers=8)  # Shift
    assert script.bodies == []
    tab.press("Enter")
    tab.wait_for(f"{ENDED} && document.querySelector('.meta')")
    assert script.bodies[0]["messages"][0]["content"].startswith("你")


def test_all_event_stream_syntax_is_parsed(tab, script):
    event = sse("zwölf 😀 ").replace(b"\n\n", b"\r\n\r\n")
    lines = json.dumps({"choices": [{"index": 0, "delta": {"content": "multi"}}]}, indent=1).splitlines()
    stream = b"\xef\xbb\xbf: a comment\r\n\r\nevent: message\r\nid: 7\r\nretry: 10\r\n" + event
    stream += b"".join(b"data:" + line.encode() + b"\r" for line in lines) + b"\r:\n\n"
    stream += sse(finish="stop") + b"data: [DONE]\n\n"
    assert "😀".encode() in stream.replace(b"\\ud83d\\ude00", "😀".encode())
    stream = stream.replace(b"\\ud83d\\ude00", "😀".encode()).replace(b"\\u00f6", "ö".encode())
    script.reply = lambda body: [part for i in range(len(stream)) for part in (stream[i : i + 1], 0.0005)]
    ask(tab, "Question", until=f"{ENDED} && document.querySelector('.meta')")
    tab.wait_for("document.querySelector('.body').innerText === 'zwölf 😀 multi'")
    assert not tab.is_shown("#error")


def test_long_answer_renders_in_linear_time_and_keeps_a_selection(tab, script):
    block = "Some **bold** and `code`.\n\n- one\n  ```py\n  x = 1\n  ```\n- two, as [this](https://example.org)\n\n"
    text = "Keep *this* selected. " + block * (42_000 // len(block))
    pieces = [text[i : i + 40] for i in range(0, len(text), 40)]
    stream = answer(*pieces)
    script.reply = lambda body: [stream[0], None, *(part for piece in stream[1:] for part in (piece, 0.004))]
    tab.ask("Question")
    tab.wait_for("document.querySelector('.body em')")
    first, emphasised = "document.querySelector('.body p').firstChild", "document.querySelector('.body em').firstChild"
    tab.js(f"getSelection().setBaseAndExtent({first}, 0, {emphasised}, 4)")
    tab.js(
        "window.longest = 0; new PerformanceObserver((list) => { for (const task of list.getEntries())"
        " longest = Math.max(longest, task.duration) }).observe({ entryTypes: ['longtask'] })"
    )
    started = time.monotonic()
    script.go_on.set()
    tab.wait_for(ENDED, seconds=60)
    assert time.monotonic() - started < 30
    tab.wait_for(f"document.querySelectorAll('.body > ul').length === {text.count('- one')}")
    assert tab.js("getSelection().toString()") == "Keep this"
    # The text sent for rendering is a few times the answer in total, not quadratic; the whole text is sent once.
    wait_until(lambda: script.renderings[-1] > len(text))
    *growing, _ = script.renderings
    assert len(growing) > 2  # the slower the machine, the fewer
    assert sum(growing) < 4 * len(text) + 500 * len(growing)
    assert tab.js("window.longest") < 1000


def test_reload_keeps_the_conversation_and_new_chat_clears_it(tab, script, url):
    ask(tab, "First")
    script.reply = lambda body: [sse("Half an"), None]
    tab.ask("Second")
    tab.wait_for("document.querySelectorAll('.body')[1]?.innerText.includes('Half')")
    tab.click("#question")
    tab.type("a draft")
    tab.open(url)
    script.go_on.set()
    assert tab.texts(".user") == ["First", "Second"]
    tab.wait_for("document.querySelectorAll('.body')[1].innerText === 'Half an'")
    assert "incomplete" in tab.texts(".meta")[1]
    assert tab.js("document.querySelector('#question').value") == "a draft"
    script.reply = lambda body: answer("whole")
    tab.click(".again")
    tab.wait_for(f"{ENDED} && document.body.innerText.includes('whole')")
    assert [m["content"] for m in script.bodies[-1]["messages"]] == ["First", "fine", "Second"]
    tab.click("#new-chat")
    tab.open(url)
    assert tab.texts(".message") == []
    assert tab.is_shown("#welcome")


def test_stop_keeps_the_partial_answer(tab, script):
    for by_key in (True, False):
        script.reply = lambda body: [sse("Some text"), None]
        tab.ask("Question")
        tab.wait_for("[...document.querySelectorAll('.body')].at(-1)?.innerText === 'Some text'")
        assert tab.js("document.querySelector('#messages').ariaBusy") == "true"
        tab.press("Escape") if by_key else tab.click("#stop")
        tab.wait_for(ENDED)
        script.go_on.set()
        assert "stopped" in tab.texts(".meta")[-1]
        assert tab.js("document.activeElement.id") == "question"
        assert not tab.is_shown("#error")


def test_works_without_storage_and_clipboard(browser, script, url):
    with browser.tab(before=DENY_STORAGE + DENY_CLIPBOARD) as tab:
        script.key = "secret"
        tab.call("Page.navigate", url=url)
        tab.wait_for("document.querySelector('#key')?.open")
        tab.type("secret")
        tab.press("Enter")
        tab.wait_for("document.querySelector('#model-name').textContent")
        ask(tab, "Question")
        tab.wait_for("document.querySelector('.body').innerText === 'fine'")
        tab.click(".meta button", "Copy")
        tab.wait_for("document.querySelector('.meta').innerText.includes('not allowed')")
        tab.click("#new-chat")
        assert tab.is_shown("#welcome")
        assert tab.complaints() == []


def test_server_with_a_key(tab, script, url):
    script.key = "secret"
    tab.ask("Question")
    for key in ("wrong", "secret"):
        tab.wait_for("document.querySelector('#key').open && document.activeElement.id === 'api-key'")
        tab.type(key)
        tab.press("Enter")
        tab.wait_for(
            "!document.querySelector('#key').open || document.querySelector('#key-help').innerText.includes('not')"
        )
    tab.wait_for(f"{ENDED} && document.querySelector('.body').innerText === 'fine'")
    tab.open(url)  # the tab keeps the key
    tab.wait_for("document.querySelector('.body').innerText === 'fine'")
    assert not tab.js("document.querySelector('#key').open")
    script.key = "another"
    tab.ask("Question")
    tab.wait_for("document.querySelector('#key').open")
    tab.press("Escape")
    tab.wait_for(FAILED)
    assert tab.text("#retry") == "Enter the key"


def test_settings_are_sent_kept_and_checked(tab, script, url):
    tab.click("#open-settings")
    for name, value in (("seed", "7"), ("system", "Be brief"), ("max-tokens", "0")):
        tab.click(f"#{name}")
        tab.type(value)
    tab.press("Escape")
    tab.ask("Question")
    tab.wait_for("document.querySelector('#settings').open")
    assert script.bodies == []
    tab.js("document.querySelector('#max-tokens').value = 9")
    tab.click("#settings .primary")
    tab.click("#question")
    tab.press("Enter")
    tab.wait_for(f"{ENDED} && document.querySelector('.meta')")
    assert script.bodies[0]["seed"] == 7
    assert script.bodies[0]["max_tokens"] == 9
    assert script.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief"}
    tab.open(url)
    assert tab.js("document.querySelector('#system').value") == "Be brief"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_fits_a_narrow_screen_with_readable_contrast(tab, script, theme):
    tab.call("Emulation.setDeviceMetricsOverride", width=320, height=600, deviceScaleFactor=1, mobile=True)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    script.reply = lambda body: answer(
        "| a | b |\n|---|---|\n| " + "long " * 30 + "| " + "x" * 90 + " |\n\n`" + "y" * 90 + "`"
    )
    ask(tab, "w" * 90)
    tab.wait_for("document.querySelector('.body td')")
    assert tab.js("document.documentElement.scrollWidth") <= 320
    assert tab.js("document.querySelector('#messages').scrollWidth") <= 320
    background = tab.js("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 251, 250)", "dark": "rgb(21, 24, 26)"}[theme]


def test_votes_on_two_answers(tab, script, url):
    script.reply = lambda body: two_answers("**seven**", "eight")
    tab.click("#open-settings")
    tab.click("#compare")
    tab.press("Escape")
    voting = "document.querySelector('.vote')?.contains(document.activeElement)"
    tab.ask("3 + 4?")
    tab.wait_for(f"{voting} && document.querySelector('.comparison strong')")
    assert script.bodies[0]["n"] == 2
    assert tab.texts(".vote button") == ["A is better A", "B is better B", "Tie T", "Both bad N"]
    [left, right] = tab.texts(".comparison .body")
    assert {left, right} == {"seven", "eight"}
    script.refuse_vote = failure(500, "the disk is full")
    tab.press("b", code=66)
    tab.wait_for(FAILED)
    tab.wait_for(voting)
    assert "The disk is full" in tab.text("#error-text")
    tab.press("b", code=66)
    tab.wait_for(f"{ENDED} && document.querySelector('.meta')")
    [vote] = script.votes
    assert vote["messages"] == [{"role": "user", "content": "3 + 4?"}]
    assert vote["choice"] == "second"
    assert [text.strip("*") for text in vote["answers"]] == [left, right]
    assert vote["sampling"] == {"temperature": 0.7, "top_p": 1, "seed": script.bodies[0]["seed"]}
    assert not tab.is_shown("#error")
    # The chosen answer goes on.
    tab.wait_for(
        f"document.querySelectorAll('.body').length === 1 && document.querySelector('.body').innerText === '{right}'"
    )
    assert "chosen of two" in tab.text(".meta")
    tab.ask("Again")
    tab.click(".vote button", "Both bad")
    tab.wait_for(f"{ENDED} && document.querySelector('#question').value === 'Again'")
    assert [message["role"] for message in script.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert script.votes[1]["choice"] == "both_bad"
    assert tab.texts(".user") == ["3 + 4?"]
    for reply, note in ((two_answers("one", "one "), "same"), (two_answers("one", "on", finish="length"), "truncated")):
        script.reply = lambda body, reply=reply: reply
        tab.open(url)  # the setting is kept
        tab.click("#new-chat")
        ask(tab, "Third", until=f"{ENDED} && document.querySelector('.meta')")
        assert note in tab.text(".meta")
    assert len(script.votes) == 2
