"""Replies on disk: asked once, kept through crashes."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from etils import epath
from judge_server import completion, failure, judge_server

from maxlm.config.feedback import EndpointConfig
from maxlm.errors import DataError
from maxlm.scoring.chat_endpoint import ChatEndpoint
from maxlm.scoring.chat_models import ChatRequest, ReplyError
from maxlm.scoring.ledger import Ledger
from maxlm.scoring.reply_log import RecordedModel, ReplyLog


@pytest.fixture
def server():
    with judge_server() as server:
        server.reply = lambda body, number: completion(body["messages"][0]["content"].upper())
        yield server


def recorded(server, log, **settings):
    config = EndpointConfig(
        kind="endpoint",
        base_url=server.base_url,
        model="judge",
        retries=0,
        prices={"input": 1e6, "output": 0},
        **settings,
    )
    return closing(RecordedModel(ChatEndpoint(config, ledger=Ledger(), stopping=threading.Event()), log))


def ask(model, text, **settings):
    return model.reply(ChatRequest(text, **{"max_tokens": 5, **settings})).text


def test_a_reply_is_asked_for_once(server, tmp_path):
    path = epath.Path(tmp_path / "replies.jsonl")
    with recorded(server, ReplyLog(path)) as model:
        assert [ask(model, "a"), ask(model, "b"), ask(model, "a")] == ["A", "B", "A"]
    assert len(server.bodies) == 2
    log = ReplyLog(path)
    assert (log.requests, log.cost) == (2, 20.0)
    with recorded(server, log) as model:
        assert ask(model, "a") == "A"
        assert (model.replies, model.from_log) == (1, 1)
        for settings in ({"max_tokens": 6}, {"temperature": 1.0}, {"seed": 1}):
            ask(model, "a", **settings)
    assert len(server.bodies) == 5
    with recorded(server, log, body={"top_p": 0.5}) as model:
        ask(model, "a")
    assert len(server.bodies) == 6


def test_failures_are_recorded_and_asked_again(server, tmp_path):
    path = epath.Path(tmp_path / "replies.jsonl")
    well = server.reply
    server.reply = lambda body, number: failure(500)
    with recorded(server, ReplyLog(path)) as model, pytest.raises(ReplyError):
        ask(model, "a")
    server.reply = well
    log = ReplyLog(path)
    assert log.requests == 1
    with recorded(server, log) as model:
        assert ask(model, "a") == "A"
    assert ReplyLog(path).requests == 2


def test_line_that_a_crash_cut_off_is_dropped(server, tmp_path):
    path = epath.Path(tmp_path / "replies.jsonl")
    with recorded(server, ReplyLog(path)) as model:
        ask(model, "a")
        ask(model, "b")
    content = path.read_text()
    path.write_text(content[:-9])
    with recorded(server, ReplyLog(path)) as model:
        assert [ask(model, "a"), ask(model, "b")] == ["A", "B"]
    assert len(server.bodies) == 3
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["A", "B"]


def test_edited_file_is_refused_with_its_line(tmp_path):
    path = epath.Path(tmp_path / "replies.jsonl")
    path.write_text('{"key": "a"}\n{}\n')
    with pytest.raises(DataError, match=r"replies\.jsonl:1: lacks 'requests'"):
        ReplyLog(path)


def test_equal_requests_at_the_same_time_are_sent_once(server, tmp_path):
    everybody = threading.Barrier(4)

    def reply(body, number):
        return completion("A")

    server.reply = reply
    with recorded(server, ReplyLog(epath.Path(tmp_path / "replies.jsonl"))) as model, ThreadPoolExecutor(4) as pool:

        def one(_):
            everybody.wait(5)
            return ask(model, "a")

        assert list(pool.map(one, range(4))) == ["A"] * 4
    assert len(server.bodies) == 1
