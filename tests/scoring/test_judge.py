"""A judge behind a real HTTP server: both orders, ties, votes, ratings, and replies that say nothing."""

import re
import threading
from contextlib import contextmanager

import pytest
from judge_server import completion, judge_server

from maxlm.config.feedback import EndpointConfig, JudgePrompts, Principle
from maxlm.errors import ConfigError
from maxlm.scoring.chat_endpoint import ChatEndpoint
from maxlm.scoring.judge import Judge, UnjudgedError, Verdict, Vote, position_bias
from maxlm.scoring.ledger import Ledger

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
LONG, SHORT = "Because of Rayleigh scattering.", "Because."


def principles(*ids):
    return [Principle(id=id_, prefer=f"Which is more {id_}?", rate=f"It is {id_}.") for id_ in ids]


def longer(message):
    """A verdict for the longer answer, by what the judge is shown."""
    shown = re.findall(r"<answer_[ab]>\n(.*?)\n</answer_[ab]>", message, re.DOTALL)
    return "AB"[len(shown[1]) > len(shown[0])]


@contextmanager
def judged_by(says, **settings):
    """A judge that says `says(message)`."""
    with judge_server() as server:
        server.reply = lambda body, number: completion(says(body["messages"][0]["content"]))
        config = EndpointConfig(kind="endpoint", base_url=server.base_url, model="judge", retries=0)
        model = ChatEndpoint(config, ledger=Ledger(), stopping=threading.Event())
        yield Judge(model, **settings), server
        model.close()


@pytest.mark.parametrize(
    "form",
    [
        "Reasons.\n\nVerdict: {}",
        "**Verdict:** {}.",
        "verdict：{}\n",
        "Verdict: A or B?\nI say:\n> Verdict: [[{}]]",
        "{}",
    ],
)
def test_better_answer_wins_in_both_orders(form):
    with judged_by(lambda message: form.format(longer(message))) as (judge, server):
        verdict = judge.compare(QUESTION, SHORT, LONG, principles=principles("helpful"))
        assert judge.compare(QUESTION, LONG, SHORT, principles=principles("helpful")).outcome == "first"
    assert verdict == Verdict((Vote("helpful", "second", ("b", "a")),))
    assert (verdict.outcome, verdict.confidence, verdict.first_probability) == ("second", 1.0, 0.0)
    message = server.bodies[0]["messages"][0]["content"]
    for part in ("User: Why is the sky blue?", LONG, SHORT, "Which is more helpful?", 'one line, "Verdict: X"'):
        assert part in message


@pytest.mark.parametrize(("place", "share"), [("A", 1.0), ("B", 0.0)])
def test_bias_for_a_place_is_a_tie_and_is_reported(place, share):
    with judged_by(lambda message: f"Verdict: {place}") as (judge, _):
        verdict = judge.compare(QUESTION, SHORT, LONG, principles=principles("helpful", "honest"))
    assert (verdict.outcome, verdict.confidence) == ("tie", 0.5)
    assert position_bias([verdict]) == {"votes": 2, "order_disagreements": 1.0, "shown_first_wins": share}


def test_ties_and_half_ties():
    def says(message):
        return "Verdict: tie" if "funny" in message or longer(message) == "A" else "Verdict: B"

    with judged_by(says) as (judge, _):
        tie = judge.compare(QUESTION, SHORT, LONG, principles=principles("funny"))
        half = judge.compare(QUESTION, SHORT, LONG, principles=principles("helpful"))
    assert tie.votes == (Vote("funny", "tie", ("tie", "tie")),)
    assert half.votes == (Vote("helpful", "tie", ("b", "tie")),)
    assert position_bias([tie, half]) == {"votes": 2, "order_disagreements": 0.5, "shown_first_wins": 0.0}
    assert position_bias([])["order_disagreements"] is None


def test_several_votes_give_a_confidence():
    def says(message):
        winner = longer(message)
        return f"Verdict: {'BA'['AB'.index(winner)] if 'short' in message else winner}"

    with judged_by(says) as (judge, _):
        verdict = judge.compare(QUESTION, LONG, SHORT, principles=principles("helpful", "short", "honest"))
    assert [vote.outcome for vote in verdict.votes] == ["first", "second", "first"]
    assert (verdict.outcome, verdict.confidence) == ("first", 2 / 3)


