"""`maxlm import hf`: a run folder that can be trained on, and exported as it came."""

import json
from pathlib import Path

import numpy as np
import pytest
from family_cases import LLAMA
from family_comparison import write_folder
from safetensors.numpy import load_file
from tiny_run import tiny_config
from tokenizer_kinds import KINDS

import maxlm
from maxlm.cli import main
from maxlm.errors import CheckpointError, ConfigError, DataError, RequestError
from maxlm.export.export import export_model
from maxlm.export.importing import import_huggingface
from maxlm.interop.load import load_model
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with more rows than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("hf")
    KINDS["byte-level BPE"](folder)
    rows = Tokenizer.load(folder).vocab_size + 7
    write_folder(folder, {"model_type": "llama", **LLAMA, "vocab_size": rows, "eos_token_id": [2, 0]})
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("imported") / "run"
    import_huggingface(folder, run)
    return run


def test_imported_run_is_the_same_model(folder, run):
    tokens = np.arange(24).reshape(2, 12)
    ours, theirs = maxlm.load(run), maxlm.load(folder)
    np.testing.assert_array_equal(ours.logits(tokens), theirs.logits(tokens))
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    assert ours.generate("def f", max_new_tokens=4) == theirs.generate("def f", max_new_tokens=4)


@pytest.mark.parametrize("source", ["folder", "run"])
def test_export_returns_every_tensor_and_file(source, folder, run, tmp_path):
    export_model({"folder": folder, "run": run}[source], tmp_path / "out", format="hf")
    given, written = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert given.keys() == written.keys()
    for name, x in given.items():
        np.testing.assert_array_equal(written[name], x)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, [2, 0], 0]


def test_fine_tuning_starts_from_an_imported_run(run, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    config = {
        "init_from": str(run),
        "model": None,
        "execution": None,
        "objective": {"kind": "sft", "train_file": str(chats)},
        "adapters": {"kind": "lora", "rank": 2},
        "steps": 2,
        "batch_size": 2,
    }
    train(tiny_config(tmp_path / "sft", "", **config))
    _, tokenizer = load_model(tmp_path / "sft")
    assert tokenizer.end_of_turn_id == tokenizer.control_tokens["<|im_end|>"]


def test_model_without_a_tokenizer_takes_token_ids(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert main(["import", "hf", str(tmp_path), str(tmp_path / "run"), "--json"]) == 0
    model = maxlm.load(tmp_path / "run")
    assert model.logits([[1, 2]]).shape[:2] == (1, 2)
    with pytest.raises(RequestError, match="has no tokenizer"):
        model.generate("x", max_new_tokens=1)


def test_import_replaces_an_earlier_import_only(folder, run, tmp_path):
    assert import_huggingface(folder, run).tokenizer_size == Tokenizer.load(folder).vocab_size
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and was not written by maxlm"):
        import_huggingface(folder, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_is_missing_is_named_with_its_remedy(folder, run, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json; give a folder as transformers'"):
        import_huggingface(tmp_path, tmp_path / "run")
    with pytest.raises(CheckpointError, match="convert it into a run folder first: maxlm import hf"):
        train(
            tiny_config(
                tmp_path / "x", "", init_from=str(folder), model=None, objective={"kind": "sft", "train_file": "x"}
            )
        )
    for model in (folder, run):
        with pytest.raises(DataError, match=r"names no validation data; .* with --data"):
            export_model(model, tmp_path / "int8")


def test_tokenizer_that_does_not_fit_is_refused(folder, tmp_path):
    KINDS["byte-level BPE"](tmp_path)
    write_folder(tmp_path, {"model_type": "llama", **LLAMA})
    with pytest.raises(CheckpointError, match="its tokenizer has 601 tokens, but the model only 67"):
        maxlm.load(tmp_path)
