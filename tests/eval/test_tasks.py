"""Strict parsing of task files; exact-match scoring of answers, and choices by log-probability."""

import json
import re

import numpy as np
import pytest

from maxlm.errors import DataError
from maxlm.eval.tasks import Example, answer_by_choice, answer_by_generation, read_examples, run_task
from maxlm.prompts.answer_formats import JsonFormat, RegexFormat

CHOICES = {"kind": "choices", "choices": ["yes", "no"]}
CHAT = [{"role": "user", "content": "the river and"}]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_reads_prompts_chats_and_choices(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2 + 2 =", "answer": "4", "kind": "sums"},
        {"messages": CHAT, "answer": "stone"},
        {"messages": [*CHAT, {"role": "assistant", "content": "falls"}]},
    )
    assert read_examples(path) == [
        Example("2 + 2 =", "4", (), "sums"),
        Example(CHAT, "stone"),
        Example(CHAT, "falls"),
    ]
    path = write(tmp_path / "b.jsonl", {"prompt": "The sky is", "choices": [" blue", " loud"], "answer": 1})
    assert read_examples(path) == [Example("The sky is", " loud", (" blue", " loud"))]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "4"}, "either prompt or messages"),
        ({"prompt": "a", "messages": CHAT, "answer": "b"}, "either prompt or messages"),
        ({"prompt": "", "answer": "b"}, "prompt must be a non-empty string"),
        ({"prompt": "a"}, "answer must be a non-empty string"),
        ({"prompt": "a", "answer": 4}, "answer must be a non-empty string"),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "two or more"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "index of the correct choice, 0 to 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "index of the correct choice"),
        ({"messages": [{"role": "user"}], "answer": "b"}, "role and content"),
        ({"messages": "hello", "answer": "b"}, "list of objects"),
        ({"prompt": "a", "answer": "b", "kind": 3}, "kind must be a string"),
        ({"prompt": "a", "answer": "b", "format": "json"}, "format: "),
        ({"prompt": "a", "answer": "b", "format": {"kind": "yaml"}}, "format: input tag 'yaml' found"),
        ({"prompt": "a", "answer": "b", "format": {"kind": "regex", "pattern": "("}}, "format: pattern: '\\('"),
        ({"prompt": "a", "answer": "b", "format": {"kind": "choices", "choices": ["a"]}}, "format.choices: "),
        ({"prompt": "a", "answer": "b", "format": CHOICES}, "answer does not have its own format: it has no line"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 0, "format": CHOICES}, "has choices, one of which is chosen"),
        ([1], "JSON object"),
    ],
)
def test_mistake_is_reported_with_its_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b"}, record)
    with pytest.raises(DataError, match=message) as error:
        read_examples(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_unknown_keys_raise_unless_ignored(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b", "id": 7, "anwser": "c"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: the record has the unknown key 'anwser'; did you mean 'answer'"):
        read_examples(path)
    assert read_examples(path, ignore_keys=["anwser"]) == [Example("a", "b")]


def test_invalid_task_files_raise(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no examples"):
        read_examples(tmp_path / "empty.jsonl")
    (tmp_path / "text.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match=r"text\.jsonl:1: is not JSON"):
        read_examples(tmp_path / "text.jsonl")
    mixed = write(
        tmp_path / "m.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "a", "choices": ["b", "c"], "answer": 0}
    )
    with pytest.raises(DataError, match="two files"):
        read_examples(mixed)


def test_answer_is_correct_if_it_matches_the_generated_text(model):
    prompts = ["the river", "water", CHAT, "a stone under"]
    written = model.generate(prompts, max_new_tokens=6)
    examples = [
        Example(prompts[0], f" {written[0]}\n", kind="as written"),
        Example(prompts[1], written[1] + "!", kind="changed"),
        Example(prompts[2], written[2] if written[2].strip() else "nothing", kind="as written"),
        Example(prompts[3], "never " * 9, kind="changed"),
    ]
    result = answer_by_generation(model, examples, max_new_tokens=6)
    expected = [1, 0, int(bool(written[2].strip())), 0]
    np.testing.assert_array_equal(result.correct, expected)
    assert result.outputs == tuple(written)
    assert result.accuracy.value == sum(expected) / 4
    assert set(result.by_kind) == {"as written", "changed"}
    assert result.by_kind["changed"].value == 0
    assert result.too_long == 0


def test_answers_with_a_format_are_read_from_what_is_generated(model):
    """The value counts and not the text around it; what holds none is wrong, and counted."""
    prompts = ["the river", "water"]
    first, second = model.generate(prompts, max_new_tokens=6)
    word = first.split()[0]
    form = RegexFormat(rf"({re.escape(word)})")
    assert word not in second
    result = answer_by_generation(model, [Example(prompt, word, format=form) for prompt in prompts], max_new_tokens=6)
    np.testing.assert_array_equal(result.correct, [1, 0])
    assert result.unreadable == 1
    person = JsonFormat({"type": "object"})
    example = Example("a", '{"name": "Ann", "age": 3}', format=person)
    assert example.read('So: {"age": 3, "name": "Ann"}.') == example.read(example.answer)


def test_example_longer_than_the_context_counts_as_wrong(model, sentences):
    long = Example(" ".join(sentences), "x")
    short = Example("the river", "x")
    result = answer_by_generation(model, [long, short, long], max_new_tokens=4)
    assert result.too_long == 2
    assert result.outputs[0] == ""
    choices = ("stone", "water")
    result = answer_by_choice(model, [Example(long.prompt, "water", choices), Example("the", "water", choices)])
    assert result.too_long == 1
    assert result.correct[0] == 0


def test_most_likely_choice_is_taken(model):
    choices = (" stone", " water and light", " falls")
    examples = [Example(prompt, choices[1], choices) for prompt in ("the river", "a", "under the light")]
    examples.append(Example(CHAT, choices[2], choices))
    result = answer_by_choice(model, examples)
    for example, output in zip(examples, result.outputs):
        assert output == choices[np.argmax([naive_log_probability(model, example.prompt, c) for c in choices])]
    np.testing.assert_array_equal(result.correct, [o == e.answer for o, e in zip(result.outputs, examples)])
    assert run_task(model, examples).outputs == result.outputs


def naive_log_probability(model, prompt, choice: str) -> float:
    """Sum over the choice's tokens, from all logits in float64."""
    if isinstance(prompt, str):
        before, ids = model.encode(prompt), model.encode(prompt + choice)
    else:
        before = model.encode(prompt)
        ids = before + model.tokenizer.encode(choice)
    # A token that spans the boundary belongs to the choice.
    first = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), len(before))
    logits = model.logits(np.array([ids]))[0].astype(np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_softmax[i - 1, ids[i]] for i in range(first, len(ids)))
