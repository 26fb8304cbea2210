"""Records in common formats; unsupported content is rejected with file and line."""

import json

import pyarrow
import pyarrow.parquet as parquet
import pytest

from maxlm.config.data import RecordFormat
from maxlm.data.messages import parse_messages
from maxlm.data.records import parse_chat, parse_pair, parse_prompt, read_records
from maxlm.errors import DataError

Q, A = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
SYSTEM = {"role": "system", "content": "be brief"}
NO, OTHER = {"role": "assistant", "content": "no."}, {"role": "user", "content": "how?"}


def parsed(parse, record, **form):
    return parse(record, "f.jsonl:3", RecordFormat(**form))


CHATS = {
    "messages": ({"messages": [SYSTEM, Q, A], "id": 7, "source": "x"}, [SYSTEM, Q, A]),
    "content parts": (
        {"messages": [Q | {"content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]}, A]},
        [Q, A],
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]}, [Q, A]),
    "ShareGPT with a system": (
        {"system": "be brief", "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]},
        [SYSTEM, Q, A],
    ),
    "Alpaca": ({"instruction": "why?", "input": "", "output": "so."}, [Q, A]),
    "Alpaca with more": (
        {"instruction": "a", "input": "b", "output": "so.", "system": "be brief", "history": [["why?", "so."]]},
        [SYSTEM, Q, A, {"role": "user", "content": "a\nb"}, A],
    ),
    "empty keys": ({"messages": [Q | {"name": None}, A | {"tool_calls": [], "refusal": None}], "tools": None}, [Q, A]),
    "weights": (
        {"messages": [Q, A | {"weight": 0}, Q, A | {"train": True}]},
        [Q, A | {"weight": 0.0}, Q, A | {"weight": 1.0}],
    ),
}


@pytest.mark.parametrize("kind", CHATS)
def test_chats_in_common_forms(kind):
    record, messages = CHATS[kind]
    assert parsed(parse_chat, record) == (None, messages)


def test_a_prompt_and_its_completion():
    assert parsed(parse_chat, {"prompt": "a", "completion": "b"}) == ("a", "b")
    assert parsed(parse_chat, {"prompt": [Q], "completion": [A]}) == ([Q], [A])


PAIRS = {
    "prompt": {"prompt": [Q], "chosen": [A], "rejected": [NO]},
    "the prompt again": {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, NO]},
    "the prompt as text again": {"prompt": "why?", "chosen": [Q, A], "rejected": [Q, NO]},
    "no prompt": {"chosen": [Q, A], "rejected": [Q, NO]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "why?"}],
        "chosen": {"from": "gpt", "value": "so."},
        "rejected": {"from": "gpt", "value": "no."},
    },
    "OpenAI": {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [NO]},
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_in_common_forms(kind):
    assert parsed(parse_pair, PAIRS[kind]) == ([Q], [A], [NO])


def test_pairs_of_strings_may_omit_their_common_prompt():
    record = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert parsed(parse_pair, record) == ("The sky is ", "blue.", "black.")
    assert parsed(parse_pair, {"instruction": "why?", "chosen": "so.", "rejected": "no."}) == ([Q], "so.", "no.")


def test_fields_and_roles_can_be_renamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "why?", "reward": {"truth": "so."}}))
    form = RecordFormat(fields={"prompt": "question", "answer": "reward.truth"})
    ((where, record),) = read_records(path, form)
    assert (parse_prompt(record, where, form), record["answer"]) == ("why?", "so.")
    with pytest.raises(DataError, match=r"a\.jsonl:1: lacks 'problem', which objective\.fields names for 'prompt'"):
        list(read_records(path, RecordFormat(fields={"prompt": "problem"})))
    seen = [{"from": "observation", "value": "why?"}, {"from": "function_call", "value": "so."}]
    roles = {"observation": "user", "function_call": "assistant"}
    assert parsed(parse_chat, {"conversations": seen, "tools": "[]"}, roles=roles, ignore_keys=["tools"])[1] == [Q, A]


def test_parquet_files_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": [Q, A | {"weight": 0.5}]}]), path)
    ((where, record),) = read_records(path)
    assert where == f"{path}, row 0"
    assert parsed(parse_chat, record)[1] == [Q, A | {"weight": 0.5}]


def test_two_records_on_a_line_have_different_places(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a":1}{"a":2}')
    assert [where for where, _ in read_records(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:{n}" for n in ("1", "1:8")
    ]


REFUSED = {
    r"message 2 has the unknown key 'wieght'; did you mean 'weight'": {"messages": [Q, A | {"wieght": 0}]},
    r"message 2 has the unknown key 'loss_mask'": {"messages": [Q, A | {"loss_mask": 0}]},
    r"the record has the unknown key 'tools'; known are messages, system; or list it": {
        "messages": [Q, A],
        "tools": "[]",
    },
    r"message 2 calls tools \(tool_calls\)": {
        "messages": [Q, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]
    },
    r"message 2 must be an object with role and content": {"messages": [Q, {"role": "assistant"}]},
    r"message 1 must have either role and content, or from and value, not both": {"messages": [Q | {"from": "gpt"}]},
    r"part 2 of message 1 is of type 'image_url', but only text is supported": {
        "messages": [Q | {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]
    },
    r"message 2: weight must be a number of at least 0, true or false, not -1": {"messages": [Q, A | {"weight": -1}]},
    r"message 2: weight must be .* not 'high'": {"messages": [Q, A | {"weight": "high"}]},
    r"message 2: weight and train contradict each other": {"messages": [Q, A | {"weight": 1, "train": False}]},
    r"is one message; give all of a chat as one object": Q,
    r"lacks 'messages'; it has text; a chat has messages or conversations \(.*\), instruction and": {"text": "a"},
    r"lacks 'output'": {"instruction": "a"},
    r"history must be a list of": {"instruction": "a", "output": "b", "history": "c"},
    r"instruction, input and history must be strings": {"instruction": ["a"], "input": ["b"], "output": "c"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_unsupported_content_of_a_chat_is_rejected(sentence):
    with pytest.raises(DataError, match=rf"^f\.jsonl:3: {sentence}") as error:
        parsed(parse_chat, REFUSED[sentence])
    assert "\n" not in str(error.value)


def test_ignored_keys_must_not_leave_an_empty_answer():
    record = {"messages": [Q | {"name": "Ann"}, A | {"tool_calls": [1]}], "label": True}
    assert parsed(parse_chat, record, ignore_keys=["name", "label", "tool_calls"]) == (None, [Q, A])
    form = RecordFormat(ignore_keys=["tool_calls"])
    with pytest.raises(DataError, match="message 1 is empty without its tool_calls"):
        parse_messages([{"role": "assistant", "content": "", "tool_calls": [1]}], "f", form)


def test_invalid_pairs_are_rejected():
    for record, sentence in (
        (
            {"chosen": [Q, A], "rejected": [OTHER, NO]},
            "lacks 'prompt', and chosen and rejected have no common beginning",
        ),
        ({"messages": [Q, A], "label": True}, "lacks 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 3}, "the unknown key 'score_chosen'"),
    ):
        with pytest.raises(DataError, match=sentence):
            parsed(parse_pair, record)
