"""`maxlm prompt`: templates checked against the data, examples, formats, and the task files that it writes."""

import json

import pytest

from maxlm.cli import main
from maxlm.config import load_config
from maxlm.data.examples.prompts import build_prompts, open_builder
from maxlm.eval.tasks import read_examples
from maxlm.tokenizer.codec import Tokenizer

CONFIG = """
kind: prompt
instructions: Say what it is. {{ format }}
question: "Is {{ name }} an animal?"
answer: "Answer: {{ label }}"
format: {kind: choices, choices: ["yes", "no"]}
examples: {file: POOL, count: 2, select: balanced, label: label}
"""
POOL = [
    {"name": name, "label": "yes" if number % 2 else "no"}
    for number, name in enumerate(("stone", "cat", "chair", "dog", "lamp", "cow"))
]
DATA = [{"name": "cat", "label": "yes"}, {"name": "{{ format }}", "label": "no"}]
FORMAT = 'End with one line, "Answer: X", where X is yes or no.'


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Writes a configuration, data and examples; gives the paths of the first two."""

    def write(config=CONFIG, data=DATA, pool=POOL):
        write_lines(tmp_path / "pool.jsonl", pool)
        (tmp_path / "prompt.yaml").write_text(config.replace("POOL", str(tmp_path / "pool.jsonl")), encoding="utf-8")
        return str(tmp_path / "prompt.yaml"), write_lines(tmp_path / "data.jsonl", data)

    return write


def prompts(config, data, *overrides):
    loaded = load_config(config, overrides, kind="prompt")
    return [built for _, built in build_prompts(open_builder(loaded, where="prompt.yaml"), data)]


def test_a_chat_shows_examples_as_turns(files):
    first, second = prompts(*files())
    system, *turns, question = first.prompt
    assert system == {"role": "system", "content": f"Say what it is. {FORMAT}"}
    assert question == {"role": "user", "content": "Is cat an animal?"}
    assert [message["role"] for message in turns] == ["user", "assistant"] * 2
    assert {message["content"] for message in turns[1::2]} == {"Answer: yes", "Answer: no"}
    assert question["content"] not in [message["content"] for message in turns]
    assert first.answer == "Answer: yes"
    assert all("pool.jsonl:" in place for place in first.examples)
    # Data is never read as a template.
    assert second.prompt[-1]["content"] == "Is {{ format }} an animal?"


def test_a_text_joins_all_parts(files):
    config = CONFIG.replace('"Is {{ name }} an animal?"', '"Q: {{ name }}\\nA:"').replace('"Answer:', '" Answer:')
    first, _ = prompts(*files(config), "form=text", "examples.count=1")
    parts = first.prompt.split("\n\n")
    assert parts[0].startswith("Say what it is.")
    assert parts[1].startswith("Q: ")
    assert " Answer: " in parts[1]
    assert parts[2] == "Q: cat\nA:"


def test_without_examples_and_with_loops_and_conditions(files):
    config = """
