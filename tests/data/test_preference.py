"""Preference pairs and prompts from a file to batches."""

import json

import numpy as np
import pytest

from maxlm.config import TokenizerConfig
from maxlm.data.examples.encoding import encode_answer
from maxlm.data.examples.preference import PreferencePairs, read_prompts
from maxlm.errors import DataError
from maxlm.tokenizer.train import train_tokenizer

QUESTION = [{"role": "user", "content": "say yes"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("what is one and one? two. say yes or no.\n" * 50, encoding="utf-8")
    config = {"kind": "tokenizer", "output": str(folder / "out"), "input": str(folder / "text.txt"), "vocab_size": 300}
    return train_tokenizer(TokenizerConfig(**config))


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def learned(tokenizer, batch, row):
    return tokenizer.decode(batch.targets[row][batch.loss_weights[row] > 0], skip_control=False)


def test_loss_is_only_on_the_answers(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": QUESTION, "chosen": "yes", "rejected": "no"})
    pairs = PreferencePairs.read(path, tokenizer, row_length=64)
    batch = pairs.batch(np.array([0]))
    assert learned(tokenizer, batch["chosen"], 0) == "yes<|end|>"
    assert learned(tokenizer, batch["rejected"], 0) == "no<|end|>"
    whole = tokenizer.encode_chat([*QUESTION, {"role": "assistant", "content": "yes"}]).ids
    np.testing.assert_array_equal(batch["chosen"].tokens[0][batch["chosen"].segment_ids[0] > 0], whole)
    np.testing.assert_array_equal(batch["chosen"].positions[0, : len(whole)], np.arange(len(whole)))


TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "add", "arguments": '{"x": 1}'}}]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "two"}
SAID = {"role": "assistant", "content": "two"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": QUESTION, "chosen": [CALL, RESULT, SAID], "rejected": "no", "tools": TOOLS},
        {
            "input": {"messages": QUESTION, "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [CALL, RESULT, SAID],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        },
    ],
    ids=["messages", "OpenAI"],
)
def test_answers_of_a_pair_may_call_its_tools(record, tokenizer, tmp_path):
    """Both prompts show the tools; calls are learned, and results are not."""
    batch = PreferencePairs.read(write(tmp_path / "p.jsonl", record), tokenizer, row_length=1024).batch(np.array([0]))
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    assert learned(tokenizer, batch["chosen"], 0) == f"{call}<|end|>two<|end|>"
    assert learned(tokenizer, batch["rejected"], 0) == "no<|end|>"
    asked = tokenizer.encode_chat(QUESTION, tools=TOOLS, generation_prompt=True).ids
    for name in ("chosen", "rejected"):
        assert batch[name].tokens[0, : len(asked)].tolist() == asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "say yes"}, "p.jsonl:1: the prompt is a text, but tools need messages"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "p.jsonl:1: tool 1 is of type 'retrieval'"),
        ({"functions": [{"name": "f"}]}, "p.jsonl:1: has both tools and functions"),
        ({"chosen": [RESULT, SAID]}, "p.jsonl:1: message 2 is the result of the call 'a', but no answer"),
    ],
    ids=["text", "no function", "twice", "no call"],
)
def test_malformed_tools_of_a_pair_are_refused(changes, message, tokenizer, tmp_path):
    record = {"prompt": QUESTION, "chosen": "yes", "rejected": "no", "tools": TOOLS, **changes}
    with pytest.raises(DataError, match=message):
        PreferencePairs.read(write(tmp_path / "p.jsonl", record), tokenizer, row_length=1024)


def test_earlier_answers_are_part_of_the_prompt(tokenizer):
    prompt = [*QUESTION, {"role": "assistant", "content": "no"}, {"role": "user", "content": "say yes"}]
    sequence = encode_answer(tokenizer, prompt, "yes", "here")
    ids = [id_ for id_, weight in zip(sequence.ids, sequence.loss_weights) if weight]
    assert tokenizer.decode(ids, skip_control=False) == "yes<|end|>"
    assert sequence == encode_answer(tokenizer, prompt, [{"role": "assistant", "content": "yes"}], "here")


