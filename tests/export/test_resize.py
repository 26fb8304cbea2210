"""`maxlm model resize`: a model for an extended tokenizer, whose old rows are the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from extension_text import write_text
from family_cases import LLAMA
from family_comparison import write_folder
from tiny_run import tiny_config
from tokenizer_kinds import KINDS

import maxlm
from maxlm.cli import main
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, ConfigError, TokenizerError
from maxlm.export.export import export_model
from maxlm.export.resize import resize_model, with_rows
from maxlm.interop.load import load_any_model
from maxlm.runtime.manifest import read_manifest
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.extend import extend_tokenizer
from maxlm.tokenizer.extension import former_ids
from maxlm.train.run import train

PADDING = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with two tables, and more rows than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("hf")
    KINDS["byte-level BPE"](folder)
    rows = Tokenizer.load(folder).vocab_size + PADDING
    write_folder(folder, {"model_type": "llama", **LLAMA, "vocab_size": rows})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "han.txt"
    write_text(path)
    return path


@pytest.fixture(scope="module")
def extended(folder, text, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("extended") / "tokenizer"
    extend_tokenizer(folder, text, output, add=120, scripts=["Han"])
    return output


@pytest.fixture(scope="module")
def resized(folder, extended, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("resized") / "run"
    resize_model(folder, output, extended)
    return output


def test_old_rows_are_kept_and_new_rows_are_means(folder, extended, resized):
    (before, old), (after, new) = load_any_model(folder), load_any_model(resized)
    first = old.vocab_size
    assert new.fingerprint == Tokenizer.load(extended).fingerprint
    assert (before.config.vocab_size, after.config.vocab_size) == (first + PADDING, 768)
    before, after = flatten(before), flatten(after)
    for path, x in before.items():
        if path not in ("embedding", "head"):
            np.testing.assert_array_equal(after[path], x, err_msg=path)
            continue
        known, rows = np.asarray(x)[:first], np.asarray(after[path])
        np.testing.assert_array_equal(rows[:first], known)
        for id_, ids in enumerate(former_ids(new, old), first):
            np.testing.assert_allclose(rows[id_], known[ids].mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(rows[new.vocab_size :], np.tile(known.mean(0), (768 - new.vocab_size, 1)), atol=1e-6)


def test_logits_of_old_tokens_are_unchanged(folder, resized):
    tokens, first = np.arange(24).reshape(2, 12), Tokenizer.load(folder).vocab_size
    before, after = maxlm.load(folder).logits(tokens), maxlm.load(resized).logits(tokens)
    np.testing.assert_allclose(after[..., :first], before[..., :first], rtol=1e-6, atol=1e-6)


def test_manifest_names_model_and_tokenizer(folder, extended, resized):
    manifest = read_manifest(resized)
    assert manifest["stage"] == "model/resize"
    assert {*manifest["inputs"]} == {"model", "tokenizer"}
    first = Tokenizer.load(folder).vocab_size
    assert manifest["metrics"] == {
        "rows_before": first + PADDING,
        "rows_after": 768,
        "first_new_token": first,
        "tokens_added": Tokenizer.load(extended).vocab_size - first,
        "tables": ["embedding", "head"],
        "init": "mean",
    }


def test_noise_is_like_the_rows_of_tokens_and_zero_is_zero(run):
    rows = run.tokenizer.vocab_size
    known = np.asarray(run.model.embedding)
    noise = np.asarray(with_rows(run.model, 4 * rows, rows, [], init="noise", seed=1).embedding)
    np.testing.assert_array_equal(noise[:rows], known)
    np.testing.assert_allclose(noise[rows:].mean(0), known.mean(0), atol=0.2 * known.std())
    np.testing.assert_allclose(noise[rows:].std(0), known.std(0), rtol=0.2)
    again, other = (with_rows(run.model, 4 * rows, rows, [], init="noise", seed=seed).embedding for seed in (1, 2))
    np.testing.assert_array_equal(again, noise)
    assert np.any(np.asarray(other)[rows:] != noise[rows:])
    assert not np.any(np.asarray(with_rows(run.model, rows + 9, rows, [[1]], init="zero").embedding)[rows:])


def test_rows_without_tokens_are_used_first(run):
    first = run.tokenizer.vocab_size - 20
    model = with_rows(run.model, run.tokenizer.vocab_size, first, [[1, 2], []])
    known, rows = np.asarray(run.model.embedding), np.asarray(model.embedding)
    np.testing.assert_allclose(rows[first], known[[1, 2]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(rows[first + 1], known[:first].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(rows[first + 2 :], known[first + 2 :])


def test_reward_model_has_one_table(folder, extended, tmp_path):
    KINDS["byte-level BPE"](tmp_path)
    settings = {"model_type": "llama", **LLAMA, "vocab_size": 601, "id2label": {"0": "reward"}}
    write_folder(tmp_path, {**settings, "architectures": ["LlamaForSequenceClassification"]})
    found = resize_model(tmp_path, tmp_path / "run", extended, multiple_of=1)
    assert found.tables == ("embedding",)
    assert found.rows_after == Tokenizer.load(extended).vocab_size
    assert load_any_model(tmp_path / "run")[0].config.labels == ("reward",)


def test_training_starts_from_it_and_the_export_has_the_ids(folder, resized, extended, text, tmp_path):
    lines = text.read_text(encoding="utf-8").splitlines()[:8]
    chats = tmp_path / "chats.jsonl"
    chat = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": line}] for line in lines]
    chats.write_text("".join(json.dumps({"messages": each}) + "\n" for each in chat))
    first = Tokenizer.load(folder).vocab_size
    config = {
        "init_from": str(resized),
        "model": None,
        "execution": None,
        "objective": {"kind": "sft", "train_file": str(chats)},
        "optim": {"learning_rate": 1e-2, "new_rows": {"first": first, "steps": 2}},
        "row_length": 64,
        "steps": 2,
        "batch_size": 4,
        "accumulate": 2,
    }
    train(tiny_config(tmp_path / "sft", "", **config))
    before, after = (flatten(load_any_model(path)[0]) for path in (resized, tmp_path / "sft"))
    for path, x in before.items():
        kept = slice(0, first if path in ("embedding", "head") else None)
        np.testing.assert_array_equal(after[path][kept], x[kept], err_msg=path)
    assert np.any(np.asarray(after["embedding"][first:]) != np.asarray(before["embedding"][first:]))

    export_model(tmp_path / "sft", tmp_path / "out", format="hf")
    exported, tokenizer = load_any_model(tmp_path / "out")
    assert exported.config.vocab_size == 768
    sample = "\n".join(lines)
    assert tokenizer.encode(sample) == Tokenizer.load(extended).encode(sample)


def test_own_model_and_tokenizer_are_exported(run, text, tmp_path):
    extend_tokenizer(run.path / "tokenizer", text, tmp_path / "tokenizer", add=80, scripts=["Han"])
    resize_model(run.path, tmp_path / "run", tmp_path / "tokenizer")
    export_model(tmp_path / "run", tmp_path / "out", format="hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    ours, theirs = maxlm.load(tmp_path / "run"), maxlm.load(tmp_path / "out")
    sample = text.read_text(encoding="utf-8")[:200]
    ids = ours.tokenizer.encode(sample)
    assert theirs.tokenizer.encode(sample) == ids
    assert max(ids) >= run.tokenizer.vocab_size
    np.testing.assert_allclose(ours.logits([ids[:20]]), theirs.logits([ids[:20]]), rtol=1e-5, atol=1e-5)


def test_command_prints_where_new_rows_begin(folder, extended, tmp_path, capsys):
    words = ["model", "resize", str(folder), str(tmp_path / "run"), "--tokenizer", str(extended)]
    assert main([*words, "--multiple-of", "100"]) == 0
    printed = capsys.readouterr().out
    assert "608 -> 800 rows in embedding and head" in printed
    assert "optim.new_rows.first=601" in printed
    assert main([*words, "--init", "zero", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_after"] == 768


def test_what_does_not_fit_is_refused_in_one_sentence(folder, extended, resized, run, tmp_path):
    with pytest.raises(TokenizerError, match=r"--tokenizer .*: is not an extension: the token \d+ is '.*', and must"):
        resize_model(run.path, tmp_path / "run", extended)
    with pytest.raises(TokenizerError, match=r"has 601 tokens, fewer than the \d+ of the other"):
        resize_model(resized, tmp_path / "run", folder)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resize_model(tmp_path / "missing", tmp_path / "run", extended)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="has no tokenizer to compare with"):
        resize_model(bare, tmp_path / "run", extended)
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "bundle.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an int8 bundle; give the run that it was exported from"):
        resize_model(tmp_path / "int8", tmp_path / "run", extended)
    with pytest.raises(ConfigError, match="is a folder of the stage 'train', which this stage must not write into"):
        resize_model(folder, run.path, extended)
    assert not (tmp_path / "run").exists()
