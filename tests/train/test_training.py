"""Training from Python: what a run refuses, what it tells, adapters, and metrics."""

import json
import shutil
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
from tiny_run import MODEL, tiny_config

import maxlm
from maxlm.checkpoint.folder import find_checkpoint, read_metadata
from maxlm.config import TokenizerConfig
from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import mesh_sizes
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, ConfigError, DataError, RequestError, TrainingError
from maxlm.interop.load import load_model
from maxlm.runtime.manifest import read_manifest, write_json
from maxlm.runtime.storage import storage_path
from maxlm.tokenizer.train import train_tokenizer
from maxlm.train.layout import check_layout, note_idle_devices
from maxlm.train.metrics import MetricsLog, read_metrics
from maxlm.train.run import train


def weights(folder):
    return flatten(jax.device_get(load_model(folder)[0]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    """Of the same size as that of the data, trained on other text."""
    folder = tmp_path_factory.mktemp("other")
    text = "\n\n".join(topics[name] for name in sorted(topics)[40:60])
    (folder / "text.txt").write_text(text, encoding="utf-8")
    train_tokenizer(
        TokenizerConfig(kind="tokenizer", output=str(folder / "out"), input=str(folder / "text.txt"), vocab_size=400)
    )
    return str(folder / "out")


def test_a_run_of_another_tokenizer_is_refused_and_left_as_it_was(short_run, tiny_data_folder, other_tokenizer):
    before = contents(short_run)
    with pytest.raises(ConfigError, match=r"tokenizer: that of its input \([0-9a-f]{8}\) -> .*/out \([0-9a-f]{8}\)"):
        train(tiny_config(short_run, tiny_data_folder, steps=8, tokenizer=other_tokenizer))
    assert contents(short_run) == before
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        train(
            tiny_config(short_run.parent / "x", tiny_data_folder, init_from=str(short_run), tokenizer=other_tokenizer)
        )


def test_a_run_that_never_saved_takes_the_tokenizer_it_is_given(tmp_path, tiny_data_folder, other_tokenizer):
    """Of a run that was killed before its first checkpoint nothing is left that could mislead."""
    from maxlm.tokenizer.codec import Tokenizer

    Tokenizer.load(other_tokenizer).save(tmp_path / "run" / "tokenizer")
    train(tiny_config(tmp_path / "run", tiny_data_folder, steps=1, eval_batches=1))
    fingerprint = read_metadata(find_checkpoint(tmp_path / "run"))["fingerprint"]
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint == fingerprint


def test_rows_of_another_length_are_refused(tmp_path, tiny_data_folder):
    with pytest.raises(DataError, match="its rows have 32 tokens, but 16 are needed"):
        train(tiny_config(tmp_path / "run", tiny_data_folder, row_length=16))


def test_rows_longer_than_the_context_of_the_start_are_refused(short_run, tmp_path, tiny_data_folder):
    config = tiny_config(tmp_path / "run", tiny_data_folder, init_from=str(short_run))
    with pytest.raises(ConfigError, match="exceeds the model's max_length of"):
        train(config.model_copy(update={"model": None, "row_length": 4096}))


def test_a_start_is_computed_as_the_new_run_says(short_run, tmp_path, tiny_data_folder):
    """What changes how a model is computed, and not its weights, is the new run's to choose."""
    model = {**MODEL, "remat": "full", "max_length": 48}
    train(tiny_config(tmp_path / "run", tiny_data_folder, init_from=str(short_run), model=model, steps=1))
    loaded, _ = load_model(tmp_path / "run")
    assert (loaded.config.remat, loaded.config.max_length) == ("full", 48)


def test_a_vocabulary_of_another_size_is_refused(tmp_path, tiny_data_folder):
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 512 differs from the tokenizer's 400; leave it out"):
        train(tiny_config(tmp_path / "run", tiny_data_folder, model={**MODEL, "vocab_size": 512}))


def test_a_run_goes_on_with_more_steps(short_run, tiny_data_folder, tmp_path):
    """With a constant rate, four steps and four more are eight."""
    optim = {"learning_rate": 1e-2, "schedule": {"kind": "constant", "warmup_steps": 2}}
    whole = train(tiny_config(tmp_path / "whole", tiny_data_folder, steps=8, optim=optim))
    train(tiny_config(tmp_path / "parts", tiny_data_folder, steps=4, optim=optim))
    parts = train(tiny_config(tmp_path / "parts", tiny_data_folder, steps=8, optim=optim))
    assert parts["metrics"]["valid"] == whole["metrics"]["valid"]
    for path, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(tmp_path / "parts")[path], value, err_msg=path)


def test_the_manifest_of_fewer_steps_is_not_taken_for_that_of_more(tiny_data_folder, tmp_path, monkeypatch):
    """A run that ended, was given more steps, and was killed after its last checkpoint."""
    train(tiny_config(tmp_path / "run", tiny_data_folder, steps=2))
    with monkeypatch.context() as patch:
        patch.setattr("maxlm.train.run.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny_config(tmp_path / "run", tiny_data_folder, steps=3))
    manifest = train(tiny_config(tmp_path / "run", tiny_data_folder, steps=3))
    assert manifest["metrics"]["steps"] == 3
    assert manifest == read_manifest(tmp_path / "run")


def test_rows_that_processes_cannot_share_are_refused_before_anything_is_made(tiny_data_folder, tmp_path, monkeypatch):
    def refuse(mesh):
        raise ConfigError(["mesh: process 0 would hold 2 of 3 groups of rows"])

    monkeypatch.setattr("maxlm.train.setup.row_shard", refuse)
    with pytest.raises(ConfigError, match="would hold 2 of 3"):
        train(tiny_config(tmp_path / "run", tiny_data_folder))
    assert not (tmp_path / "run").exists()


def test_fewer_steps_than_were_done_are_refused_and_the_run_left_as_it_was(short_run, tiny_data_folder):
    before = contents(short_run)
    with pytest.raises(ConfigError, match=r"steps: 3 is less than the 4 steps that the run in .* has already done"):
        train(tiny_config(short_run, tiny_data_folder, steps=3))
    assert contents(short_run) == before


def test_settings_of_another_version_keep_no_model_from_being_loaded(tmp_path, tiny_data_folder):
    """Those that say how it was trained; what it computes is of the model's section alone."""
    train(tiny_config(tmp_path / "run", tiny_data_folder, steps=1))
    metadata = find_checkpoint(tmp_path / "run") / "metadata" / "metadata"
    saved = json.loads(metadata.read_text())
    saved["config"]["optim"]["gone_since"] = 0.9
    metadata.write_text(json.dumps(saved))
    assert load_model(tmp_path / "run")[0].config.embed_dim == MODEL["embed_dim"]
    saved["config"]["model"]["gone_since"] = 0.9
    metadata.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="by another version of maxlm, whose gone_since this version does not"):
        load_model(tmp_path / "run")


def test_a_checkpoint_alone_is_loaded_without_a_tokenizer(short_run, tmp_path):
    alone = shutil.copytree(find_checkpoint(short_run), tmp_path / "alone" / "checkpoints" / "4")
    model = maxlm.load(alone)
    assert model.logits(np.asarray([[1, 2, 3]])).shape == (1, 3, model.config.vocab_size)
    with pytest.raises(RequestError, match="4: has no tokenizer, and so takes token ids"):
        model.generate("The", max_new_tokens=2)


def test_a_manifest_that_is_lost_is_written_again(short_run, tiny_data_folder):
    """As after a kill between the last checkpoint and the manifest."""
    before = read_manifest(short_run)
    (short_run / "manifest.json").unlink()
    again = train(tiny_config(short_run, tiny_data_folder, steps=4))
    assert again["metrics"]["valid"] == before["metrics"]["valid"]
    assert again["metrics"]["finished"]


def test_too_many_bad_steps_end_the_run_with_advice(tmp_path, tiny_data_folder):
    """A spike factor that every gradient exceeds, once there is a mean of twenty steps."""
    config = tiny_config(
        tmp_path / "run",
        tiny_data_folder,
        steps=60,
        log_every=5,
        eval_every=0,
        guard={"spike_factor": 1e-3, "max_skipped_in_a_row": 5},
        checkpoint={"every": 15},
    )
    with pytest.raises(TrainingError) as error:
        train(config)
    assert "steps in a row up to step 25 were skipped" in str(error.value)
    assert "lower optim.learning_rate, or look at the data" in str(error.value)
    assert find_checkpoint(tmp_path / "run").name == "15"
    assert [record["skipped"] for record in read_metrics(tmp_path / "run")][-2:] == [0, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 12},
            r"batch_size: 12 in accumulate=1 microbatches cannot be cut over mesh.fsdp = 8; .* fits is 16",
        ),
        (
            {"batch_size": 16, "accumulate": 4},
            "batch_size: 16 in accumulate=4 microbatches .* the nearest that fits is 32",
        ),
    ],
)
def test_a_batch_that_cannot_be_cut_is_told(settings, message, tmp_path, tiny_data_folder):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path / "run", tiny_data_folder, mesh={"fsdp": 8}, **settings))
    assert not (tmp_path / "run").exists()


