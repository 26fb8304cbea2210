"""Chats from a file to packed rows: loss weights, validation errors, and the rows of a step."""

import json

import numpy as np
import pytest

from maxlm.config import TokenizerConfig
from maxlm.config.data import ChatConfig
from maxlm.data.examples.chat import EpochOrder, PackedChats, pack, padded_batches, training_order
from maxlm.data.examples.encoding import encode_prompt
from maxlm.data.examples.records import read_records
from maxlm.data.examples.tool_calls import link_results
from maxlm.errors import DataError
from maxlm.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("what is one and one? two. say yes or no.\n" * 50, encoding="utf-8")
    config = {"kind": "tokenizer", "output": str(folder / "out"), "input": str(folder / "text.txt"), "vocab_size": 300}
    return train_tokenizer(TokenizerConfig(**config))


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)]}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


CHATS = [chat("one and one?", "two."), chat("yes", "no", "no", "yes"), chat("say", "yes"), chat("what is one?", "one.")]


def segments_of(batch):
    """(tokens, targets, loss weights, positions) of each segment of each row."""
    for row in range(len(batch.tokens)):
        ids = batch.segment_ids[row]
        for segment in range(1, ids.max(initial=0) + 1):
            here = ids == segment
            yield tuple(x[row][here] for x in (batch.tokens, batch.targets, batch.loss_weights, batch.positions))


def test_every_chat_is_packed_once_and_whole_with_its_own_positions_and_weights(tokenizer, tmp_path):
    packed = PackedChats.read(write(tmp_path / "chats.jsonl", *CHATS), tokenizer, row_length=40)
    batch = packed.batch(np.arange(len(packed.rows)))["text"]
    expected = [tokenizer.encode_chat(record["messages"]) for record in CHATS]
    assert len(packed.rows) < len(CHATS), "several chats must share a row"

    found = []
    for tokens, targets, weights, positions in segments_of(batch):
        ids = [*tokens.tolist(), int(targets[-1])]
        match = next(chat for chat in expected if chat.ids == ids)
        np.testing.assert_array_equal(targets, ids[1:])
        np.testing.assert_array_equal(weights, match.loss_weights[1:])
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        found.append(ids)
    assert sorted(found) == sorted(chat.ids for chat in expected)
    padding = batch.segment_ids == 0
    assert not batch.tokens[padding].any()
    assert not batch.loss_weights[padding].any()


def test_loss_is_only_on_answers_and_their_end_tokens(tokenizer, tmp_path):
    packed = PackedChats.read(write(tmp_path / "chats.jsonl", CHATS[1]), tokenizer, row_length=40)
    batch = packed.batch(np.array([0]))["text"]
    learned = batch.targets[0][batch.loss_weights[0] > 0]
    assert tokenizer.decode(learned, skip_control=False) == "no<|end|>yes<|end|>"


def test_row_index_minus_one_is_padding(tokenizer, tmp_path):
    packed = PackedChats.read(write(tmp_path / "chats.jsonl", *CHATS), tokenizer, row_length=40)
    batch = packed.batch(np.array([0, -1]))["text"]
    assert batch.tokens.shape == (2, 40)
    assert not batch.segment_ids[1].any()
    np.testing.assert_array_equal(batch.tokens[0], packed.batch(np.array([0]))["text"].tokens[0])


@pytest.mark.parametrize("capacity", [8, 64, 1000])
def test_packing_places_every_item_once_within_capacity_and_tightly(capacity):
    lengths = np.random.default_rng(0).integers(1, capacity + 1, 2000)
    bins = pack(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(2000))
    sizes = [lengths[items].sum() for items in bins]
    assert max(sizes) <= capacity
    # Best-fit decreasing needs at most 11/9 of the optimum, which is at least the total over the capacity.
    assert len(bins) <= 11 / 9 * np.ceil(lengths.sum() / capacity) + 1


def test_too_long_chats_are_counted_and_skipped(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "chats.jsonl", CHATS[0], chat("one", "two " * 100))
    packed = PackedChats.read(path, tokenizer, row_length=40)
    assert len(packed.rows) == 1
    assert "1 of 2 chats are longer than row_length=40" in " ".join(capsys.readouterr().err.split())


