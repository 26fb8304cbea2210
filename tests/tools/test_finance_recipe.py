"""The finance recipe: its reports and questions agree, its rules tell right answers from wrong ones, its files load."""

import json
import random
import sys
from pathlib import Path

import pytest

from maxlm.config.load import load_config
from maxlm.config.recipes import recipe_folder
from maxlm.scoring.rewards import RewardPart, find_rewards

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "recipes"))

import finance_filter
import make_finance
from finance_reports import KINDS, NOT_STATED, ask, company_names, make_report
from finance_rules import right_citations, right_number


def questions(kind, count=50):
    rng = random.Random(1)
    for name in company_names(rng)[:count]:
        report = make_report(name, rng)
        yield report, ask(report, kind, rng)


def record(question):
    return {"value": question.value, "sources": [*question.sources]}


def right_value(kind, items, first=None, second=None):
    """What follows from the items that an answer cites and their numbers, in their order."""
    match kind:
        case "lookup" | "text":
            return str(first)
        case "difference":
            return str(first - second)
        case "total":
            return str(first + second)
        case "share":
            return f"{round(100 * first / second)}%"
        case "comparison":
            return items[0] if first > second else items[1]
        case "not stated":
            return NOT_STATED


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_report_and_earn_both_rewards(kind):
    for report, question in questions(kind):
        places = [source.split(", ") for source in question.sources]
        numbers = [report.value(place, item) for place, item in places]
        for source, number in zip(question.sources, numbers, strict=True):
            assert f"[{source}] {number}" in question.answer
        assert question.value == right_value(kind, [item for _, item in places], *numbers)
        assert right_number(None, [question.answer], record(question)) == [1.0]
        assert right_citations(None, [question.answer], record(question)) == [1.0]


def test_what_is_not_stated_is_in_no_report():
    for report, question in questions(NOT_STATED):
        item = question.text.removeprefix("What is stated for ").rstrip("?")
        assert item not in {**report.table, **report.text}


@pytest.mark.parametrize(
    ("answer", "value", "number"),
    [
        ("[table 1, costs] 45", "45", 1.0),
        ("[table 1, costs] 46", "45", 0.0),
        ("45 [table 1, costs]", "45", 1.0),
        ("[table 1, costs] 4", "1", 0.0),  # the number of a citation is none of the answer
        ("5 / 45 = 12%", "11%", 1.0),
        ("5 / 45 = 13%", "11%", 0.0),
        ("11", "11%", 0.0),
        ("10 - 15 = -5", "-5", 1.0),
        ("10 - 15 = 5", "-5", 0.0),
        ("Not stated", "not stated", 0.0),
        ("not stated.", "not stated", 1.0),
        ("45, or not stated", "not stated", 0.0),
        ("not stated", "45", 0.0),
        ("", "45", 0.0),
        ("4 > 3: costs", "costs", 1.0),
        ("4 > 3: rent", "costs", 0.0),
    ],
)
def test_numbers_are_read_after_citations_with_a_tolerance_for_percentages(answer, value, number):
    assert right_number(None, [answer], {"value": value}) == [number]


def test_citations_are_compared_as_a_set():
    wanted = {"sources": ["table 1, rent", "table 1, costs"]}
    texts = [
        "[table 1, costs] 4 - [table 1, rent] 3 = 1",
        "[table 1, rent] 3 < [table 1, costs] 4, see [table 1, rent]",
        "[table 1, costs] 4",
        "[table 1, costs] 4 - [table 1, rent] 3 - [text 1, shops] 0 = 1",
        "",
    ]
    assert right_citations(None, texts, wanted) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_rules_are_reward_functions_with_a_setting():
    part = RewardPart(name="finance_rules:right_number", settings={"percent_tolerance": 5.0})
    (reward,) = find_rewards([part])
    assert reward(None, ["= 13%"], {"value": "11%"}, [3]) == [1.0]


def test_data_is_the_same_each_time_and_files_share_no_company(tmp_path, monkeypatch):
    monkeypatch.setattr(make_finance, "TEXTS", 20)
    monkeypatch.setattr(make_finance, "DRILLS", 5)
    monkeypatch.setattr(make_finance, "CHATS", 20)
    for folder in ("a", "b"):
        make_finance.main(tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["annotated.jsonl", "chats.jsonl", "examples.jsonl", "held_out.jsonl", "new.jsonl", "text.jsonl"]
    companies = []
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        if file not in ("text.jsonl", "chats.jsonl"):
            companies.append({item["report"].splitlines()[0] for item in finance_filter.read(tmp_path / "a" / file)})
    texts = "".join((tmp_path / "a" / f"{name}.jsonl").read_text() for name in ("text", "chats"))
    assert sum(map(len, companies)) == len(set().union(*companies))
    assert not any(name.removeprefix("Report of ") in texts for name in set().union(*companies))


def test_filter_keeps_answers_of_the_model_that_are_right(tmp_path, capsys):
    (_, asked), *_ = questions("difference")
    item = {"report": "R", "question": asked.text, "kind": asked.kind, "answer": asked.answer, **record(asked)}
    right = asked.answer.replace(" = ", " is ")
    answers = [right, "not stated", asked.answer.replace("table 1", "text 1")]
    chats = [{"id": "new.jsonl:1", "messages": [{"role": "assistant", "content": text}]} for text in answers]
    for name, lines in (("annotated", [item]), ("new", [item]), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    finance_filter.main(tmp_path, tmp_path)
    assert finance_filter.read(tmp_path / "built.jsonl") == [item, {**item, "answer": right}]
    assert capsys.readouterr().out == "difference: kept 1 of 3 answers\n"


@pytest.mark.parametrize(
    "name", ["data", "tokenizer", "pretrain", "instruct", "few_shot", "chat", "qlora", "prefix", "answer"]
)
def test_configurations_load(name):
    load_config(recipe_folder() / "recipes" / "finance" / f"{name}.yaml")