def test_heads_that_cannot_be_cut_are_told_with_all_else(tiny_data_folder):
    config = tiny_config(
        "x", tiny_data_folder, mesh={"fsdp": 1, "tensor": 8}, model={**MODEL, "mlp_dim": 12, "vocab_size": 4}
    )
    with pytest.raises(ConfigError) as error:
        check_layout(config, mesh_sizes(config.mesh, 8))
    problems = "\n".join(error.value.problems)
    for name in ("num_heads: 4", "num_kv_heads: 2", "mlp_dim: 12", "vocab_size: 4"):
        assert f"model.{name} cannot be cut over mesh.tensor = 8; make it" in problems
    # And the mesh that would fit.
    assert "model.num_kv_heads: 2 cannot be cut over mesh.tensor = 8; make it 8, or mesh.tensor=2" in problems


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": "reference"},
            "model.attention: reference .* ring over mesh.context = 8 does; make it auto or xla",
        ),
        ({}, "row_length: 40 .* mesh.context = 8, each with two chunks of a row; the nearest that fits is 32"),
        (
            {"context_attention": "all_to_all"},
            "num_heads: 4 cannot be cut over mesh.context = 8; make it 8, or mesh.con",
        ),
    ],
)
def test_rows_and_heads_that_devices_cannot_share_are_told(settings, message, tiny_data_folder):
    config = tiny_config(
        "x",
        tiny_data_folder,
        mesh={"fsdp": 1, "context": 8},
        model={**MODEL, "vocab_size": 8, **settings},
        row_length=40,
    )
    with pytest.raises(ConfigError, match=message):
        check_layout(config, mesh_sizes(config.mesh, 8))


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ({"data": 2, "fsdp": 1}, "mesh uses 2 of 8 devices; set an axis, such as mesh.data, to -1 to use all\n"),
        ({"slices": 2, "fsdp": 4}, ""),
        ({}, ""),
    ],
)
def test_devices_without_work_are_told(mesh, told, capsys):
    note_idle_devices(mesh_sizes(MeshConfig(**mesh), 8), 8)
    assert capsys.readouterr().err == told


