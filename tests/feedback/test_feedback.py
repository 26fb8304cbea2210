"""`maxlm feedback` against a real HTTP server: the data it makes, reruns, limits, bad judges, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from etils import epath
from judge_server import completion, failure, judge_server

from maxlm.cli import main
from maxlm.config.data import RecordFormat
from maxlm.data.examples.chat import PackedChats
from maxlm.data.examples.preference import PreferencePairs
from maxlm.runtime.manifest import content_hash, manifest_chain, read_manifest
from maxlm.runtime.storage import locked
from maxlm.tokenizer.codec import Tokenizer

CONSTITUTION = """
kind: constitution
principles:
- {id: long, prefer: "Which is longer?", rate: It is long., critique: "Is it too short?", revise: Make it longer.}
- {id: short, prefer: "Which is shorter?"}
"""


def question(text):
    return [{"role": "user", "content": text}]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reply(body, number):
    """Judges by the principle and the lengths, rates by length, critiques, revises, answers prompts by the seed."""
    message = body["messages"][-1]["content"]
    if shown := re.findall(r"<answer_[ab]>\n(.*?)\n</answer_[ab]>", message, re.DOTALL):
        is_longer = len(shown[0]) > len(shown[1])
        return completion(f"Verdict: {'A' if is_longer == ('longer' in message) else 'B'}")
    if shown := re.findall(r"<answer>\n(.*?)\n</answer>", message, re.DOTALL):
        return completion(f"Rating: {min(len(shown[0]), 10)}")
    if message == "Is it too short?":
        return completion("It is.")
    if message == "Make it longer.":
        return completion(body["messages"][-4]["content"] + " And more.")
    return completion("word " * (1 + body["seed"] % 97))


@pytest.fixture
def server():
    with judge_server() as server:
        server.reply = reply
        yield server


@pytest.fixture
def run(server, tmp_path, capsys):
    """Runs `maxlm feedback` on records, with a task and overrides; gives exit code, output folder and messages."""
    (tmp_path / "constitution.yaml").write_text(CONSTITUTION)

    def run(records, *overrides, task="{kind: prefer}", process=False):
        write_lines(tmp_path / "records.jsonl", records)
        config = tmp_path / "feedback.yaml"
        config.write_text(
            f"kind: feedback\noutput: {tmp_path}/out\nrecords: {tmp_path}/records.jsonl\n"
            f"constitution: {tmp_path}/constitution.yaml\ntask: {task}\n"
            f"judge: {{kind: endpoint, base_url: '{server.base_url}', model: judge-1, retries: 1,"
            " retry_seconds: 0.001}\n"
        )
        arguments = ["feedback", str(config), *overrides]
        if process:
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
            return subprocess.Popen([sys.executable, "-m", "maxlm.cli", *arguments], env=environment)
        code = main(arguments)
        return code, tmp_path / "out", capsys.readouterr().err

    return run


PAIRS = [{"prompt": question(f"Question {number}?"), "answers": ["Yes.", "Yes, I say."]} for number in range(8)]


def test_pairs_are_labelled_and_read_as_preference_data(run, server, tiny_tokenizer_folder):
    code, out, said = run(PAIRS)
    assert code == 0, said
    made, aside = read_lines(out / "preferences.jsonl"), read_lines(out / "aside.jsonl")
    assert [line["prompt"] for line in made] == [record["prompt"] for record in PAIRS]
    assert aside == []
    for line in made:
        best = "Yes, I say." if line["principles"] == ["long"] else "Yes."
        assert (line["chosen"], line["judge"], line["votes"], line["confidence"]) == (best, "judge-1", ["chosen"], 1.0)
        assert line["metadata"] == {"answers": "given"}
    assert {line["principles"][0] for line in made} == {"long", "short"}
    assert made[0]["id"].endswith("records.jsonl:1")
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    pairs = PreferencePairs.read(out / "preferences.jsonl", tokenizer, row_length=64)
    assert len(pairs) == 8
    assert "8 made of 8 records\n" in said
    assert (
        "8 votes, mean confidence 1.00; the two orders disagree in 0.0%, which are ties; the answer shown first" in said
    )
    manifest = read_manifest(out)
    assert manifest["stage"] == "feedback/prefer"
    assert manifest["inputs"]["records"]["hash"] == content_hash(out.parent / "records.jsonl")
    assert manifest["inputs"]["constitution"]["hash"] == content_hash(out.parent / "constitution.yaml")
    assert manifest["metrics"]["requests_total"] == len(server.bodies) == 16
    # The manifest of a training on the file continues the chain.
    assert [item["stage"] for item in manifest_chain(out / "preferences.jsonl")] == ["feedback/prefer"]


def test_rerun_costs_nothing_and_gives_the_same_bytes(run, server):
    _, out, said = run(PAIRS, "task.votes=2")
    assert "16 votes" in said
    metrics = read_manifest(out)["metrics"]
    first = (out / "preferences.jsonl").read_bytes(), (out / "aside.jsonl").read_bytes()
    sent = len(server.bodies)
    code, out, said = run(PAIRS, "task.votes=2")
    assert code == 0
    assert len(server.bodies) == sent == 32
    assert ((out / "preferences.jsonl").read_bytes(), (out / "aside.jsonl").read_bytes()) == first
    assert "32 replies, 32 of them recorded earlier" in said
    assert read_manifest(out)["metrics"] == {**metrics, "replies_from_log": 32}
    assert metrics["prompt_tokens"] == 320
    # Of two votes, one is for the longer answer, and one for the shorter.
    assert [line["reason"] for line in read_lines(out / "aside.jsonl")] == ["tie"] * 8
    assert read_lines(out / "aside.jsonl")[0]["answers"] == ["Yes.", "Yes, I say."]


def test_answers_are_sampled_from_a_model(run, server):
    model = f"model={{kind: endpoint, base_url: '{server.base_url}', model: small}}"
    records = [{"prompt": question(f"Question {number}?")} for number in range(4)]
    code, out, said = run(records, model, "answers.count=3", "answers.max_tokens=11", "answers.temperature=0.7")
    assert code == 0, said
    made = read_lines(out / "preferences.jsonl")
    assert len(made) == 4 * 3  # all pairs
    assert made[0]["metadata"] == {"answers": "small"}
    asked = [body for body in server.bodies if body["model"] == "small"]
    assert len(asked) == 12
    assert {(body["max_tokens"], body["temperature"]) for body in asked} == {(11, 0.7)}
    assert len({(body["messages"][0]["content"], body["seed"]) for body in asked}) == 12
    other = run(records, model, "answers.count=3", "answers.max_tokens=11", "answers.temperature=0.7", "seed=1")
    assert other[0] == 0
    assert read_lines(out / "preferences.jsonl") != made


def test_answers_that_teach_nothing_are_left_out(run, server):
    def says(body, number):
        if body["model"] == "small":
            return [completion("  "), completion("half", finish_reason="length")][body["messages"][0]["content"] == "b"]
        return reply(body, number)

    server.reply = says
    records = [
        {"prompt": question("a")},
        {"prompt": question("b")},
        {"prompt": question("c"), "answers": ["Yes.", " Yes.\n"]},
        {"prompt": question("d"), "answers": ["Yes.", " "]},
        PAIRS[0],
    ]
    code, out, said = run(records, f"model={{kind: endpoint, base_url: '{server.base_url}', model: small}}")
    assert code == 0
    reasons = [(line["place"][-1], line["reason"]) for line in read_lines(out / "aside.jsonl")]
    assert reasons == [
        *[("1", "empty answer")] * 2,
        *[("2", "answer is cut off")] * 2,
        ("3", "equal answers"),
        ("4", "empty answer"),
    ]
    assert "1 made of 5 records; left out: 3 empty answer, 2 answer is cut off, 1 equal answers" in said


def test_answers_of_a_teacher_make_chats_without_a_judge(server, tmp_path, tiny_tokenizer_folder, capsys):
    def says(body, number):
        return completion("same" if body["messages"][-1]["content"] == "Question 0?" else f"word {body['seed'] % 97}")

    server.reply = says
    records = write_lines(tmp_path / "prompts.jsonl", [{"prompt": question(f"Question {n}?")} for n in range(3)])
    config = tmp_path / "answer.yaml"
    config.write_text(
        f"kind: feedback\noutput: {tmp_path}/out\nrecords: {records}\ntask: {{kind: answer}}\n"
        f"model: {{kind: endpoint, base_url: '{server.base_url}', model: teacher}}\nanswers: {{count: 2}}\n"
    )
    assert main(["feedback", str(config)]) == 0, capsys.readouterr().err
    made, aside = (read_lines(tmp_path / "out" / name) for name in ("chats.jsonl", "aside.jsonl"))
    assert len(made) == 5
    assert made[0]["messages"] == [*question("Question 0?"), {"role": "assistant", "content": "same"}]
    assert made[1]["metadata"] == {"answers": "teacher"}
    assert [line["reason"] for line in aside] == ["equal answers"]
    assert len(PackedChats.read(tmp_path / "out" / "chats.jsonl", Tokenizer.load(tiny_tokenizer_folder), row_length=64))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["stage"] == "feedback/answer"
    assert set(manifest["inputs"]) == {"records"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task.kind=answer"], "task.kind=answer: needs a model, and neither judge nor constitution"),
        (["judge=null"], "judge: is missing, and task.kind=prefer needs it"),
        (["constitution=null"], "constitution: is missing, and task.kind=prefer needs it"),
    ],
)
def test_judge_and_task_must_fit(run, overrides, sentence):
    code, _, said = run(PAIRS, *overrides)
    assert code == 2
    assert sentence in said


def test_critique_and_revision_make_chats(run, server, tiny_tokenizer_folder):
    records = [
        {"messages": [*question("Why?"), {"role": "assistant", "content": "So."}]},
        {"prompt": "Once upon a", "completion": " time."},
    ]
    code, out, said = run(records, task="{kind: revise, rounds: 2}")
    assert code == 0, said
    chat, text = read_lines(out / "chats.jsonl")
    assert chat["messages"] == [*question("Why?"), {"role": "assistant", "content": "So. And more. And more."}]
    assert chat["metadata"] == {
        "answers": "given",
        "judge": "judge-1",
        "principles": ["long", "long"],
        "first_answer": "So.",
        "critiques": ["It is.", "It is."],
    }
    assert text["prompt"] == "Once upon a"
    # The conversation so far is the model's own: the answer, its critique, the request for a better one.
    roles = [message["role"] for message in server.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    chats = PackedChats.read(out / "chats.jsonl", Tokenizer.load(tiny_tokenizer_folder), row_length=128)
    assert len(chats) > 0


def test_ratings_filter_chats(run):
    records = [{"messages": [*question("Why?"), {"role": "assistant", "content": "x" * size}]} for size in (2, 7, 30)]
    code, out, said = run(records, task="{kind: rate, keep_at_least: 7}")
    assert code == 0, said
    assert [line["metadata"]["rating"] for line in read_lines(out / "chats.jsonl")] == [7.0, 10.0]
    [left] = read_lines(out / "aside.jsonl")
    assert (left["place"][-1], left["reason"], left["rating"]) == ("1", "low rating", 2.0)


def test_killed_run_continues_where_it_was(run, server):
    """Replies that arrived before SIGKILL are not asked for again."""
    go_on, reached = threading.Event(), threading.Event()

    def says(body, number):
        if number >= 6 and not go_on.is_set():
            reached.set()
            go_on.wait(20)
        return reply(body, number)

    server.reply = says
    process = run(PAIRS, "judge.concurrent=1", process=True)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    go_on.set()
    before = len(server.bodies)
    code, out, said = run(PAIRS, "judge.concurrent=1")
    assert code == 0, said
    assert before == 7
    assert len(server.bodies) == 16 + 1  # the one that was under way is asked for again
    assert run(PAIRS, f"output={out}-at-once")[0] == 0
    assert (out / "preferences.jsonl").read_bytes() == (out.parent / "out-at-once/preferences.jsonl").read_bytes()


def test_two_processes_do_not_write_one_folder(run, server, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(epath.Path(tmp_path / "out"), seconds=0):
        code, _, said = run(PAIRS)
    assert code == 2
    assert "output: another process writes" in said
    assert server.bodies == []


BAD_JUDGES = {
    "timeout": lambda body, number: threading.Event().wait(0.3) or completion("late"),
    "nonsense": lambda body, number: completion("What a lovely day"),
    "error page": lambda body, number: (502, {"content-type": "text/html"}, b"<h1>Bad gateway</h1>"),
    "page as 200": lambda body, number: (200, {"content-type": "text/html"}, b"<h1>Log in</h1>"),
    "broken connection": lambda body, number: None,
}


@pytest.mark.parametrize(("kind", "detail"), [
    ("timeout", "does not answer in 0.1 s"),
    ("nonsense", "no verdict of judge-1 could be read: the last reply has no line Verdict: X"),
    ("error page", "answers 502: <h1>Bad gateway</h1>"),
    ("page as 200", "what is no chat completion (text/html): <h1>Log in</h1>"),
    ("broken connection", "breaks off"),
])  # fmt: skip
def test_judge_that_fails_for_some_records_is_counted(run, server, kind, detail):
    """The third record fails; the others are labelled, and a later run asks for it again."""
    bad = BAD_JUDGES[kind]
    server.reply = lambda body, number: (bad if "Question 2" in str(body) else reply)(body, number)
    code, out, said = run(PAIRS, "limits.max_failed_fraction=0.2", "judge.timeout_seconds=0.1")
    assert code == 0, said
    assert len(read_lines(out / "preferences.jsonl")) == 7
    [left] = read_lines(out / "aside.jsonl")
    assert left["place"].endswith("records.jsonl:3")
    assert detail in left["detail"]
    assert read_manifest(out)["metrics"]["failed"] == 1
    if kind != "nonsense":  # a reply that says nothing is a reply, and is kept
        server.reply = reply
        assert run(PAIRS)[0] == 0
        assert len(read_lines(out / "preferences.jsonl")) == 8


@pytest.mark.parametrize("kind", BAD_JUDGES)
def test_judge_that_fails_too_often_ends_the_run(run, server, kind):
    bad = BAD_JUDGES[kind]
    server.reply = lambda body, number: (bad if "Question 3" in str(body) else reply)(body, number)
    code, out, said = run(PAIRS, "judge.timeout_seconds=0.1", "judge.concurrent=1")
    assert code == 3
    assert re.search(r"1 of \d+ records have no usable reply, which is above limits.max_failed_fraction=0.1 of 8", said)
    assert "records.jsonl:4: " in said
    assert re.search(r"\d of 8 records are done, and kept in .*/out: run the same command to go on", said)
    # What was judged is there, and the run can go on with a higher limit.
    assert len(read_lines(out / "preferences.jsonl")) >= 3
    assert not (out / "manifest.json").exists()
    assert run(PAIRS, "limits.max_failed_fraction=0.5", "judge.timeout_seconds=0.1")[0] == 0
    assert len(read_lines(out / "preferences.jsonl")) == 7


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["limits.max_requests=5"], "5 requests were sent, and limits.max_requests=5"),
        (["judge.prices={input: 100, output: 100}", "limits.max_cost=0.11"], "that is above limits.max_cost=0.11"),
    ],
)
def test_limits_hold_over_all_runs(run, server, overrides, sentence):
    code, out, said = run(PAIRS, *overrides)
    assert code == 2
    assert sentence in said
    assert "records are done, and kept in" in said
    sent = len(server.bodies)
    assert 0 < sent < 16
    assert run(PAIRS, *overrides)[0] == 2
    assert len(server.bodies) == sent
    assert run(PAIRS)[0] == 0
    assert len(server.bodies) == 16
    assert len(read_lines(out / "preferences.jsonl")) == 8


def test_refused_key_ends_the_run_with_one_sentence(run, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "abc")
    server.reply = lambda body, number: failure(401, '{"error": {"message": "wrong key"}}')
    code, out, said = run(PAIRS, "judge.api_key_variable=JUDGE_KEY", "judge.concurrent=1")
    assert code == 2
    assert "refuses the key in JUDGE_KEY (401): wrong key; 0 of 8 records are done" in said
    assert len(server.bodies) == 1
    assert "abc" not in "".join(path.read_text() for path in out.iterdir())


@pytest.mark.parametrize(
    ("records", "overrides", "sentence"),
    [
        ([], [], "records.jsonl: has no records; a record is a prompt alone"),
        ([{"prompt": question("a")}], [], "records.jsonl:1: has no answer; set model"),
        ([PAIRS[0], {"answers": ["a", "b"]}], [], "records.jsonl:2: lacks 'prompt'"),
        ([{"prompt": " ", "answers": ["a", "b"]}], [], "records.jsonl:1: the prompt is empty"),
        ([{"prompt": "a", "answers": ["a", 3]}], [], "records.jsonl:1: an answer must be a text or messages, not '3'"),
        ([{"prompt": "a", "answers": ["b", "\ud83d"]}], [], "records.jsonl:1: holds a lone surrogate"),
        ([{"prompt": "a", "answers": "b"}], [], "records.jsonl:1: answers must be a list"),
        ([{"prompt": "a", "answers": ["b"], "completion": "c"}], [], "records.jsonl:1: has completion and answers"),
        ([{"prompt": "a", "anwsers": ["b"]}], [], "unknown key 'anwsers'; did you mean 'answers'?"),
        (PAIRS, ["task.votes=3"], "task.votes: 3 votes under 2 principles repeat one"),
        (PAIRS, ["limits.max_cost=1"], "limits.max_cost: needs the prices of every endpoint"),
        (PAIRS, ["task.kind=choose"], "task.kind: 'choose' must be one of 'prefer', 'revise', 'rate'"),
        (PAIRS, ["judge.base_url=example.com"], "must begin with http:// or https://"),
        (PAIRS, ["judge={kind: local, path: nowhere}"], "nowhere: there is no such file or folder"),
        (PAIRS, ["judge.api_key_variable=NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY is not set"),
        (PAIRS, ["constitution=feedback/constitutoin"], "did you mean feedback/constitution?"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_sent(run, server, records, overrides, sentence, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    code, _, said = run(records, *overrides)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert server.bodies == []


def test_principles_must_have_what_the_task_asks(run, tmp_path):
    (tmp_path / "constitution.yaml").write_text("kind: constitution\nprinciples: [{id: a, prefer: Best}]\n")
    code, _, said = run(PAIRS, "task={kind: revise}")
    assert code == 2
    assert "no principle has critique and revise, which revise asks" in said
    (tmp_path / "constitution.yaml").write_text("kind: constitution\nprinciples: [{id: a}, {id: a}]\n")
    assert "the id 'a' is given twice" in run(PAIRS)[2]


def test_pairs_of_a_file_are_labelled_anew(run):
    record = {"prompt": question("a"), "chosen": "Yes.", "rejected": "Yes, I say.", "ratings": [1, 2]}
    code, out, said = run([record], "ignore_keys=[ratings]")
    assert code == 0, said
    [line] = read_lines(out / "preferences.jsonl")
    assert {line["chosen"], line["rejected"]} == {"Yes.", "Yes, I say."}


def test_judgments_are_allowed_in_pairs_only_by_their_names(tmp_path):
    from maxlm.data.examples.records import parse_pair
    from maxlm.errors import DataError

    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    judged = {**pair, "judge": "j", "principles": ["p"], "votes": ["chosen"], "confidence": 1.0}
    assert parse_pair(judged, "here", RecordFormat()) == ("a", "b", "c")
    with pytest.raises(DataError, match="unknown key 'confidense'; did you mean 'confidence'"):
        parse_pair({**pair, "confidense": 1.0}, "here", RecordFormat())


def test_example_of_the_page_in_python(server, capsys):
    page = Path(__file__).parents[2] / "docs" / "ai-feedback.md"
    [example] = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(example.replace("http://127.0.0.1:8000/v1", server.base_url), {})
    assert capsys.readouterr().out == "second 1.0\n"
