"""Training from Python: rejected configurations, messages, adapters, and metrics."""

import json
import shutil
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
from tiny_run import EXECUTION, SIZES, tiny_config, tiny_model

import maxlm
from maxlm.checkpoint.folder import find_checkpoint, read_metadata
from maxlm.config import TokenizerConfig
from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import MESH_AXES, mesh_sizes
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, ConfigError, DataError, RequestError, TrainingError
from maxlm.generate.model import LoadedModel
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
    """A tokenizer of the same size as the data's, trained on other text."""
    folder = tmp_path_factory.mktemp("other")
    text = "\n\n".join(topics[name] for name in sorted(topics)[40:60])
    (folder / "text.txt").write_text(text, encoding="utf-8")
    train_tokenizer(
        TokenizerConfig(kind="tokenizer", output=str(folder / "out"), input=str(folder / "text.txt"), vocab_size=400)
    )
    return str(folder / "out")


def test_run_with_another_tokenizer_is_rejected_and_left_unchanged(short_run, tiny_data_folder, other_tokenizer):
    before = contents(short_run)
    with pytest.raises(ConfigError, match=r"tokenizer: that of its input \([0-9a-f]{8}\) -> .*/out \([0-9a-f]{8}\)"):
        train(tiny_config(short_run, tiny_data_folder, steps=8, tokenizer=other_tokenizer))
    assert contents(short_run) == before
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        train(
            tiny_config(short_run.parent / "x", tiny_data_folder, init_from=str(short_run), tokenizer=other_tokenizer)
        )


def test_run_without_checkpoints_accepts_another_tokenizer(tmp_path, tiny_data_folder, other_tokenizer):
    """A run killed before its first checkpoint leaves nothing that could conflict."""
    from maxlm.tokenizer.codec import Tokenizer

    Tokenizer.load(other_tokenizer).save(tmp_path / "run" / "tokenizer")
    train(tiny_config(tmp_path / "run", tiny_data_folder, steps=1, eval_batches=1))
    fingerprint = read_metadata(find_checkpoint(tmp_path / "run"))["fingerprint"]
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint == fingerprint


def test_rows_of_another_length_are_rejected(tmp_path, tiny_data_folder):
    with pytest.raises(DataError, match="its rows have 32 tokens, but 16 are needed"):
        train(tiny_config(tmp_path / "run", tiny_data_folder, row_length=16))


def test_rows_longer_than_context_of_starting_model_are_rejected(short_run, tmp_path, tiny_data_folder):
    config = tiny_config(tmp_path / "run", tiny_data_folder, init_from=str(short_run))
    with pytest.raises(ConfigError, match=r"exceeds execution\.max_length of"):
        train(config.model_copy(update={"model": None, "row_length": 4096}))


def test_starting_model_uses_settings_of_new_run(short_run, tmp_path, tiny_data_folder):
    """The new run chooses settings that change how a model is computed, not its weights."""
    execution = {**EXECUTION, "remat": "full", "max_length": 48}
    train(tiny_config(tmp_path / "run", tiny_data_folder, init_from=str(short_run), execution=execution, steps=1))
    loaded, _ = load_model(tmp_path / "run")
    assert (loaded.execution.remat, loaded.execution.max_length) == ("full", 48)


def test_vocabulary_of_another_size_is_rejected(tmp_path, tiny_data_folder):
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 300 is less than the tokenizer's 400; leave it out"):
        train(tiny_config(tmp_path / "run", tiny_data_folder, model=tiny_model(vocab_size=300)))


def test_vocabulary_may_have_rows_without_tokens(tmp_path, tiny_data_folder):
    train(tiny_config(tmp_path / "run", tiny_data_folder, model=tiny_model(vocab_size=448), steps=1))
    decoder, tokenizer = load_model(tmp_path / "run")
    model = LoadedModel(decoder, tokenizer)
    assert tokenizer.vocab_size == 400
    assert model.logits([[1, 2, 3]]).shape == (1, 3, 448)
    assert model.tokenizer.decode([447]) == ""


def test_finished_run_can_be_extended(short_run, tiny_data_folder, tmp_path):
    """With a constant rate, four steps and four more are eight."""
    optim = {"learning_rate": 1e-2, "schedule": {"kind": "constant", "warmup_steps": 2}}
    whole = train(tiny_config(tmp_path / "whole", tiny_data_folder, steps=8, optim=optim))
    train(tiny_config(tmp_path / "parts", tiny_data_folder, steps=4, optim=optim))
    parts = train(tiny_config(tmp_path / "parts", tiny_data_folder, steps=8, optim=optim))
    assert parts["metrics"]["valid"] == whole["metrics"]["valid"]
    for path, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(tmp_path / "parts")[path], value, err_msg=path)


