"""Answers agree with the real library, and held-out functions stay unseen."""

import importlib
import inspect
import json
import random
import re

import pytest

from maxlm.quickstart.questions import is_held_out, questions_about, read_functions
from maxlm.quickstart.tasks import HELD_OUT_FRACTION, write_tasks

# Modules whose import has no side effects, and whose functions have the signature of their source.
MODULES = ("bisect", "calendar", "colorsys", "fnmatch", "heapq", "json", "keyword", "shutil", "statistics", "textwrap")


@pytest.fixture(scope="module")
def functions():
    return read_functions()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, functions):
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        # Reading them takes most of the time, so it is done once.
        patch.setattr("maxlm.quickstart.tasks.read_functions", lambda: functions)
        write_tasks(folder)
    return {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}


def test_library_has_enough_functions(functions):
    assert len(functions) > 1500
    assert len({(function.module, function.name) for function in functions}) == len(functions)


def test_answers_agree_with_the_imported_functions(functions):
    checked = 0
    for function in functions:
        real = (
            getattr(importlib.import_module(function.module), function.name, None)
            if function.module in MODULES
            else None
        )
        if not inspect.isfunction(real):
            continue
        parameters = [
            parameter
            for parameter in inspect.signature(real).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        answers = {question.kind: question for question in questions_about(function, random.Random(0))}
        assert answers["first parameter"].answer == parameters[0].name
        assert answers["last parameter"].answer == parameters[-1].name
        assert answers["number"].answer == str(len(parameters))
        assert answers["module"].answer == real.__module__
        if "first word" in answers:
            assert inspect.getdoc(real).split()[0] == answers["first word"].answer
        if "default value" in answers:
            name = re.search(r"default of `(\w+)`", answers["default value"].prompt)[1]
            default = inspect.signature(real).parameters[name].default
            assert eval(answers["default value"].answer, vars(inspect.getmodule(real))) == default
        checked += 1
    assert checked > 20


def test_every_answer_is_in_its_question_or_a_count(functions):
    for function in random.Random(1).sample(functions, 200):
        for question in questions_about(function, random.Random(2)):
            assert question.answer in question.prompt or question.kind == "number"


def test_held_out_functions_are_in_no_training_file(functions, tasks):
    held_out = {function.name for function in functions if is_held_out(function, HELD_OUT_FRACTION)}
    pattern = re.compile(r"`(?:[\w.]*\.)?(\w+)(?:\(.*\))?`")

    def asked(text):
        return set(pattern.findall(text.rsplit(" in ", 1)[-1]))

    trained = {
        name
        for record in [*tasks["sft_train"], *tasks["prompts"]]
        for message in record.get("messages", record.get("prompt"))
        if message["role"] == "user"
        for name in asked(message["content"])
    }
    assert trained
    assert not trained & held_out
    tested = {name for record in tasks["questions"] for name in asked(record["prompt"][-1]["content"])}
    assert tested
    assert tested <= held_out


def test_every_kind_is_asked(tasks):
    kinds = {record["kind"] for record in tasks["questions"]}
    assert kinds == {"first parameter", "last parameter", "number", "module", "first word", "default value"}
    assert len(tasks["questions"]) > 1000  # enough for a useful interval
