"""Lineage: what may change when a run is resumed, what is recorded, and inputs that were moved."""

import json
import shutil
import typing
from fnmatch import fnmatchcase

import pytest
from pydantic import BaseModel
from tiny_run import SIZES, tiny_config, tiny_model
from toy_run import ToyData, toy_run

from maxlm.checkpoint.folder import find_checkpoint, read_metadata
from maxlm.checkpoint.lineage import Lineage, schedule_change
from maxlm.config.adapters import LoraConfig
from maxlm.config.objective import ObjectiveConfig, objective_classes
from maxlm.config.resume import _RULES, Change, change_of
from maxlm.config.train import TrainConfig
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.load import load_model
from maxlm.runtime.manifest import read_manifest
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.run import train
from maxlm.train.setup import resolve_model

# How a judge that rewards answers is reached, and how much of it is paid for.
OF_A_JUDGE = (
    *("judge.concurrent", "judge.requests_per_minute", "judge.timeout_seconds", "judge.retries", "judge.retry_seconds"),
    *("judge.api_key_variable", "judge.prices", "judge.prices.input", "judge.prices.output"),
    *("limits.max_cost", "limits.max_requests", "limits.max_failed_fraction"),
)
FREE = {
    *(f"objective.{reward}.{key}" for reward in ("reward", "constraint.cost") for key in OF_A_JUDGE),
    *("output", "mesh.data", "mesh.stage", "mesh.fsdp", "mesh.expert", "mesh.context", "mesh.tensor", "mesh.slices"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.retries", "checkpoint.retry_seconds", "checkpoint.local"),
    *("checkpoint.local.folder", "checkpoint.local.every", "checkpoint.local.keep", "objective.valid_file"),
    *("processes.start_timeout_seconds", "processes.heartbeat_seconds", "processes.restart_seconds"),
    *("processes.restarts_without_progress", "log_every", "eval_every", "eval_batches", "accumulate"),
    *("execution.remat", "execution.unroll", "execution.loss_chunk_length", "execution.attention"),
    *("execution.context_attention", "execution.experts", "execution.max_length"),
    *("execution.pipeline.schedule", "execution.pipeline.microbatches", "execution.pipeline.repeats"),
}
TOLD = {
    *("guard.spike_factor", "guard.max_skipped_in_a_row", "guard.max_rollbacks", "steps"),
    *("execution.activation_dtype", "execution.matmul_dtype", "execution.eight_bit", "execution.gradient_sum_dtype"),
}


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted keys of all fields, including those of optional and alternative sections."""
    found = set()
    for name, field in model.model_fields.items():
        sections = [each for each in _types(field.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
        if not sections or type(None) in _types(field.annotation):
            found.add(prefix + name)
        for section in sections:
            found |= leaves(section, f"{prefix}{name}.")
    return found


def _types(annotation) -> set:
    if annotation is ObjectiveConfig:
        return set(objective_classes())
    parts = typing.get_args(annotation)
    return {annotation}.union(*map(_types, parts)) if parts else {annotation}


def test_every_setting_is_compared_on_resume_unless_listed_here():
    keys = leaves(TrainConfig)
    assert {"optim.schedule.kind", "objective.loss.beta", "adapters.rank", "objective.sources.weight", "seed"} <= keys
    assert {key for key in keys if change_of(key) is Change.FREE} == FREE
    assert {key for key in keys if change_of(key) is Change.REPORTED} == TOLD
    assert all(change_of(key) is Change.ASKED for key in keys if key.startswith("optim.") and key != "optim.kind")
    # Every pattern still matches a field, and is not shadowed by another one.
    for change, patterns in _RULES:
        for pattern in patterns:
            named = {key for key in keys | {"model"} if fnmatchcase(key, pattern)}
            assert any(change_of(key) is change for key in named), pattern


@pytest.fixture(scope="module")
def moved_data(tmp_path_factory, tiny_data_folder):
    return shutil.copytree(tiny_data_folder, tmp_path_factory.mktemp("moved") / "data")


@pytest.fixture(scope="module")
def other_data(tmp_path_factory, tiny_data_folder):
    """Rows of the same shape with different contents."""
    folder = shutil.copytree(tiny_data_folder, tmp_path_factory.mktemp("other") / "data")
    manifest = read_manifest(folder)
    manifest["metrics"]["splits"]["train"]["hash"] = "0" * 32
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def contents(folder, files="**/*"):
    return {str(path): path.read_bytes() for path in folder.glob(files) if path.is_file()}


HEADS = {"num_heads": 2 * SIZES["num_heads"], "num_kv_heads": 2 * SIZES["num_kv_heads"], "head_dim": 4}


@pytest.mark.parametrize(
    ("settings", "message", "acceptable"),
    [
        ({"seed": 1}, "seed: 0 -> 1", True),
        ({"batch_size": 16}, "batch_size: 8 -> 16", True),
        (
            {"optim": {"learning_rate": 2e-2, "schedule": {"warmup_steps": 2}}},
            "optim.learning_rate: 0.01 -> 0.02",
            True,
        ),
        (
            {"optim": {"learning_rate": 1e-2, "schedule": {"warmup_steps": 2, "kind": "wsd"}}},
            "optim.schedule.kind: cosine -> wsd",
            True,
        ),
        ({"model": tiny_model(mlp_dim=64)}, "model.layers.mlp.dim: 48 -> 64", False),
        # Heads of another size have weights of the same shapes.
        ({"model": tiny_model(**HEADS)}, "model.layers.mixer.num_heads: 4 -> 8", False),
        ({"optim": {"kind": "lion"}}, "optim.kind: adamw -> lion", False),
        (
            {"adapters": {"kind": "lora", "rank": 2}},
            "adapters: nothing -> {'base': None, 'kind': 'lora', 'rank': 2",
            False,
        ),
    ],
)
def test_changes_of_meaning_are_rejected_and_leave_run_unchanged(
    settings, message, acceptable, short_run, tiny_data_folder
):
    before = contents(short_run)
    with pytest.raises(ConfigError) as error:
        train(tiny_config(short_run, tiny_data_folder, steps=8, **settings), accept_changes=not acceptable)
    first, *differences, last = error.value.problems
    assert first == f"{short_run}: has a run of 4 steps that was trained with other settings:"
    assert any(line.startswith(f"  {message}") for line in differences), differences
    assert last.startswith("give the settings that it was trained with, or a new folder (output=...)")
    assert last.endswith("or --accept-changes to resume with them, which records them in the manifest") == acceptable
    assert contents(short_run) == before


def test_different_data_is_rejected_but_moved_data_is_not(short_run, tiny_data_folder, moved_data, other_data):
    changes = lineage(tiny_config(short_run, moved_data, steps=8)).changes_since(saved_in(short_run))
    assert changes == [{"step": 4, "key": "steps", "from": 4, "to": 8}]
    wanted = rf"objective.sources.0.path: {tiny_data_folder} \([0-9a-f]{{8}}\) -> {other_data} \([0-9a-f]{{8}}\)"
    with pytest.raises(ConfigError, match=wanted):
        train(tiny_config(short_run, other_data, steps=8))


def lineage(config: TrainConfig, **settings) -> Lineage:
    tokenizer = Tokenizer.load(f"{config.output}/tokenizer")
    return Lineage.of(resolve_model(config, tokenizer), tokenizer, **settings)


def saved_in(folder):
    return read_metadata(find_checkpoint(folder))


def test_fine_tuning_in_folder_of_pretrained_model_is_rejected(short_run, tiny_data_folder, tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    objective = {"kind": "sft", "train_file": str(tmp_path / "chats.jsonl")}
    config = tiny_config(short_run, tiny_data_folder, objective=objective, init_from=str(short_run), model=None)
    start = shutil.copytree(short_run, tmp_path / "start")
    before = contents(short_run)
    with pytest.raises(ConfigError) as error:
        train(config.model_copy(update={"init_from": str(start)}), accept_changes=True)
    assert "  objective.kind: pretrain -> sft" in error.value.problems
    assert f"  init_from: nothing -> {start}" in error.value.problems
    link = tmp_path / "link"
    link.symlink_to(short_run)
    for path in (
        short_run,
        f"{short_run}/",
        f"{short_run}/../run",
        short_run / "checkpoints",
        link,
        f"{link}/checkpoints/4",
    ):
        with pytest.raises(ConfigError, match=r"output: .* is the folder that init_from names, which the run would"):
            train(config.model_copy(update={"init_from": str(path)}))
    with pytest.raises(ConfigError, match="is a folder of the stage 'data'"):
        train(tiny_config(tiny_data_folder, tiny_data_folder))
    with pytest.raises(ConfigError, match=r"output: .*/moved is a folder of the stage 'data'"):
        train(tiny_config(shutil.copytree(tiny_data_folder, tmp_path / "moved"), tiny_data_folder))
    assert contents(short_run) == before


def test_finished_run_is_not_rewritten_by_later_requests(short_run, tiny_data_folder):
    before = contents(short_run, "*")
    again = train(tiny_config(short_run, tiny_data_folder, steps=4, log_every=1, eval_batches=1), accept_changes=True)
    assert again == read_manifest(short_run)
    assert contents(short_run, "*") == before
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1\ngive the settings .* a new folder \(output=\.\.\.\)$"):
        train(tiny_config(short_run, tiny_data_folder, steps=4, seed=1), accept_changes=True)


def test_accepted_changes_are_recorded_at_their_step(tmp_path, capsys):
    """Over several resumptions, and printed at each; changes of undone steps are dropped."""
    toy_run(tmp_path / "run", steps=4)
    settings = {"optim": {"learning_rate": 0.2, "schedule": {"warmup_steps": 0}}, "log_every": 1}
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.1 -> 0\.2"):
        toy_run(tmp_path / "run", steps=8, **settings)
    toy_run(tmp_path / "run", steps=8, accept_changes=True, **settings)
    message = capsys.readouterr().err
    assert "optim.learning_rate: 0.1 -> 0.2\n" in message
    assert "the learning rate of step 5 changes from 0.01 to 0.11 (schedule cosine, 8 steps)" in message
    objective = ToyData(poison={9, 10, 11})
    result = toy_run(tmp_path / "run", steps=12, data=objective, seed=1, accept_changes=True, **settings)
    wanted = [
        {"step": 4, "key": "optim.learning_rate", "from": 0.1, "to": 0.2},
        {"step": 4, "key": "steps", "from": 4, "to": 8},
        {"step": 8, "key": "steps", "from": 8, "to": 12},
        {"step": 8, "key": "seed", "from": 0, "to": 1},
    ]
    assert saved_in(tmp_path / "run")["changes"] == result.record["changes"] == wanted
    assert result.record["config"]["seed"] == 1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "constant"}, "stays 0.0003 (schedule constant, 200 steps)"),
        ({"kind": "inverse_sqrt"}, "stays 0.000133 (schedule inverse_sqrt, 200 steps)"),
        ({"kind": "cosine"}, "changes from 3e-05 to 0.000188 (schedule cosine, 200 steps)"),
        ({"kind": "wsd"}, "changes from 3e-05 to 0.0003 (schedule wsd, 200 steps)"),
    ],
)
def test_extending_a_run_reports_change_of_learning_rate(schedule, message):
    before = tiny_config("run", "data", steps=100, optim={"schedule": schedule})
    assert schedule_change(before, before.model_copy(update={"steps": 200}), 100).endswith(message)
    assert schedule_change(before, before.model_copy(update={"seed": 1}), 100) is None


def test_manifest_records_what_was_run_and_read(tmp_path, short_run, tiny_data_folder):
    """If a run was killed before writing its manifest, the manifest has the settings that it was trained with."""
    run = shutil.copytree(short_run, tmp_path / "run")
    (run / "manifest.json").unlink()
    config = tiny_config(run, tiny_data_folder, steps=4, log_every=1)
    assert train(config)["config"]["log_every"] == 3
    assert "changes" not in read_manifest(run)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, short_run, tiny_data_folder):
    """A folder with a model, and next to it a run of adapters on it."""
    folder = tmp_path_factory.mktemp("adapters")
    base = shutil.copytree(short_run, folder / "home" / "base")
    train(adapters_config(folder / "home", tiny_data_folder, base))
    return folder / "home"


def adapters_config(folder, data, base, **settings):
    config = tiny_config(folder / "adapters", data, init_from=str(base), **{"steps": 2, **settings})
    return config.model_copy(update={"model": None, "adapters": LoraConfig(rank=2)})


def test_adapters_reject_a_changed_base(tmp_path, adapters, tiny_data_folder):
    folder = shutil.copytree(adapters, tmp_path / "home")
    metadata = folder / "base" / "checkpoints" / "4" / "metadata" / "metadata"
    saved = json.loads(metadata.read_text())
    first = next(path for path in saved["checksums"] if path.startswith("weights/"))
    saved["checksums"][first] += 1
    metadata.write_text(json.dumps(saved))
    away = adapters.rename(adapters.with_name("away"))
    with pytest.raises(CheckpointError, match="has changed since the adapters"):
        load_model(folder / "adapters")
    wanted = r"init_from: .* \([0-9a-f]{8}\) -> .* \([0-9a-f]{8}\)"
    with pytest.raises(ConfigError, match=wanted):
        train(adapters_config(folder, tiny_data_folder, folder / "base", steps=9), accept_changes=True)
    away.rename(adapters)


def test_adapters_find_their_base_after_both_moved(adapters, tiny_data_folder):
    start = read_manifest(adapters / "adapters")["start"]
    assert start["checkpoint"] == "../base/checkpoints/4"
    moved = adapters.rename(adapters.with_name("moved"))
    try:
        load_model(moved / "adapters")
        # The checkpoint alone, next to its base and away from it.
        alone = (moved / "adapters").rename(moved / "renamed")
        load_model(alone)
        alone = alone.rename(moved / "adapters")
        base = (moved / "base").rename(moved / "elsewhere")
        with pytest.raises(CheckpointError) as error:
            load_model(alone)
        checkpoint = find_checkpoint(alone)
        assert str(error.value) == (
            f"{checkpoint}: the base model of its adapters is missing, at {moved}/base/checkpoints/4 or"
            f" {adapters}/base/checkpoints/4; put its run folder back, or a link to it: ln -s WHERE_IT_IS {moved}/base"
        )
        manifest = train(adapters_config(moved, tiny_data_folder, base, steps=3))
        assert manifest["start"]["checkpoint"] == "../elsewhere/checkpoints/4"
        (moved / "base").symlink_to(base)
        load_model(checkpoint)
        (moved.parent / "link").symlink_to(alone)
        load_model(moved.parent / "link")
    finally:
        (moved / "base").unlink(missing_ok=True)
        (moved / "elsewhere").rename(moved / "base")
        moved.rename(adapters)