def test_manifest_of_fewer_steps_does_not_count_as_finished(tiny_data_folder, tmp_path, monkeypatch):
    """A run that finished, was extended, and was killed after its last checkpoint."""
    train(tiny_config(tmp_path / "run", tiny_data_folder, steps=2))
    with monkeypatch.context() as patch:
        patch.setattr("maxlm.train.run.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny_config(tmp_path / "run", tiny_data_folder, steps=3))
    manifest = train(tiny_config(tmp_path / "run", tiny_data_folder, steps=3))
    assert manifest["metrics"]["steps"] == 3
    assert manifest == read_manifest(tmp_path / "run")


def test_rows_indivisible_by_processes_are_rejected_before_anything_is_created(tiny_data_folder, tmp_path, monkeypatch):
    def refuse(mesh):
        raise ConfigError(["mesh: process 0 would hold 2 of 3 groups of rows"])

    monkeypatch.setattr("maxlm.train.setup.row_shard", refuse)
    with pytest.raises(ConfigError, match="would hold 2 of 3"):
        train(tiny_config(tmp_path / "run", tiny_data_folder))
    assert not (tmp_path / "run").exists()


def test_fewer_steps_than_done_are_rejected_and_run_left_unchanged(short_run, tiny_data_folder):
    before = contents(short_run)
    with pytest.raises(ConfigError, match=r"steps: 3 is less than the 4 steps that the run in .* has already done"):
        train(tiny_config(short_run, tiny_data_folder, steps=3))
    assert contents(short_run) == before


def test_unknown_training_settings_do_not_prevent_loading_a_model(tmp_path, tiny_data_folder):
    """Training settings do not affect what the model computes; only the model section does."""
    train(tiny_config(tmp_path / "run", tiny_data_folder, steps=1))
    metadata = find_checkpoint(tmp_path / "run") / "metadata" / "metadata"
    saved = json.loads(metadata.read_text())
    saved["config"]["optim"]["gone_since"] = 0.9
    metadata.write_text(json.dumps(saved))
    assert load_model(tmp_path / "run")[0].config.embed_dim == SIZES["embed_dim"]
    saved["config"]["model"]["gone_since"] = 0.9
    metadata.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="by another version of maxlm, whose gone_since this version does not"):
        load_model(tmp_path / "run")


def test_checkpoint_loads_without_tokenizer(short_run, tmp_path):
    alone = shutil.copytree(find_checkpoint(short_run), tmp_path / "alone" / "checkpoints" / "4")
    model = maxlm.load(alone)
    assert model.logits(np.asarray([[1, 2, 3]])).shape == (1, 3, model.config.vocab_size)
    with pytest.raises(RequestError, match="4: has no tokenizer, so it takes token ids"):
        model.generate("The", max_new_tokens=2)


def test_lost_manifest_is_rewritten(short_run, tiny_data_folder):
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
    assert "lower optim.learning_rate, or check the data" in str(error.value)
    assert find_checkpoint(tmp_path / "run").name == "15"
    assert [record["skipped"] for record in read_metrics(tmp_path / "run")][-2:] == [0, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 12},
            r"batch_size: 12 in accumulate=1 microbatches is not divisible by mesh.fsdp = 8; .* fits is 16",
        ),
        (
            {"batch_size": 16, "accumulate": 4},
            "batch_size: 16 in accumulate=4 microbatches .* the nearest that fits is 32",
        ),
    ],
)
def test_indivisible_batch_is_rejected(settings, message, tmp_path, tiny_data_folder):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path / "run", tiny_data_folder, mesh={"fsdp": 8}, **settings))
    assert not (tmp_path / "run").exists()


def test_indivisible_heads_are_reported_with_all_other_problems(tiny_data_folder):
    config = tiny_config(
        "x", tiny_data_folder, mesh={"fsdp": 1, "tensor": 8}, model=tiny_model(mlp_dim=12, vocab_size=4)
    )
    with pytest.raises(ConfigError) as error:
        check_layout(config, mesh_sizes(config.mesh, 8))
    problems = "\n".join(error.value.problems)
    for name in ("layers.mixer.num_heads: 4", "layers.mixer.num_kv_heads: 2", "layers.mlp.dim: 12", "vocab_size: 4"):
        assert f"model.{name} is not divisible by mesh.tensor = 8; set it to" in problems
    # The message also names a mesh that fits.
    wanted = "layers.mixer.num_kv_heads: 2 is not divisible by mesh.tensor = 8; set it to 8, or mesh.tensor=2"
    assert f"model.{wanted}" in problems


def test_indivisible_sizes_of_a_mixed_model_are_reported_where_they_were_written(tiny_data_folder):
    mixer = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
    pattern = [{"mixer": mixer}, {"mixer": mixer, "mlp": {"kind": "moe", "num_experts": 6, "dim": 9}}]
    layers = [{"repeat": 1, "mixer": mixer, "mlp": {"dim": 10}}, {"repeat": 3, "pattern": pattern}]
    mesh = {"fsdp": 1, "tensor": 4, "expert": 4, "stage": 2}
    model = {"embed_dim": 32, "vocab_size": 8, "layers": layers}
    with pytest.raises(ConfigError) as error:
        check_layout(tiny_config("x", tiny_data_folder, batch_size=16, mesh=mesh, model=model), mesh_sizes_of(mesh))
    assert error.value.problems == [
        "model.layers.0.mlp.dim: 10 is not divisible by mesh.tensor = 4; set it to 8, or mesh.tensor=2",
        "model.layers.1.pattern.1.mlp.dim: 9 is not divisible by mesh.tensor = 4; set it to 8, or mesh.tensor=3",
        "model.layers.1.pattern.1.mlp.num_experts: 6 is not divisible by mesh.expert = 4; set it to 8, or"
        " mesh.expert=3",
        "model.layers.1.repeat: 3 is not divisible by mesh.stage = 2; set it to 4, or mesh.stage=1",
    ]


