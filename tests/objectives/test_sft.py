"""Fine-tuning learns the assistant's messages; with adapters, the base is unchanged."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import text_loss
from toy_task import COLORS, chat, make_config, question, write_lines

from maxlm.checkpoint.folder import find_checkpoint
from maxlm.core.tree import flatten
from maxlm.generate.rollout import rollout
from maxlm.interop.load import load_model
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def greedy_answers(model, tokenizer, texts):
    prompts = [tokenizer.encode_chat(question(text), generation_prompt=True).ids for text in texts]
    lengths = np.array([len(ids) for ids in prompts])
    padded = np.array([ids + [0] * (max(lengths) - len(ids)) for ids in prompts])
    keys = jax.random.split(jax.random.key(0), len(texts))
    settings = {"max_new_tokens": 8, "temperature": 0.0, "stop_ids": (tokenizer.end_of_turn_id,)}
    answers = rollout(model, jnp.asarray(padded), jnp.asarray(lengths), keys, **settings)
    return [tokenizer.decode(ids[: n - 1].tolist()) for ids, n in zip(np.asarray(answers.tokens_BN), answers.lengths_B)]


def test_sft_learns_the_task(tuned):
    folder, manifest = tuned
    model, tokenizer = load_model(folder)
    answers = greedy_answers(model, tokenizer, list(COLORS))
    assert answers == list(COLORS.values())
    # Ten of 22 answers are coin flips: ln 2 nats over all tokens of each answer and its end.
    assert manifest["metrics"]["valid"]["loss"] < 0.2
    assert manifest["stage"] == "train/sft"


@pytest.fixture(scope="module")
def lora_run(tuned, tmp_path_factory):
    """The coin is always yes now. One run of 8 steps, and one that was interrupted after 4 and resumed."""
    folder = tmp_path_factory.mktemp("lora")
    data = write_lines(folder / "chats.jsonl", [chat(f"coin {n}", "yes") for n in range(5)])

    def run(name, steps):
        config = make_config(
            folder / name,
            init_from=str(tuned[0]),
            objective={"kind": "sft", "train_file": data, "valid_file": data},
            adapters={"kind": "lora", "rank": 4},
            steps=steps,
            log_every=4,
        )
        return train(config)

    run("whole", 8)
    run("broken_off", 4)
    manifest = run("broken_off", 8)
    return folder, manifest


def test_only_adapters_are_trained_and_base_is_bitwise_unchanged(lora_run, tuned):
    folder, _ = lora_run
    base, merged = flatten(load_model(tuned[0])[0]), flatten(load_model(folder / "whole")[0])
    for path in base:
        is_adapted = path.startswith("layers/") and base[path].ndim == 3
        assert (np.asarray(base[path]) == np.asarray(merged[path])).all() != is_adapted, path
        if is_adapted:
            update = np.asarray(merged[path] - base[path], np.float64)
            assert (np.linalg.svd(update)[1][:, 4:] < 1e-4 * np.linalg.norm(update)).all(), "rank 4 at most"
    # The saved checkpoint does not contain the base.
    saved, whole = (Path(find_checkpoint(run)) / "weights" for run in (folder / "whole", tuned[0]))
    assert size_of(saved) < 0.6 * size_of(whole)


def test_adapters_lower_the_loss(lora_run):
    folder, _ = lora_run
    losses = [record["loss"] for record in read_metrics(folder / "whole") if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]


def test_resumed_adapter_run_matches_uninterrupted_run(lora_run):
    folder, manifest = lora_run
    assert manifest["metrics"]["steps"] == 8
    whole, broken_off = (flatten(load_model(folder / name)[0]) for name in ("whole", "broken_off"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], broken_off[path])


def test_merged_model_matches_adapted_model(lora_run, tokenizer):
    """The merged weights give the validation loss that the run measured with separate adapters."""
    from maxlm.data.examples.chat import PackedChats

    folder, manifest = lora_run
    merged, _ = load_model(folder / "broken_off")
    chats = PackedChats.read(folder / "chats.jsonl", tokenizer, row_length=32)
    terms = text_loss(merged, chats.batch(np.arange(len(chats)))["text"]).terms
    np.testing.assert_allclose(terms["cross_entropy"].mean(), manifest["metrics"]["valid"]["loss"], rtol=1e-4)