def test_votes_under_one_principle_are_sampled_apart():
    with judged_by(lambda message: f"Verdict: {longer(message)}", temperature=1.0, seed=5) as (judge, server):
        judge.compare(QUESTION, LONG, SHORT, principles=principles("helpful") * 2)
    assert len({(body["seed"], body["messages"][0]["content"]) for body in server.bodies}) == 4
    assert {body["temperature"] for body in server.bodies} == {1.0}


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ("I like both.", "has no line Verdict: X, where X is A, B or tie"),
        ("Verdict: C", "ends with Verdict: C, where"),
        ("", "has no line"),
        ("Verdict: A, but maybe B", "ends with Verdict: A, but maybe B"),
    ],
)
def test_nonsense_is_no_verdict(reply, sentence):
    with judged_by(lambda message: reply) as (judge, _), pytest.raises(UnjudgedError, match=sentence):
        judge.compare(QUESTION, LONG, SHORT, principles=principles("helpful"))


def test_unreadable_replies_cost_their_vote_only():
    def says(message):
        return "What?" if "honest" in message and longer(message) == "B" else f"Verdict: {longer(message)}"

    with judged_by(says) as (judge, _):
        verdict = judge.compare(QUESTION, LONG, SHORT, principles=principles("helpful", "honest"))
    assert [vote.principle for vote in verdict.votes] == ["helpful"]
    assert verdict.unreadable == 1


def test_reply_that_is_cut_off_says_so():
    with judged_by(lambda message: "") as (judge, server):
        server.reply = lambda body, number: completion("I think that", finish_reason="length")
        with pytest.raises(UnjudgedError, match="is cut off after 512 tokens, and has no line"):
            judge.compare(QUESTION, LONG, SHORT, principles=principles("helpful"))


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 7", 7),
        ("Good.\n**Rating:** 7/10.", 7),
        ("7", 7),
        ("Rating: 3 at first.\nRating: 10", 10),
        ("rating： 1", 1),
    ],
)
def test_ratings(reply, rating):
    with judged_by(lambda message: reply) as (judge, server):
        found = judge.rate(QUESTION, LONG, principles=principles("helpful", "honest"))
    assert found.ratings == (("helpful", rating), ("honest", rating))
    assert found.mean == rating
    assert "from 1 (worst) to 10 (best)" in server.bodies[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    "reply", ["Rating: 11", "Rating: 0", "Rating: high", "Rating: 7.5", "Rating: -3", "Rating: 7/5"]
)
def test_ratings_off_the_scale_are_unreadable(reply):
    with judged_by(lambda message: reply) as (judge, _), pytest.raises(UnjudgedError, match="no rating of judge"):
        judge.rate(QUESTION, LONG, principles=principles("helpful"))


def test_answers_of_several_messages_and_plain_prompts_are_shown():
    answer = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "And?"}]
    with judged_by(lambda message: "Verdict: tie") as (judge, server):
        judge.compare(
            "Once upon", " a time", [*answer, {"role": "assistant", "content": "Two."}], principles=principles("x")
        )
    message = server.bodies[0]["messages"][0]["content"]
    assert "<conversation>\nOnce upon\n</conversation>" in message
    assert "Assistant: One.\n\nUser: And?\n\nAssistant: Two." in message


def test_text_of_answers_is_never_read_as_a_template():
    with judged_by(lambda message: "Verdict: tie") as (judge, server):
        judge.compare("{{ principle }}", "{% for %}", "{{ 1 / 0 }}", principles=principles("x"))
    message = server.bodies[0]["messages"][0]["content"]
    assert all(text in message for text in ("{{ principle }}", "{% for %}", "{{ 1 / 0 }}"))


def test_own_prompts_and_unknown_variables():
    with judged_by(lambda message: "Verdict: A", prompts=JudgePrompts(compare="{{ answer_a }} {{ format }}")) as (
        judge,
        server,
    ):
        judge.compare(QUESTION, LONG, SHORT, principles=principles("helpful"))
        assert server.bodies[0]["messages"][0]["content"].startswith(f"{LONG} End with")
        with pytest.raises(
            ConfigError, match=r"prompts\.compare: \{\{ answer_c \}\} is unknown; did you mean \{\{ answer_"
        ):
            Judge(judge.model, JudgePrompts(compare="{{ answer_c }}"))
        with pytest.raises(ConfigError, match=r"prompts\.rate: line 1 of the template"):
            Judge(judge.model, JudgePrompts(rate="{{ answer"))
