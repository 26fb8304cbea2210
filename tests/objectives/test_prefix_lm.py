"""Prefix language models: which prefixes documents and chats get, training, answers, and wrong pairings by name."""

import numpy as np
import pytest
from tiny_run import tiny_config, tiny_model
from toy_task import chat, make_config, question, toy_model, write_lines

from maxlm.data.examples.chat import PackedChats
from maxlm.data.prefixes import with_prefixes
from maxlm.errors import ConfigError, RequestError
from maxlm.generate.model import load
from maxlm.generate.request import Request
from maxlm.train.run import train

LENGTHS = [[20, 11, 1, 12], [44]]


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    segments = np.array([np.repeat(np.arange(1, len(row) + 1), row) for row in LENGTHS], np.int32)
    segments = np.pad(segments, ((0, 0), (0, 4)))
    positions = np.zeros_like(segments)
    for row, lengths in enumerate(LENGTHS):
        positions[row, :44] = np.concatenate([np.arange(length) for length in lengths])
    weights = (np.roll(segments, -1, axis=1) == segments) & (segments > 0)
    return {"segment_ids": segments, "positions": positions, "loss_weights": weights.astype(np.float32)}


def test_prefixes_have_every_length_and_only_the_rest_is_learned(rows):
    shares = []
    for step in range(300):
        got = with_prefixes(rows, (0, step))
        for row, lengths in enumerate(LENGTHS):
            for segment, length in enumerate(lengths, 1):
                inside = rows["segment_ids"][row] == segment
                (prefix,) = set(got["prefix_lengths"][row, inside].tolist())
                learned = np.flatnonzero(got["loss_weights"][row, inside])
                np.testing.assert_array_equal(learned, np.arange(max(prefix - 1, 0), length - 1))
                shares.append(prefix / length) if length > 10 else None
    assert not got["prefix_lengths"][:, 44:].any()
    # 1,200 documents: the mean of a uniform share, with five standard deviations.
    assert abs(np.mean(shares) - 0.5 + 0.5 / 22) < 5 * 12**-0.5 / 1200**0.5
    assert min(shares) == 0
    without = with_prefixes(rows, (0, 1), rate=0.0)
    assert not without["prefix_lengths"].any()
    np.testing.assert_array_equal(without["loss_weights"], rows["loss_weights"])


def test_prefix_depends_only_on_key_and_row(rows):
    second = {name: values[1:2] for name, values in rows.items()}
    alone = with_prefixes(second, (7, 3), first_row=1)
    np.testing.assert_array_equal(alone["prefix_lengths"], with_prefixes(rows, (7, 3))["prefix_lengths"][1:2])
    assert not np.array_equal(
        with_prefixes(rows, (7, 3))["prefix_lengths"], with_prefixes(rows, (7, 4))["prefix_lengths"]
    )


def test_last_answer_of_a_chat_follows_its_prefix(tokenizer, tmp_path):
    two_turns = [*chat("sky", "blue")["messages"], *chat("grass", "green")["messages"]]
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": two_turns}, chat("snow", "white")])
    text = PackedChats.read(path, tokenizer, row_length=64, prefixes=True).batch(np.array([0]))["text"]
    for segment, messages in ((1, two_turns), (2, chat("snow", "white")["messages"])):
        inside = text.segment_ids[0] == segment
        prompt = tokenizer.encode_chat(messages[:-1], generation_prompt=True).ids
        assert set(text.prefix_lengths[0, inside].tolist()) == {len(prompt) - 1}
        first = np.flatnonzero(text.loss_weights[0, inside])[0]
        assert first == len(prompt) - 1
        assert tokenizer.decode(text.targets[0, inside][first:]).startswith(messages[-1]["content"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data_folder):
    folder = tmp_path_factory.mktemp("prefix") / "run"
    objective = {"kind": "prefix_lm", "sources": [{"path": str(tiny_data_folder)}]}
    train(tiny_config(folder, tiny_data_folder, model=tiny_model(prefix_attention=True), objective=objective))
    return folder


def test_trained_model_answers_as_it_scores(trained):
    """The prompt is a prefix in decoding, in scoring and in `logits`, the answer is causal."""
    model = load(trained)
    prompt = model.tokenizer.encode("badu fe", bos=True)
    with model.engine(num_slots=2) as engine:
        request = Request(tuple(prompt), max_new_tokens=6, temperature=0.0)
        tokens = [event.token for event in engine.stream(request) if event.token]
        with pytest.raises(RequestError, match="no log-probabilities"):
            engine.submit(Request(tuple(prompt), max_new_tokens=1, score_prompt=True), lambda event: None)
    answer = [token.id for token in tokens]
    (score,) = model.score_tokens([prompt], [answer])
    np.testing.assert_allclose(sum(token.log_probability for token in tokens), score.log_probability, rtol=1e-4)
    both = np.array([prompt + answer])
    logits = model.logits(both, prefix_lengths=[len(prompt) - 1])[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert np.abs(logits - model.logits(both)[0])[len(prompt) - 1 :].max() > 1e-3


def test_chats_tune_a_trained_model(trained, task_chats, tmp_path):
    data = write_lines(tmp_path / "chats.jsonl", task_chats)
    tuned = {"kind": "sft", "train_file": data, "valid_file": data}
    config = make_config(tmp_path / "run", init_from=str(trained), objective=tuned, steps=2, row_length=48)
    assert train(config)["metrics"]["valid"]["loss"] < 7


SOURCES = [{"path": "nowhere"}]


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ({}, {"kind": "prefix_lm", "sources": SOURCES}, "prefix_lm trains prefix language models, and this one is"),
        ({"prefix_attention": True}, {"kind": "pretrain", "sources": SOURCES}, "kind=pretrain trains causal models"),
        ({"prefix_attention": True}, {"kind": "fim", "sources": SOURCES}, "kind=fim trains causal models"),
        ({"prefix_attention": True, "labels": ["good"]}, {"kind": "prefix_lm", "sources": SOURCES}, "labels of those"),
        (
            {"prefix_attention": True, "layers": {"mixer": {"kind": "gru", "dim": 8}}},
            {"kind": "prefix_lm", "sources": SOURCES},
            "prefix_attention needs attention, and layers.mixer is a gru",
        ),
    ],
)
def test_wrong_pairing_is_refused(model, objective, message):
    layers = {} if "layers" in model else toy_model()
    with pytest.raises(ConfigError, match=message):
        make_config("run", model={**layers, **model}, objective=objective)


def test_wrong_objective_for_a_trained_model_is_refused(trained, task_chats, tmp_path):
    pairs = [{"prompt": question("sky"), "chosen": "blue", "rejected": "red"}]
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    objective = {"kind": "preference", "train_file": data}
    with pytest.raises(ConfigError, match="kind=preference trains causal models, and prompts of this one attend"):
        train(make_config(tmp_path / "run", init_from=str(trained), objective=objective, steps=1))
