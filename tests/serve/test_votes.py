"""Votes on two answers: the API, the folder, and what reads the file."""

import json

import httpx
import numpy as np
import pytest
from running_server import serve

from maxlm.config.data import RecordFormat
from maxlm.data.examples.judged import JudgedAnswers
from maxlm.data.examples.preference import PreferencePairs
from maxlm.errors import ConfigError
from maxlm.runtime.manifest import content_hash, manifest_chain, read_manifest
from maxlm.serve.votes import Votes

MESSAGES = [{"role": "user", "content": "Why?"}]
VOTE = {"messages": MESSAGES, "answers": ["Because.", "No."], "choice": "second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("votes") / "votes"


@pytest.fixture(scope="module")
def url(model, bundle, folder):
    with (
        Votes.opened(folder, model_path=bundle, served={"ema": False}) as votes,
        serve(model, num_slots=1, votes=votes) as (url, _),
    ):
        yield url


def lines(folder):
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_vote_is_a_preference_pair_with_the_identity_of_the_model(http, url, folder, bundle):
    sampling = {"temperature": 0.7, "seed": 5}
    vote = {**VOTE, "messages": [{"role": "developer", "content": "Be ä."}, *MESSAGES], "sampling": sampling}
    before = http.get("/v1/models").json()["data"][0]
    assert before["takes_votes"] is True
    reply = http.post("/v1/votes", json=vote)
    assert reply.status_code == 200
    record = lines(folder)[reply.json()["votes"] - 1]
    assert record["prompt"] == [{"role": "system", "content": "Be ä."}, *MESSAGES]
    assert (record["chosen"], record["rejected"], record["judge"]) == ("No.", "Because.", "person")
    metadata = record["metadata"]
    assert metadata["model_hash"] == content_hash(bundle)
    assert metadata["sampling"] == sampling
    assert metadata["shown_first"] == "rejected"
    assert metadata["time"].endswith("+00:00")


def test_pairs_and_single_answers_are_read_as_they_are(tmp_path, model, bundle, capsys):
    with (
        Votes.opened(tmp_path, model_path=bundle, served={}) as votes,
        serve(model, num_slots=1, votes=votes) as (url, _),
    ):
        for change in ({}, {"choice": "tie"}, {"choice": "both_bad"}):
            httpx.post(f"{url}/v1/votes", json={**VOTE, **change}).raise_for_status()
        text = {"prompt": "3+4=", "answers": ["7", "8"], "choice": "first", "voter": "ann"}
        httpx.post(f"{url}/v1/votes", json=text).raise_for_status()
    file = tmp_path / "votes.jsonl"
    pairs = PreferencePairs.read(file, model.tokenizer, row_length=64)
    assert [pairs.places(index) for index in range(len(pairs))] == [[f"{file}:1"], [f"{file}:4"]]
    assert "2 votes for neither answer are left out" in " ".join(capsys.readouterr().err.split())
    judged = JudgedAnswers.read(file, model.tokenizer, row_length=64, form=RecordFormat())
    assert np.array_equal(judged.batch(np.arange(6)).values["is_good_B"], [1, 0, 0, 0, 1, 0])
    assert len(judged) == 6
    metrics = read_manifest(tmp_path)["metrics"]
    assert metrics == {"pairs": 2, "ties": 1, "both_bad": 1, "shown_first_wins": 0.5}
    # A run that reads the file finds the model through the manifest next to it.
    (found,) = manifest_chain(file)
    assert found["stage"] == "votes"
    assert found["inputs"]["model"]["hash"] == content_hash(bundle)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choice": "third"}, "choice: Input should be 'first', 'second', 'tie' or 'both_bad'"),
        ({"choice": None}, "choice"),
        ({"answers": ["a", " a\n"]}, "answers are equal, so there is nothing to vote on"),
        ({"answers": ["a", " "]}, "answers must be two texts that are not empty"),
        ({"answers": ["a"]}, "answers: List should have at least 2 items"),
        ({"answers": ["a", "\ud800"]}, "lone surrogate"),
        ({"prompt": "x"}, "messages or prompt: give one of the two"),
        ({"messages": None}, "messages or prompt: give one of the two"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, "without an answer"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "nobody"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature"),
        ({"winner": 1}, "winner: unknown field"),
    ],
)
def test_a_bad_vote_gets_400_and_is_not_kept(http, url, folder, change, expected):
    kept = (folder / "votes.jsonl").read_bytes() if (folder / "votes.jsonl").exists() else b""
    body = json.dumps({**VOTE, **change})
    reply = http.post("/v1/votes", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert expected in reply.json()["error"]["message"]
    assert ((folder / "votes.jsonl").read_bytes() if kept else b"") == kept


def test_what_is_not_json_gets_400(http):
    reply = http.post("/v1/votes", content=b"{", headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert "not valid JSON" in reply.json()["error"]["message"]


def test_a_vote_that_cannot_be_written_gets_500_and_the_next_one_is_whole(http, folder, monkeypatch):
    http.post("/v1/votes", json=VOTE).raise_for_status()
    before = lines(folder)
    text = (folder / "votes.jsonl").read_text(encoding="utf-8")

    def full(self, line):
        self._path.write_text(text + line[:9], encoding="utf-8")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("maxlm.runtime.storage.LineLog.append", full)
        reply = http.post("/v1/votes", json=VOTE)
    assert reply.status_code == 500
    assert "No space left on device" in reply.json()["error"]["message"]
    http.post("/v1/votes", json=VOTE).raise_for_status()
    assert len(lines(folder)) == len(before) + 1


def test_a_server_without_votes_says_how_to_keep_them(model):
    with serve(model, num_slots=1) as (url, _):
        reply = httpx.post(f"{url}/v1/votes", json=VOTE)
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["takes_votes"] is False
    assert reply.status_code == 404
    assert "--votes DIR" in reply.json()["error"]["message"]


def test_a_folder_belongs_to_one_model_and_one_server(url, folder, bundle, tmp_path):
    with pytest.raises(ConfigError, match="another server writes"), Votes.opened(folder, model_path=bundle, served={}):
        pass
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("others")
    mine = tmp_path / "mine"
    with Votes.opened(mine, model_path=bundle, served={}):
        pass
    with (
        pytest.raises(ConfigError, match="has votes on another model"),
        Votes.opened(mine, model_path=tmp_path / "model", served={}),
    ):
        pass
    with pytest.raises(ConfigError, match="--votes: "), Votes.opened(bundle, model_path=bundle, served={}):
        pass
