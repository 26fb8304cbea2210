"""Multi-token prediction from training to what follows it: tuning, adapters, exports, other vocabularies, refusals."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import EXECUTION, tiny_config, tiny_model
from toy_task import chat, write_lines

from maxlm.config.execution import ExecutionConfig
from maxlm.config.load import dump_yaml
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, ConfigError
from maxlm.export.export import export_model
from maxlm.export.resize import with_rows
from maxlm.generate.model import load
from maxlm.interop.load import load_any_model
from maxlm.models.decoder import Decoder
from maxlm.models.multi_token import without_modules
from maxlm.models.quantized import quantize_model
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from maxlm.train.setup import resolve_model
from maxlm.train.trained_model import num_active_parameters
from maxlm.verify.reduce import full_model

MODEL = tiny_model(multi_token={"modules": 2})
LORA = {"kind": "lora", "rank": 2}


def objective(data, kind="multi_token") -> dict:
    return {"kind": kind, "sources": [{"path": str(data)}]}


def config_of(folder, data, kind="multi_token", **settings):
    return tiny_config(folder, data, objective=objective(data, kind), **{"eval_every": 0, **settings})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_data_folder) -> Path:
    folder = tmp_path_factory.mktemp("ahead") / "run"
    train(config_of(folder, tiny_data_folder, model=MODEL, mesh={"fsdp": 2, "tensor": 2}))
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory, tiny_data_folder) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(config_of(folder, tiny_data_folder, "pretrain", steps=2))
    return folder


def weights(folder) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(load_any_model(folder)[0]).items()}


def steps_of(folder) -> list[dict]:
    return [record for record in read_metrics(folder) if "loss" in record]


def of_modules(flat: dict) -> list[str]:
    return [path for path in flat if path.startswith("multi_token/")]


@pytest.mark.exhaustive
def test_all_predictions_improve(run_folder):
    first, *_, last = steps_of(run_folder)
    for name in ("cross_entropy", "ahead_1_cross_entropy", "ahead_2_cross_entropy"):
        assert last[name] < first[name] - 0.3
    assert last["ahead_2"] == pytest.approx(0.3 / 2 * last["ahead_2_cross_entropy"], rel=1e-5)
    total = sum(last[name] for name in ("cross_entropy", "ahead_1", "ahead_2"))
    assert last["loss"] == pytest.approx(total, rel=1e-4)


def test_training_continues_with_all_modules(run_folder, tiny_data_folder, tmp_path):
    config = config_of(tmp_path / "on", tiny_data_folder, model=None, init_from=str(run_folder), steps=1)
    train(config)
    before, after = weights(run_folder), weights(tmp_path / "on")
    assert before.keys() == after.keys()
    assert all(np.any(before[path] != after[path]) for path in before)
    # Trained modules, not new ones.
    new, trained = (steps_of(folder)[0]["ahead_2_cross_entropy"] for folder in (run_folder, tmp_path / "on"))
    assert trained < new - 0.3


def test_other_objectives_train_the_model_without_modules(run_folder, tiny_data_folder, tmp_path, capsys):
    data = write_lines(tmp_path / "chats.jsonl", [chat("sky", "blue"), chat("grass", "green")] * 8)
    settings = {"model": None, "init_from": str(run_folder), "row_length": 64, "steps": 1, "eval_every": 0}
    config = tiny_config(tmp_path / "sft", "", objective={"kind": "sft", "train_file": data}, **settings)
    train(config)
    assert "does not train the prediction modules of" in " ".join(capsys.readouterr().err.split())
    tuned = weights(tmp_path / "sft")
    assert tuned.keys() == weights(run_folder).keys() - of_modules(weights(run_folder))
    assert full_model(config)[0].multi_token is None


def test_adapters_leave_modules_out_or_train_them(run_folder, plain_folder, tiny_data_folder, tmp_path):
    adapters = LORA | {"targets": ["query"]}
    start = {"model": None, "init_from": str(run_folder), "adapters": adapters, "steps": 1}
    train(config_of(tmp_path / "main", tiny_data_folder, "pretrain", **start))
    assert not of_modules(weights(tmp_path / "main"))
    train(config_of(tmp_path / "all", tiny_data_folder, **start))
    before, after = weights(run_folder), weights(tmp_path / "all")
    assert before.keys() == after.keys()
    adapted = "multi_token/1/layer/mixer/query"
    assert np.any(before[adapted] != after[adapted])
    np.testing.assert_array_equal(before["multi_token/1/project"], after["multi_token/1/project"])
    with pytest.raises(ConfigError, match=r"adapters: cannot train modules of model\.multi_token that .* lacks"):
        resolved(config_of("x", tiny_data_folder, model=MODEL, init_from=str(plain_folder), adapters=LORA))


def resolved(config):
    return resolve_model(config, Tokenizer.load(Path(config.init_from) / "tokenizer")).model


def test_modules_are_added_to_a_trained_model(plain_folder, tiny_data_folder, tmp_path):
    train(config_of(tmp_path / "more", tiny_data_folder, model=MODEL, init_from=str(plain_folder), steps=1))
    assert len(load_any_model(tmp_path / "more")[0].multi_token) == 2
    fewer = tiny_model(multi_token={"modules": 1})
    config = config_of("x", tiny_data_folder, model=fewer, init_from=str(tmp_path / "more"))
    with pytest.raises(CheckpointError, match=r"multi_token\.modules 2, but model\.multi_token\.modules is 1"):
        resolved(config)


def test_wrong_pairing_is_refused(plain_folder, tiny_data_folder):
    with pytest.raises(ConfigError, match=r"pretrain does not train the prediction modules of model\.multi_token; set"):
        config_of("x", tiny_data_folder, "pretrain", model=MODEL)
    with pytest.raises(ConfigError, match="multi_token trains prediction modules, and this model has none; set model"):
        config_of("x", tiny_data_folder)
    with pytest.raises(ConfigError, match="multi_token trains prediction modules, and this model has none"):
        resolved(config_of("x", tiny_data_folder, model=None, init_from=str(plain_folder)))
    with pytest.raises(ConfigError, match="multi_token is of models that predict tokens, and labels of those"):
        config_of("x", tiny_data_folder, model=MODEL | {"labels": ["good"]})
    own_bias = {"layer": {"mixer": MODEL["layers"]["mixer"] | {"rope": None, "relative_bias": {}}}}
    with pytest.raises(ConfigError, match="relative_bias: must be that of a layer of the model, or null"):
        config_of("x", tiny_data_folder, model=MODEL | {"multi_token": own_bias})


def test_generation_and_exports_leave_modules_out(run_folder, tmp_path):
    model, tokenizer = load_any_model(run_folder)
    tokens = np.arange(12)[None]
    expected = model.logits(model(tokens).hidden_BLD)
    loaded = load(run_folder)
    np.testing.assert_allclose(loaded.logits(tokens), expected, rtol=1e-4, atol=1e-4)
    assert loaded.generate(["a"], max_new_tokens=3)
    assert export_model(run_folder, tmp_path / "int8", max_perplexity_change=1.0, max_mean_kl=1.0)
    # Llama has no such modules.
    export_model(run_folder, tmp_path / "hf", format="hf")
    for folder, wanted in (("int8", quantize_model(without_modules(model))), ("hf", without_modules(model))):
        exported, _ = load_any_model(tmp_path / folder)
        assert exported.config.multi_token is None
        assert flatten(exported).keys() == flatten(wanted).keys()
        assert json.loads((tmp_path / folder / "manifest.json").read_text())["config"]["model"]["multi_token"] is None
    assert tokenizer.vocab_size == load_any_model(tmp_path / "hf")[1].vocab_size


def test_a_larger_vocabulary_keeps_modules(run_folder):
    model, tokenizer = load_any_model(run_folder)
    rows = model.config.vocab_size + 9
    larger = with_rows(model, rows, tokenizer.vocab_size, [])
    assert larger.embedding.shape[0] == rows
    for path in of_modules(before := flatten(model)):
        np.testing.assert_array_equal(flatten(larger)[path], before[path])


def test_experts_of_modules_count_as_far_as_they_are_active(tiny_data_folder):
    mixer = MODEL["layers"]["mixer"]
    experts = {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "dim": 16}
    model = tiny_model(vocab_size=64, multi_token={"layer": {"mixer": mixer, "mlp": experts}})
    config = config_of("x", tiny_data_folder, model=model).model
    plan = Decoder(config, ExecutionConfig(**EXECUTION))
    drawn = initialize(plan, jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(drawn))
    assert num_active_parameters([plan]) == total - 3 / 4 * 3 * 8 * 32 * 16
    assert "multi_token" in dump_yaml(config_of("x", tiny_data_folder, model=model))