def test_chat_that_exactly_fills_a_row_is_kept(tokenizer, tmp_path):
    length = len(tokenizer.encode_chat(CHATS[0]["messages"]).ids)
    path = write(tmp_path / "chats.jsonl", CHATS[0])
    assert len(PackedChats.read(path, tokenizer, row_length=length - 1).rows) == 1
    with pytest.raises(DataError, match="all 1 chats are longer than row_length"):
        PackedChats.read(path, tokenizer, row_length=length - 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"chats\.jsonl:2: is not JSON"),
        ("[1, 2]", r"chats\.jsonl:2: must be a JSON object"),
        ('{"mesages": []}', r"chats\.jsonl:2: lacks 'messages'; did you mean"),
        ('{"messages": []}', r"chats\.jsonl:2: messages must be a list"),
        ('{"messages": "hello"}', r"chats\.jsonl:2: messages must be a list"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', r"chats\.jsonl:2: chat role 'usr' is unknown.*'user'"),
        ('{"messages": [{"role": "user"}]}', r"chats\.jsonl:2: message 1 .* content"),
    ],
)
def test_bad_line_is_reported_with_file_and_line(tokenizer, tmp_path, line, message):
    path = write(tmp_path / "chats.jsonl", CHATS[0])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        PackedChats.read(path, tokenizer, row_length=40)


ANSWERLESS = {"messages": [{"role": "user", "content": "a"}]}


def weighted(*weights):
    return {"messages": [m | {"weight": w} for m, w in zip(chat("yes", "no", "no", "yes")["messages"], weights)]}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (weighted(0, 0, 0, 0), "all its answers have weight 0, so nothing of it is learned"),
        (weighted(1, 1, 0, 1), "message 1 of role 'user' has a weight, but only messages of the assistant"),
        (chat("yes", " \n"), "message 2 is an empty answer; remove the record, or set the weight"),
        ({"prompt": "yes", "completion": ""}, "it is an empty answer"),
        ({"prompt": chat("yes")["messages"], "completion": "\t"}, "message 2 is an empty answer"),
        ({"messages": [*chat("a")["messages"], {"role": "tool", "content": "b"}]}, "message 2 is the result of a tool"),
    ],
)
def test_a_chat_without_anything_to_learn_is_refused_with_its_line(tokenizer, tmp_path, record, sentence):
    path = write(tmp_path / "chats.jsonl", CHATS[0], record)
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: {sentence}"):
        PackedChats.read(path, tokenizer, row_length=40)


def test_chats_without_an_answer_are_skipped_and_counted(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "chats.jsonl", CHATS[0], ANSWERLESS, ANSWERLESS)
    assert len(PackedChats.read(path, tokenizer, row_length=40).rows) == 1
    reported = " ".join(capsys.readouterr().err.split())
    assert f"2 of 3 chats have no message of role 'assistant' and are skipped; the first is {path}:2" in reported
    write(path, ANSWERLESS)
    with pytest.raises(DataError, match=r"chats\.jsonl:1: has no message of role 'assistant', like .*roles"):
        PackedChats.read(path, tokenizer, row_length=40)


def test_empty_answers_may_be_context(tokenizer, tmp_path):
    record = {"messages": [m | {"weight": w} for m, w in zip(chat("a", "", "b", "c")["messages"], (0, 0, 0, 1))]}
    assert len(PackedChats.read(write(tmp_path / "chats.jsonl", record), tokenizer, row_length=40)) == 1


def learned_texts(tokenizer, packed):
    """The learned text of each segment."""
    for _, targets, weights, _ in segments_of(packed.batch(np.arange(len(packed)))["text"]):
        yield tokenizer.decode(targets[weights > 0], skip_control=False)


def test_message_weights_become_loss_weights(tokenizer, tmp_path):
    path = write(tmp_path / "chats.jsonl", weighted(0, 0, 0, 2.5))
    packed = PackedChats.read(path, tokenizer, row_length=40)
    assert list(learned_texts(tokenizer, packed)) == ["yes<|end|>"]
    assert {*packed.batch(np.array([0]))["text"].loss_weights[0].tolist()} == {0.0, 2.5}


@pytest.mark.parametrize(
    ("train_on", "learned"),
    [
        ("all", "one<|end|>two<|end|>three<|end|>"),
        ("last", "three<|end|>"),
        ([1], "one<|end|>"),
        ([-2, 3], "two<|end|>three<|end|>"),
        (["Ann"], "Ann: two<|end|>"),
        (["Ann", 1], "one<|end|>Ann: two<|end|>"),
    ],
)
def test_the_answers_to_learn_are_selected(tokenizer, tmp_path, train_on, learned):
    record = chat("a", "one", "b", "two", "c", "three")
    if "Ann" in train_on:
        record["messages"][3]["name"] = "Ann"
    path = write(tmp_path / "chats.jsonl", record)
    packed = PackedChats.read(path, tokenizer, row_length=100, form=ChatConfig(train_on=train_on))
    assert list(learned_texts(tokenizer, packed)) == [learned]