kind: prompt
question: "{% for choice in choices %}{{ loop.index }}) {{ choice }} {% endfor %}{% if hint %}({{ hint }}){% endif %}"
answer: '{"a": {{ choices[0] | tojson }}}'
"""
    records = [{"choices": ["<a>", "b"], "hint": None}, {"choices": ["c"], "hint": "look"}]
    first, second = prompts(*files(config, records))
    assert first.prompt == [{"role": "user", "content": "1) <a> 2) b "}]
    assert first.answer == '{"a": "<a>"}'
    assert second.prompt[0]["content"] == "1) c (look)"


def test_show_prints_prompts_with_token_counts(files, tiny_tokenizer_folder, capsys):
    config, data = files()
    assert main(["prompt", "show", config, "--data", data, "-n", "1", "--tokenizer", tiny_tokenizer_folder]) == 0
    shown = capsys.readouterr().out
    [first, _] = prompts(config, data)
    count = len(Tokenizer.load(tiny_tokenizer_folder).encode_chat(first.prompt, generation_prompt=True).ids)
    assert shown.startswith(f"===== {data}:1, {count} tokens\nexamples: ")
    assert "----- user\nIs cat an animal?\n----- right answer\nAnswer: yes\n" in shown
    assert main(["prompt", "show", config, "--data", data, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tokens"] for line in lines] == [None, None]
    assert lines[0]["messages"] == first.prompt


def test_build_writes_a_task_that_evaluation_reads(files, tmp_path, capsys):
    config, data = files()
    task = tmp_path / "task.jsonl"
    assert main(["prompt", "build", config, "--data", data, "--output", str(task)]) == 0
    assert "task.jsonl: 2 prompts" in capsys.readouterr().err
    first, second = read_examples(task)
    assert first.prompt == prompts(config, data)[0].prompt
    assert (first.read("I think so.\n**Answer:** Yes."), first.read(first.answer)) == ("yes", "yes")
    assert second.read(second.answer) == "no"


def test_questions_have_a_kind_by_which_evaluation_groups(files, tmp_path):
    config, data = files(CONFIG.replace("format:", 'group: "{{ name }} or not"\nformat:'))
    task = tmp_path / "task.jsonl"
    assert main(["prompt", "build", config, "--data", data, "--output", str(task)]) == 0
    assert [example.kind for example in read_examples(task)] == [f"{item['name']} or not" for item in DATA]


def test_data_without_answers(files, tmp_path):
    config, data = files(data=[{"name": "cat"}])
    task = tmp_path / "task.jsonl"
    assert main(["prompt", "build", config, "--data", data, "--output", str(task), "--without-answers"]) == 0
    assert "answer" not in json.loads(task.read_text())


@pytest.mark.parametrize(
    ("change", "data", "pool", "sentence"),
    [
        (("{{ name }}", "{{ nmae }}"), DATA, POOL, "question: {{ nmae }} is unknown; did you mean {{ name }}? "),
        (("{{ name }}", "{{ word }}"), DATA, POOL, "question: {{ word }} is unknown; "),
        (("{{ name }}", "{{ name }"), DATA, POOL, "question: line 1 of the template: "),
        (("{{ name }}", "{{ name | upperr }}"), DATA, POOL, "No filter named 'upperr'"),
        (("format:", "# "), DATA, POOL, "instructions: {{ format }} is unknown; "),
        (("", ""), [{"name": "cat"}], POOL, "answer: {{ label }} is unknown; "),
        (("", ""), [DATA[0], {"label": "no"}], POOL, "data.jsonl:2: cannot be put into the template"),
        (("", ""), [{"name": None, "label": "no"}], POOL, "data.jsonl:1: cannot be put into the template"),
        (("", ""), [{"name": ["a"], "label": "no"}], POOL, "a value is a list; use if, for, join or tojson"),
        (
            ("", ""),
            [{"name": "a", "label": "perhaps"}],
            POOL,
            "data.jsonl:1: the right answer does not have the form",
        ),
        (
            ("", ""),
            DATA,
            [{"name": "a", "label": "perhaps"}],
            "pool.jsonl:1: the right answer does not have the form",
        ),
        (("", ""), [{"name": "\ud83d", "label": "no"}], POOL, "data.jsonl:1: holds a lone surrogate"),
        (("", ""), DATA, [{"name": "\ud83d", "label": "no"}], "pool.jsonl:1: holds a lone surrogate"),
        (("", ""), [], POOL, "data.jsonl: has no records"),
        (("", ""), DATA, [], "pool.jsonl: has no examples"),
        (("", ""), DATA, [{"name": "cat"}], "answer: {{ label }} is unknown; "),
        (("", ""), DATA, POOL[:2], "pool.jsonl: has 1 different examples besides the question itself, and 2 are to"),
        (("", ""), [{**DATA[0], "format": "x"}], POOL, "data.jsonl:1: has the column 'format'"),
        (("label: label", "label: kind"), DATA, POOL, "pool.jsonl:1: lacks 'kind', which examples.label names"),
        ((", label: label", ""), DATA, POOL, "label: must be given with select: balanced"),
        (('"no"]', '"Yes"]'), DATA, POOL, "format: choices: must be two or more different words"),
        (("kind: choices", "kind: choice"), DATA, POOL, "did you mean choices?"),
        (("answer: ", "# "), DATA, POOL, "answer: must be given to show examples"),
    ],
)
def test_mistakes_are_one_sentence(change, data, pool, sentence, files, capsys):
    config, data = files(CONFIG.replace(*change) if change[0] else CONFIG, data, pool)
    assert main(["prompt", "show", config, "--data", data]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    if "is unknown" in sentence:
        assert f"{data}:1 has name" in said or "pool.jsonl:1 has name" in said


def test_output_must_be_another_file(files, tmp_path, capsys):
    config, data = files()
    assert main(["prompt", "build", config, "--data", data, "--output", data]) == 2
    assert "is the data; give another path" in capsys.readouterr().err
    assert main(["prompt", "build", config, "--data", data, "--output", str(tmp_path)]) == 2
