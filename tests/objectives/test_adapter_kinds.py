"""Kinds of adapters from training to a merged model: it computes what was trained, and nothing else has changed."""

import numpy as np
import pytest
from tiny_decoder import text_loss
from toy_task import chat, make_config, write_lines

from maxlm.core.tree import flatten
from maxlm.data.examples.chat import PackedChats
from maxlm.interop.load import load_model
from maxlm.train.run import train

KINDS = {
    "quantized base": {"kind": "lora", "rank": 4, "base": {"kind": "nf4", "block_size": 8}},
    "dora of a layer, int8 base": {
        "kind": "lora",
        "rank": 4,
        "decomposed": True,
        "targets": ["layers/1/*"],
        "base": {"kind": "int8", "block_size": 8},
    },
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "tokens": 4},
    "prefix of an mlp": {"kind": "prefix", "tokens": 4, "reparametrize": {"dim": 8}},
    "prompt": {"kind": "prompt", "tokens": 4, "initial_text": "yes no"},
    "prompt, quantized base": {"kind": "prompt", "tokens": 4, "base": {"kind": "int8", "block_size": 8}},
    "layers": {"kind": "layers", "targets": ["layers/1/mlp/*", "role:norm"]},
}

# Virtual tokens begin by taking attention from the others.
LONGER = {
    "steps": 20,
    "optim": {"learning_rate": 0.05, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_steps": 1}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_model_computes_what_the_run_measured(kind, tuned, tokenizer, tmp_path):
    data = write_lines(tmp_path / "chats.jsonl", [chat(f"coin {n}", "yes") for n in range(5)])
    config = make_config(
        tmp_path / "run",
        init_from=str(tuned[0]),
        objective={"kind": "sft", "train_file": data, "valid_file": data},
        adapters=KINDS[kind],
        log_every=4,
        **(LONGER if kind.startswith(("prefix", "prompt")) else {"steps": 4}),
    )
    measured = train(config)["metrics"]["valid"]["loss"]
    found, start = load_model(tmp_path / "run")[0], load_model(tuned[0])[0]
    chats = PackedChats.read(tmp_path / "chats.jsonl", tokenizer, row_length=32)
    batch = chats.batch(np.arange(len(chats)))["text"]
    loss = lambda model: float(text_loss(model, batch).terms["cross_entropy"].mean())  # noqa: E731
    np.testing.assert_allclose(loss(found), measured, rtol=1e-4)
    assert measured < 0.99 * loss(start), "something was learned"
    before, after = flatten(start), flatten(found)
    unchanged = {path for path in before if np.array_equal(before[path], after[path])}
    assert "embedding" in unchanged
    if kind == "layers":
        up = "layers/0/0/mlp/up"
        np.testing.assert_array_equal(before[up][0], after[up][0])
        assert not np.array_equal(before[up][1], after[up][1])
        assert "layers/0/0/mixer/query" in unchanged
    if kind.startswith("prefix") or kind == "prompt":
        assert unchanged == before.keys()
        further = make_config(
            tmp_path / "further",
            init_from=str(tmp_path / "run"),
            objective={"kind": "sft", "train_file": data, "valid_file": data},
            adapters={"kind": "layers", "targets": ["role:virtual"]} if kind == "prefix" else None,
            steps=1,
        )
        assert train(further)["metrics"]["valid"]["loss"] < 0.99 * loss(start)
        assert load_model(tmp_path / "further")[0].config == found.config
    if kind == "ia3":
        assert "layers/0/0/mlp/up" in unchanged
        assert "layers/0/0/mlp/down" not in unchanged
