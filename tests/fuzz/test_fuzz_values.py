"""For any input, the command line succeeds or reports the problem in one sentence: exit codes 0 to 3.

The cases are the same in every run; `MAXLM_FUZZ=10000 python -m pytest tests/fuzz` tries others.
"""

import json

import yaml
from hypothesis import given
from hypothesis import strategies as st
from odd_values import RECIPES, broken_text, changed, overrides
from one_command import build, cases, check, run, write

TREES = {name: yaml.safe_load(text) for name, text in RECIPES.items()}

CHAT = {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}
PAIR = {"prompt": [{"role": "user", "content": "Say hello."}], "chosen": "Hello.", "rejected": "No."}
SOLUTION = {"prompt": "What is 2 + 2?", "steps": ["It is 4.", "Or 5."], "labels": [True, False]}
QUESTION = {"prompt": "What is 2 + 2?", "answer": "4"}
CHOICE = {"prompt": "The sky is", "choices": [" blue", " loud"], "answer": 0, "kind": "sky"}
DOCUMENT = {"id": "a", "text": "Once upon a time there was a language model that read every file it was given."}


recipes = st.sampled_from(sorted(RECIPES))
changed_recipes = recipes.flatmap(
    lambda name: st.one_of(
        changed(TREES[name]).map(lambda tree: yaml.safe_dump(tree, sort_keys=False).encode()),
        broken_text(RECIPES[name]),
    )
)


@cases(250)
@given(changed_recipes, st.lists(overrides, max_size=2))
def test_configurations(place, text, settings):
    path = write(place / "case.yaml", text)
    code = check("config", "show", path, *settings)
    if code == 0:
        # The output loads again and resolves to the same.
        shown = run("config", "show", path, *settings)[1]
        write(path, shown.encode())
        assert run("config", "show", path) == (0, shown, "")


@st.composite
def record_files(draw, record: dict) -> bytes:
    """Lines of records, one of them invalid."""
    good = json.dumps(record)
    odd = draw(
        st.one_of(
            changed(record, most=3).map(json.dumps),
            changed(record).map(lambda tree: json.dumps(tree, ensure_ascii=False)),
            broken_text(good),
        )
    )
    odd = odd if isinstance(odd, bytes) else odd.encode("utf-8", "surrogatepass")
    lines = [good.encode()] * draw(st.integers(0, 2)) + [odd]
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(draw(st.permutations(lines)))


@cases(75)
@given(record_files(CHAT))
def test_chats(place, content):
    write(place / "records.jsonl", content)
    check("preview", "sft.yaml")


@cases(75)
@given(record_files(PAIR), st.sampled_from(["preference", "reward"]))
def test_preferences(place, content, kind):
    write(place / "records.jsonl", content)
    check("preview", f"{kind}.yaml", "-n", 1)


@cases(60)
@given(record_files(SOLUTION))
def test_solutions(place, content):
    write(place / "records.jsonl", content)
    check("preview", "process_reward.yaml", "-n", 1)


@cases(60)
@given(record_files(QUESTION))
def test_prompts(place, content):
    write(place / "records.jsonl", content)
    check("preview", "policy.yaml")


@cases(60)
@given(st.sampled_from([QUESTION, CHOICE, CHAT]).flatmap(record_files))
def test_tasks(place, content):
    write(place / "task.jsonl", content)
    check("eval", "model", "--task", "task.jsonl")


@cases(60)
@given(record_files(DOCUMENT), st.sampled_from([None, "id"]))
def test_documents(place, content, id_field):
    build(place, write(place / "documents.jsonl", content), id_field=id_field)


def test_valid_records_are_accepted(place):
    """Otherwise, rejecting everything would pass."""
    for record, kinds in (
        (CHAT, ["sft"]),
        (PAIR, ["preference", "reward"]),
        (SOLUTION, ["process_reward"]),
        (QUESTION, ["policy"]),
    ):
        write(place / "records.jsonl", json.dumps(record).encode())
        assert [check("preview", f"{kind}.yaml") for kind in kinds] == [0] * len(kinds)
    assert build(place, write(place / "right.jsonl", json.dumps(DOCUMENT).encode()), id_field="id") == 0