def mesh_sizes_of(mesh):
    config = MeshConfig(**mesh)
    return {name: getattr(config, name) for name in MESH_AXES}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": "reference"},
            "execution.attention: reference .* ring attention over mesh.context = 8 does; set it to auto or xla",
        ),
        ({}, "row_length: 40 .* mesh.context = 8, each with two chunks of a row; the nearest that fits is 32"),
        (
            {"context_attention": "all_to_all"},
            "num_heads: 4 is not divisible by mesh.context = 8; set it to 8, or mesh.con",
        ),
    ],
)
def test_indivisible_rows_and_heads_are_rejected(settings, message, tiny_data_folder):
    config = tiny_config(
        "x",
        tiny_data_folder,
        mesh={"fsdp": 1, "context": 8},
        model=tiny_model(vocab_size=8),
        execution={**EXECUTION, **settings},
        row_length=40,
    )
    with pytest.raises(ConfigError, match=message):
        check_layout(config, mesh_sizes(config.mesh, 8))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 2, "fsdp": 1}, "mesh uses 2 of 8 devices; set an axis, such as mesh.data, to -1 to use all\n"),
        ({"slices": 2, "fsdp": 4}, ""),
        ({}, ""),
    ],
)
def test_idle_devices_are_reported(mesh, message, capsys):
    note_idle_devices(mesh_sizes(MeshConfig(**mesh), 8), 8)
    assert capsys.readouterr().err == message


def test_adapters_are_trained_and_base_is_unchanged(short_run, tmp_path, tiny_data_folder):
    base = weights(short_run)
    settings = {
        "init_from": str(short_run),
        "model": None,
        "adapters": {"kind": "lora", "rank": 2, "targets": ["query", "down"]},
    }
    optim = {"kind": "muon", "learning_rate": 1e-2, "schedule": {"kind": "constant"}}
    config = tiny_config(tmp_path / "run", tiny_data_folder, steps=30, optim=optim, **settings)
    manifest = train(config)
    assert manifest["inputs"]["init_from"]["hash"]
    saved = read_metadata(find_checkpoint(tmp_path / "run"))["shapes"]
    assert {path.rsplit("/", 1)[0] for path in saved} == {"layers/0/0/mixer/query", "layers/0/0/mlp/down"}
    assert saved["layers/0/0/mixer/query/up"] == [2, 2, 32, "float32"]
    merged = weights(tmp_path / "run")
    for path, value in base.items():
        changed = not np.array_equal(merged[path], value)
        assert changed == (path in ("layers/0/0/mixer/query", "layers/0/0/mlp/down")), path
    update = merged["layers/0/0/mlp/down"] - base["layers/0/0/mlp/down"]
    assert (np.linalg.matrix_rank(update, tol=1e-6) <= 2).all()
    assert manifest["metrics"]["valid"]["loss"] < read_manifest(short_run)["metrics"]["valid"]["loss"]


def test_adapter_for_unknown_weight_is_rejected(short_run, tmp_path, tiny_data_folder):
    config = tiny_config(
        tmp_path / "run", tiny_data_folder, init_from=str(short_run), adapters={"kind": "lora", "targets": ["quary"]}
    )
    with pytest.raises(ConfigError, match=r"adapters.targets: 'quary' is not a matrix; allowed: down, gate, key, out"):
        train(config)


def test_starting_model_of_another_shape_is_rejected(short_run, tmp_path, tiny_data_folder):
    model = tiny_model(num_layers=4)
    config = tiny_config(tmp_path / "run", tiny_data_folder, init_from=str(short_run), model=model)
    with pytest.raises(CheckpointError, match=r"is a model with layers\.repeat 2, but model\.layers\.repeat is 4"):
        train(config)


def test_source_without_held_out_rows_is_not_validated(tmp_path, tiny_data_folder):
    """Its manifest lists none."""
    import shutil

    data = shutil.copytree(tiny_data_folder, tmp_path / "data")
    manifest = read_manifest(data)
    tokenizer = manifest["inputs"]["tokenizer"]["path"]
    manifest["inputs"]["tokenizer"]["path"] = str((storage_path(tiny_data_folder) / tokenizer).resolve())
    manifest["metrics"]["splits"]["valid"]["rows"] = 0
    write_json(data / "manifest.json", manifest)
    assert train(tiny_config(tmp_path / "run", data, steps=1))["metrics"]["valid"] == {}


def test_metrics_log_resumes_at_checkpoint(tmp_path):
    """Records that a killed run logged after its checkpoint are dropped, and a truncated line too."""
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