def test_selected_answers_keep_their_weights(tokenizer, tmp_path):
    path = write(tmp_path / "chats.jsonl", weighted(0, 3, 0, 0.5))
    packed = PackedChats.read(path, tokenizer, row_length=40, form=ChatConfig(train_on="last"))
    assert {*packed.batch(np.array([0]))["text"].loss_weights[0].tolist()} == {0.0, 0.5}


def test_chats_without_a_selected_answer_are_counted_and_the_first_is_named(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "chats.jsonl", CHATS[1], CHATS[0], CHATS[2])
    packed = PackedChats.read(path, tokenizer, row_length=40, form=ChatConfig(train_on=[2]))
    assert list(learned_texts(tokenizer, packed)) == ["yes<|end|>"]
    reported = " ".join(capsys.readouterr().err.split())
    assert (
        f"2 of 3 chats have no answer that objective.train_on selects and are skipped; the first is {path}:2"
        in reported
    )
    with pytest.raises(DataError, match=r"chats\.jsonl:1: has no answer that objective\.train_on selects"):
        PackedChats.read(path, tokenizer, row_length=40, form=ChatConfig(train_on=["Bob"]))


def test_weighting_by_dialogue_gives_every_chat_the_weight_one(tokenizer, tmp_path):
    path = write(tmp_path / "chats.jsonl", *CHATS, weighted(0, 2, 0, 0.5))
    packed = PackedChats.read(path, tokenizer, row_length=40, form=ChatConfig(weighting="dialogue"))
    sums = []
    for _, _, weights, _ in segments_of(packed.batch(np.arange(len(packed)))["text"]):
        count = (weights > 0).sum()
        sums.append(weights.sum())
        assert ({*np.round(weights[weights > 0] * count, 5)}) <= {1.0, 2.0, 0.5}
    weights = np.array(tokenizer.encode_chat(weighted(0, 2, 0, 0.5)["messages"]).loss_weights)
    np.testing.assert_allclose(sorted(sums), [1, 1, 1, 1, weights.sum() / (weights > 0).sum()], rtol=1e-6)


SYSTEM = {"role": "system", "content": "s"}
LONG = {"messages": [SYSTEM, *chat("a", "one", "b", "two", "c", "three", "d", "four")["messages"]]}


def texts(tokenizer, packed):
    for tokens, targets, _, _ in segments_of(packed.batch(np.arange(len(packed)))["text"]):
        yield tokenizer.decode([*tokens, targets[-1]], skip_control=False)


def rendered(*contents):
    turns = "".join(f"<|user|>{q}<|end|><|assistant|>{a}<|end|>" for q, a in zip(contents[::2], contents[1::2]))
    return f"<|bos|><|system|>s<|end|>{turns}"


def room_for(tokenizer, *contents):
    """The row length that these messages after the system prompt fill."""
    return len(tokenizer.encode_chat([SYSTEM, *chat(*contents)["messages"]]).ids) - 1


def test_too_long_chats_keep_their_system_prompt_and_last_turns(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "chats.jsonl", LONG, chat("one", "two " * 100))
    length = room_for(tokenizer, "c", "three", "d", "four")
    packed = PackedChats.read(path, tokenizer, row_length=length, form=ChatConfig(too_long="truncate"))
    assert list(texts(tokenizer, packed)) == [rendered("c", "three", "d", "four")]
    reported = " ".join(capsys.readouterr().err.split())
    assert (
        f"2 of 2 chats are longer than row_length={length} tokens: 1 lose their first turns, 1 are skipped" in reported
    )


def test_too_long_chats_are_split_between_turns_and_every_answer_is_learned_once(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "chats.jsonl", LONG)
    length = room_for(tokenizer, "c", "three", "d", "four")
    packed = PackedChats.read(path, tokenizer, row_length=length, form=ChatConfig(too_long="split"))
    parts = [rendered("a", "one", "b", "two"), rendered("c", "three", "d", "four")]
    assert sorted(texts(tokenizer, packed)) == parts
    assert packed.places(0) == [f"{path}:1"]
    assert "1 of 1 chats are longer" in " ".join(capsys.readouterr().err.split())
    last = PackedChats.read(path, tokenizer, row_length=length, form=ChatConfig(too_long="split", train_on=[3]))
    assert list(texts(tokenizer, last)) == [parts[1]]
    assert list(learned_texts(tokenizer, last)) == ["three<|end|>"]