def test_adapters_are_trained_beside_a_base_that_stays(short_run, tmp_path, tiny_data_folder):
    base = weights(short_run)
    settings = {"init_from": str(short_run), "model": None, "lora": {"rank": 2, "targets": ["query", "down"]}}
    optim = {"kind": "muon", "learning_rate": 1e-2, "schedule": {"kind": "constant"}}
    config = tiny_config(tmp_path / "run", tiny_data_folder, steps=30, optim=optim, **settings)
    manifest = train(config)
    assert manifest["inputs"]["init_from"]["hash"]
    saved = read_metadata(find_checkpoint(tmp_path / "run"))["shapes"]
    assert {path.rsplit("/", 1)[0] for path in saved} == {"layers/attention/query", "layers/mlp/down"}
    assert saved["layers/attention/query/up"] == [2, 2, 32, "float32"]
    merged = weights(tmp_path / "run")
    for path, value in base.items():
        changed = not np.array_equal(merged[path], value)
        assert changed == (path in ("layers/attention/query", "layers/mlp/down")), path
    update = merged["layers/mlp/down"] - base["layers/mlp/down"]
    assert (np.linalg.matrix_rank(update, tol=1e-6) <= 2).all()
    assert manifest["metrics"]["valid"]["loss"] < read_manifest(short_run)["metrics"]["valid"]["loss"]


def test_an_adapter_for_no_weight_is_told(short_run, tmp_path, tiny_data_folder):
    config = tiny_config(tmp_path / "run", tiny_data_folder, init_from=str(short_run), lora={"targets": ["quary"]})
    with pytest.raises(ConfigError, match=r"lora.targets: 'quary' names no weight; allowed: down, gate, key, out"):
        train(config)


def test_a_start_of_another_shape_is_told(short_run, tmp_path, tiny_data_folder):
    config = tiny_config(tmp_path / "run", tiny_data_folder, init_from=str(short_run), model={**MODEL, "num_layers": 4})
    with pytest.raises(CheckpointError, match=r"is a model with num_layers 2, but model\.num_layers is 4"):
        train(config)


def test_a_source_without_rows_to_hold_out_is_not_validated(tmp_path, tiny_data_folder):
    """Its manifest says that there are none."""
    import shutil

    data = shutil.copytree(tiny_data_folder, tmp_path / "data")
    manifest = read_manifest(data)
    tokenizer = manifest["inputs"]["tokenizer"]["path"]
    manifest["inputs"]["tokenizer"]["path"] = str((storage_path(tiny_data_folder) / tokenizer).resolve())
    manifest["metrics"]["splits"]["valid"]["rows"] = 0
    write_json(data / "manifest.json", manifest)
    assert train(tiny_config(tmp_path / "run", data, steps=1))["metrics"]["valid"] == {}


def test_a_metrics_log_goes_on_where_the_checkpoint_stands(tmp_path):
    """What a killed run logged after its checkpoint is dropped, and a line that was cut off with it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 5, "loss": 2.0}\n{"step": 6, "lo')
    record = {"step": 4, "loss": 1.5, "tokens_per_second": 1.0, "skipped": 0}
    with MetricsLog(storage_path(tmp_path), start_step=3, total_steps=9) as log:
        log.train(record)
        log.valid(4, {"loss": 1.25})
    records = read_metrics(tmp_path)
    assert [(record["step"], record.get("loss"), record.get("valid_loss")) for record in records] == [
        (1, 3.0, None),
        (4, 1.5, None),
        (4, None, 1.25),
    ]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