def test_plain_text_answer_ends_with_eos(tokenizer):
    sequence = encode_answer(tokenizer, "say", " yes", "here")
    assert sequence.ids == [tokenizer.bos_id, *tokenizer.encode("say"), *tokenizer.encode(" yes"), tokenizer.eos_id]
    assert sum(sequence.loss_weights) == len(tokenizer.encode(" yes")) + 1


def test_rows_are_no_longer_than_the_longest_answer(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": QUESTION, "chosen": "yes", "rejected": "no"})
    assert PreferencePairs.read(path, tokenizer, row_length=64).batch(np.array([0, -1]))["chosen"].tokens.shape == (
        2,
        16,
    )
    # Unless rows are sharded into more parts.
    assert PreferencePairs.read(path, tokenizer, row_length=96, parts=6).row_length == 48


def test_too_long_pairs_are_counted_and_skipped(tokenizer, tmp_path, capsys):
    short = {"prompt": QUESTION, "chosen": "yes", "rejected": "no"}
    long = {"prompt": QUESTION, "chosen": "yes", "rejected": "no " * 50}
    assert len(PreferencePairs.read(write(tmp_path / "p.jsonl", short, long), tokenizer, row_length=32)) == 1
    assert "1 of 2 pairs are longer" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match="all 1 pairs are longer than row_length=32"):
        PreferencePairs.read(write(tmp_path / "q.jsonl", long), tokenizer, row_length=32)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, r"p\.jsonl:1: lacks 'prompt'"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, r"p\.jsonl:1: lacks 'rejected'; did you mean"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"p\.jsonl:1: chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, r"p\.jsonl:1: if the prompt is a string"),
        ({"prompt": QUESTION, "chosen": "b", "rejected": 3}, r"p\.jsonl:1: an answer must be a string or a list"),
        ({"prompt": QUESTION, "chosen": "b", "rejected": QUESTION}, r"p\.jsonl:1: an answer has no message of role"),
        ({"prompt": [{"role": "x"}], "chosen": "b", "rejected": "c"}, r"p\.jsonl:1: "),
    ],
)
def test_bad_pair_is_reported_with_file_and_line(tokenizer, tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        PreferencePairs.read(write(tmp_path / "p.jsonl", record), tokenizer, row_length=32)


def test_margins_are_read_only_where_they_are_used(tokenizer, tmp_path):
    pair = {"prompt": QUESTION, "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "p.jsonl", {**pair, "margin": 1.5}, pair, {**pair, "margin": None}, {**pair, "margin": 2})
    pairs = PreferencePairs.read(path, tokenizer, row_length=32, with_margins=True)
    np.testing.assert_array_equal(pairs.batch(np.array([0, 1, 2, 3, -1])).values["margin_B"], [1.5, 0, 0, 2, 0])
    with pytest.raises(DataError, match=r"p\.jsonl:1: the record has the unknown key 'margin'"):
        PreferencePairs.read(path, tokenizer, row_length=32)
    for margin in (-1, float("inf"), float("nan"), "1", True, [1]):
        path = write(tmp_path / "p.jsonl", {**pair, "margin": margin})
        with pytest.raises(DataError, match=r"p\.jsonl:1: margin must be a number of 0 or more, not "):
            PreferencePairs.read(path, tokenizer, row_length=32, with_margins=True)


def test_prompts_keep_their_record_for_the_reward(tokenizer, tmp_path):
    record = {"prompt": QUESTION, "answer": "yes", "unit": "word"}
    (prompt,) = read_prompts(write(tmp_path / "g.jsonl", record), tokenizer, max_prompt_length=16, row_length=32)
    assert prompt.record == record
    assert prompt.text == QUESTION
    assert prompt.ids == tokenizer.encode_chat(QUESTION, generation_prompt=True).ids


def test_prompts_must_have_a_prompt_and_fit(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"g\.jsonl:1: lacks 'prompt'"):
        read_prompts(write(tmp_path / "g.jsonl", {"answer": "a"}), tokenizer, max_prompt_length=16, row_length=32)
    path = write(tmp_path / "g.jsonl", {"prompt": "a" * 50, "answer": "b"})
    with pytest.raises(DataError, match="all 1 prompts with their answers are longer"):
        read_prompts(path, tokenizer, max_prompt_length=16, row_length=32)
