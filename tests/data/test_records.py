"""Records in common formats; unsupported content is rejected with file and line."""

import json

import pyarrow
import pyarrow.parquet as parquet
import pytest

from maxlm.config.data import RecordFormat
from maxlm.data.examples.messages import parse_messages
from maxlm.data.examples.records import parse_chat, parse_judged, parse_pair, parse_prompt, read_records
from maxlm.data.examples.tool_calls import link_results
from maxlm.errors import DataError

Q, A = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
PARSED_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
NO, OTHER = {"role": "assistant", "content": "no."}, {"role": "user", "content": "how?"}


def parsed(parse, record, **form):
    return parse(record, "f.jsonl:3", RecordFormat(**form))


CALLS = {"role": "assistant", "content": "", "tool_calls": [PARSED_CALL]}
RESULT = {"role": "tool", "content": "sunny"}


def calling(arguments):
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


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
    assert parsed(parse_chat, record) == (None, messages, None)


TOOL_CHATS = {
    "OpenAI": {
        "messages": [
            Q,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            A,
        ],
        "tools": [{"type": "function", "function": WEATHER}],
        "parallel_tool_calls": True,
    },
    "OpenAI's older form": {
        "messages": [
            Q,
            {"role": "assistant", "content": "", "function_call": CALL["function"]},
            {"role": "function", "name": "weather", "content": "sunny"},
            A,
        ],
        "functions": [WEATHER],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "why?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "so."},
        ],
        "tools": json.dumps([WEATHER]),
    },
}


@pytest.mark.parametrize("kind", TOOL_CHATS)
def test_tool_calls_in_common_forms(kind):
    _, messages, tools = parsed(parse_chat, TOOL_CHATS[kind])
    assert tools == [{"type": "function", "function": WEATHER}]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = messages[1]["tool_calls"]
    assert call["function"] == PARSED_CALL["function"]
    assert (messages[1]["content"], messages[2]["content"]) == ("", "sunny")
    # What is parsed is a chat in the first form.
    assert parse_messages(messages, "f", RecordFormat()) == messages


def test_results_get_the_ids_of_their_calls():
    other = {"function": {"name": "time", "arguments": {}}}
    messages = parse_messages(
        [
            Q,
            {"role": "assistant", "tool_calls": [CALL, other]},
            {"role": "tool", "content": "noon", "tool_call_id": "call00002"},
            {"role": "tool", "content": "sunny"},
        ],
        "f",
        RecordFormat(),
    )
    linked = link_results(messages, "f")
    assert [call["id"] for call in linked[1]["tool_calls"]] == ["c1", "call00002"]
    assert [(m["tool_call_id"], m["name"]) for m in linked[2:]] == [("call00002", "time"), ("c1", "weather")]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([Q, RESULT], r"message 2 is the result of a tool, but no answer right before it makes such a call"),
        ([Q, A, RESULT], r"message 3 is the result of a tool"),
        ([Q, CALLS, RESULT, RESULT], r"message 4 is the result of a tool"),
        ([Q, CALLS, Q, RESULT], r"message 4 is the result of a tool"),
        ([Q, CALLS, RESULT | {"tool_call_id": "c9"}], r"message 3 is the result of the call 'c9'"),
    ],
)
def test_results_without_a_call_are_refused(messages, sentence):
    with pytest.raises(DataError, match=rf"^f:3: {sentence}"):
        link_results(messages, "f:3")


def test_a_prompt_and_its_completion():
    assert parsed(parse_chat, {"prompt": "a", "completion": "b"}) == ("a", "b", None)
    assert parsed(parse_chat, {"prompt": [Q], "completion": [A]}) == ([Q], [A], None)


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
    r"the record has the unknown key 'tool'; did you mean 'tools'": {"messages": [Q, A], "tool": "[]"},
    r"message 2: tool_calls must be an object with the name of a function": {
        "messages": [Q, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    },
    r"message 2: tool_calls: arguments: is not JSON": {"messages": [Q, calling('{"city": ')]},
    r"message 2: tool_calls: arguments must be an object": {"messages": [Q, calling("[1]")]},
    r"message 2: tool_calls is of type 'custom', but only functions": {
        "messages": [Q, A | {"tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]
    },
    r"message 2, a function_call: is not JSON: .*; to learn it as text, set objective.roles.function_call=assistant": {
        "conversations": [{"from": "human", "value": "why?"}, {"from": "function_call", "value": "search(x)"}]
    },
    r"message 1 of role 'user' calls tools, but only the assistant can": {"messages": [Q | {"tool_calls": [CALL]}]},
    r"message 2 has both tool_calls and function_call": {
        "messages": [Q, A | {"tool_calls": [CALL], "function_call": CALL["function"]}]
    },
    r"message 2 must be an object with role and content.*only an answer that calls tools may have no content": {
        "messages": [Q, {"role": "assistant", "content": None}]
    },
    r"tools must be a list of functions, or its JSON text, not dict": {"messages": [Q, A], "tools": {"name": "f"}},
    r"tools: is not JSON": {"messages": [Q, A], "tools": "search"},
    r"tool 2 must be a function: an object with a name": {"messages": [Q, A], "tools": [{"name": "f"}, {}]},
    r"has both tools and functions": {"messages": [Q, A], "tools": [{"name": "f"}], "functions": [{"name": "f"}]},
    r"message 2: name must be a string that is not empty": {"messages": [Q, A | {"name": " "}]},
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
    assert parsed(parse_chat, record, ignore_keys=["name", "label", "tool_calls"])[1] == [Q, A]
    form = RecordFormat(ignore_keys=["tool_calls"])
    with pytest.raises(DataError, match="message 1 is empty without its tool_calls"):
        parse_messages([{"role": "assistant", "content": "", "tool_calls": [1]}], "f", form)


def test_tools_of_judged_answers_are_refused_and_not_ignored():
    record = {"messages": [Q, A], "label": True, "tools": [WEATHER]}
    with pytest.raises(DataError, match=r"f\.jsonl:3: has tools, which only chats for SFT may have"):
        parsed(parse_judged, record)
    assert parsed(parse_judged, record, ignore_keys=["tools"]) == [([Q], [A], True)]


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