def test_exchanges_that_are_too_long_by_themselves_are_left_out(tokenizer, tmp_path, capsys):
    record = {"messages": [SYSTEM, *chat("a", "one", "b", "two " * 50, "c", "three")["messages"]]}
    path = write(tmp_path / "chats.jsonl", record)
    length = room_for(tokenizer, "c", "three")
    packed = PackedChats.read(path, tokenizer, row_length=length, form=ChatConfig(too_long="split"))
    assert sorted(texts(tokenizer, packed)) == [rendered("a", "one"), rendered("c", "three")]
    assert "2 parts are made of them, 1 exchanges are skipped" in " ".join(capsys.readouterr().err.split())


def test_calls_and_their_results_are_not_split(tokenizer, tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked = [{"role": "user", "content": "x"}, call, {"role": "tool", "content": "y"}, chat("q", "z")["messages"][1]]
    path = write(tmp_path / "chats.jsonl", {"messages": [*CHATS[0]["messages"], *asked]})
    length = len(tokenizer.encode_chat(link_results(asked, "f")).ids) - 1
    packed = PackedChats.read(path, tokenizer, row_length=length, form=ChatConfig(too_long="split"))
    whole, other = sorted(texts(tokenizer, packed), key=len, reverse=True)
    assert whole.startswith("<|bos|><|user|>x<|end|><|assistant|><tool_call>")
    assert whole.endswith("</tool_response><|end|><|assistant|>z<|end|>")
    assert other == "<|bos|><|user|>one and one?<|end|><|assistant|>two.<|end|>"


def test_missing_and_empty_files_are_reported_in_one_sentence(tokenizer, tmp_path):
    write(tmp_path / "chats.jsonl", CHATS[0])
    with pytest.raises(DataError, match=r"no such file; did you mean .*chats\.jsonl"):
        PackedChats.read(tmp_path / "chat.jsonl", tokenizer, row_length=40)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no chats"):
        PackedChats.read(tmp_path / "empty.jsonl", tokenizer, row_length=40)


def test_line_numbers_count_empty_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [where.rsplit(":", 1)[1] for where, _ in read_records(tmp_path / "a.jsonl")] == ["2", "4"]


def test_each_epoch_has_every_example_once_in_a_new_order():
    order = EpochOrder(10, seed=3)
    steps = [order.indices(step, batch_size=4) for step in range(5)]
    seen = np.concatenate(steps)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_file_with_fewer_rows_than_a_batch_prints_a_warning(capsys):
    training_order("chats.jsonl", 16, batch_size=16, seed=0)
    assert capsys.readouterr().err == ""
    training_order("chats.jsonl", 1, batch_size=16, seed=0)
    reported = " ".join(capsys.readouterr().err.split())
    assert reported.startswith("chats.jsonl: has 1 rows, so that a batch of batch_size=16 repeats some; lower")


def test_examples_of_a_step_depend_only_on_seed_and_step_and_shards_partition_them():
    whole = EpochOrder(10, seed=3).indices(7, batch_size=4)
    np.testing.assert_array_equal(whole, EpochOrder(10, seed=3).indices(7, batch_size=4))
    parts = [EpochOrder(10, seed=3).indices(7, batch_size=4, shard=shard, num_shards=2) for shard in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    others = [EpochOrder(10, seed=seed).indices(7, batch_size=4).tolist() for seed in range(10)]
    assert len(set(map(tuple, others))) > 1


def test_validation_reads_every_example_once():
    assert [batch.tolist() for batch in padded_batches(5, 2, limit=10)] == [[0, 1], [2, 3], [4, -1]]
    assert len(padded_batches(5, 2, limit=2)) == 2
    # A sample of the whole file, not its beginning.
    taken = np.concatenate(padded_batches(1000, 8, limit=4))
    assert np.histogram(taken, bins=8, range=(0, 1000))[0].min() >= 2
    assert {*taken} < {*np.concatenate(padded_batches(1000, 8, limit=5))}


def test_prompt_is_a_string_or_messages_up_to_the_answer(tokenizer):
    assert encode_prompt(tokenizer, "say", "here") == [tokenizer.bos_id, *tokenizer.encode("say")]
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "say"}], "here")
    assert tokenizer.decode(ids, skip_control=False) == "<|bos|><|user|>say<|end|><|assistant|>"
