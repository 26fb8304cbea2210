"""The recipe of word problems: its files are in GSM8K's form, its final numbers are right, its configurations load."""

import json
import re

import make_word_problems
import pytest
import word_problems

from maxlm.config.load import load_config
from maxlm.config.recipes import recipe_folder
from maxlm.eval.tasks import read_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("word_problems")
    make_word_problems.main(folder)
    return folder


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_same_files_are_written_again(data, tmp_path):
    make_word_problems.main(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


def test_each_calculation_and_each_final_number_is_right(data):
    for record in records(data / "train.jsonl") + records(data / "test.jsonl"):
        *steps, final = record["answer"].split("\n")
        assert len(steps) in (1, 2)
        for step in steps:
            expression, result, written = re.search(r"<<([-+*/\d]+)=(\d+)>>(\d+)", step).groups()
            assert eval(expression) == int(result) == int(written), record
        assert final == f"#### {result}"


def test_no_held_out_question_is_trained_on(data):
    questions = [record["question"] for name in ("train", "test") for record in records(data / f"{name}.jsonl")]
    assert len(set(questions)) == len(questions) == 6400


def test_the_task_reads_final_numbers_and_counts_steps(data, tmp_path):
    word_problems.write_data(tmp_path, data / "train.jsonl", data / "test.jsonl", 20)
    examples = read_examples(tmp_path / "task.jsonl")
    assert len(examples) == 20
    assert {example.kind for example in examples} == {"1 step", "2 steps"}
    for example in examples:
        assert example.read(example.answer) == example.answer.split("#### ")[1]


@pytest.mark.parametrize("name", ["tokenizer", "data", "pretrain", "sft", "grpo"])
def test_configuration_loads(name):
    load_config(recipe_folder() / "recipes" / "word_problems" / f"{name}.yaml")
