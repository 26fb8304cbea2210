"""Judges and answering models that are ours: served by `maxlm serve`, and loaded here."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from running_server import serve

from maxlm.cli import main
from maxlm.config.feedback import EndpointConfig
from maxlm.errors import RequestError
from maxlm.scoring.chat_endpoint import ChatEndpoint
from maxlm.scoring.chat_models import ChatRequest, LocalChatModel, ReplyError
from maxlm.scoring.ledger import Ledger
from maxlm.serve.access import Access

QUESTION = [{"role": "user", "content": "The quick brown"}]
REQUESTS = [ChatRequest(QUESTION, max_tokens=5 + number, temperature=0.7, seed=number) for number in range(6)]


def endpoint(url, **settings):
    config = EndpointConfig(kind="endpoint", base_url=f"{url}/v1", model="tiny-int8", retries=0, **settings)
    return closing(ChatEndpoint(config, ledger=Ledger(), stopping=threading.Event()))


def local(bundle):
    return closing(LocalChatModel(str(bundle), content_hash="x", concurrent=4, ledger=Ledger()))


def test_served_and_local_models_reply_alike(url, bundle, model):
    """The same text for the same request, however many are in flight."""
    with endpoint(url) as served, local(bundle) as loaded, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(loaded.reply, REQUESTS))
        assert list(pool.map(served.reply, REQUESTS)) == replies
        greedy = loaded.reply(ChatRequest(QUESTION, max_tokens=12))
        assert greedy.text == model.generate(QUESTION, max_new_tokens=12)[0]
        # A text is continued, as everywhere.
        text = loaded.reply(ChatRequest("The quick", max_tokens=8)).text
        assert text == model.generate("The quick", max_new_tokens=8)[0]
    assert len({reply.text for reply in replies}) > 1
    assert replies[0].prompt_tokens == len(model.encode(QUESTION))
    assert all(reply.completion_tokens <= request.max_tokens for reply, request in zip(replies, REQUESTS))


def test_prompt_that_is_too_long_fails_alone(url, bundle):
    too_long = ChatRequest([{"role": "user", "content": "quick " * 200}], max_tokens=5)
    with endpoint(url) as served, local(bundle) as loaded:
        for chat_model in (served, loaded):
            with pytest.raises(ReplyError, match="context"):
                chat_model.reply(too_long)
            assert chat_model.reply(REQUESTS[0]).text


def test_api_key_of_our_server(model, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    with serve(model, access=Access(api_key="right")) as (url, _):
        with (
            endpoint(url, api_key_variable="JUDGE_KEY") as served,
            pytest.raises(RequestError, match=r"refuses the key in JUDGE_KEY \(401\)"),
        ):
            served.reply(REQUESTS[0])
        monkeypatch.setenv("JUDGE_KEY", "right")
        with endpoint(url, api_key_variable="JUDGE_KEY") as served:
            assert served.reply(REQUESTS[0]).requests == 1


@pytest.mark.parametrize("kind", ["served", "local"])
def test_untrained_judge_is_counted_and_ends_the_run(kind, url, bundle, tmp_path, capsys):
    """It babbles: no verdict can be read, and the record says so."""
    (tmp_path / "constitution.yaml").write_text(
        "kind: constitution\nprinciples: [{id: good, prefer: Best}]\n"
        "prompts: {compare: '{{ answer_a }} {{ answer_b }}'}\n"
    )
    (tmp_path / "records.jsonl").write_text(json.dumps({"prompt": QUESTION, "answers": ["fox", "dog"]}) + "\n")
    where = (
        f"kind: endpoint, base_url: '{url}/v1', model: tiny-int8"
        if kind == "served"
        else f"kind: local, path: {bundle}"
    )
    (tmp_path / "feedback.yaml").write_text(
        f"kind: feedback\noutput: {tmp_path}/out\nrecords: {tmp_path}/records.jsonl\n"
        f"constitution: {tmp_path}/constitution.yaml\ntask: {{kind: prefer, max_tokens: 8}}\njudge: {{{where}}}\n"
    )
    assert main(["feedback", str(tmp_path / "feedback.yaml")]) == 3
    assert "records.jsonl:1: no verdict of" in capsys.readouterr().err
    [left] = (tmp_path / "out" / "aside.jsonl").read_text().splitlines()
    assert json.loads(left)["reason"] == "unreadable judge"
    assert len((tmp_path / "out" / "replies.jsonl").read_text().splitlines()) == 2
