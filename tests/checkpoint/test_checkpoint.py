"""Checkpoints: restored state is bit-identical, and corrupt or foreign checkpoints are rejected."""

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from declared import declared
from tiny_run import tiny_model

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.folder import find_checkpoint, read_metadata
from maxlm.checkpoint.restore import restore_weights
from maxlm.config import ModelConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.parameters import abstract, initialize
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, TrainingError
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer
from maxlm.train.state import TrainState, abstract_state, create_state

# Orbax leaves reads of corrupt files unawaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PLAN = Decoder(ModelConfig(**tiny_model(vocab_size=64)))


@functools.cache
def make_state(seed: int, *, step: int = 0, plan=PLAN) -> TrainState:
    """A state without all-zero arrays."""
    state = create_state(initialize(plan, jax.random.key(seed)), make_optimizer(OptimConfig(), plan))
    state = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf) + (seed + 1)), state)
    return replace(state, step=jax.numpy.asarray(step, "int32"))


def state_on(mesh) -> TrainState:
    """Abstract state to restore on a mesh."""
    create = functools.partial(create_state, optimizer=make_optimizer(OptimConfig(), PLAN))
    return abstract_state(create, abstract(PLAN, mesh), mesh)


def make_small_state(step: int, *, size: int = 4) -> TrainState:
    """A small state of a step, on one device."""
    weights = {"w": jax.numpy.arange(float(size)) + step}
    state = create_state(weights, make_optimizer(OptimConfig(), declared(weights)))
    return replace(state, step=jax.numpy.asarray(step, "int32"))


def assert_equal(restored, saved):
    restored, saved = flatten(jax.device_get(restored)), flatten(jax.device_get(saved))
    assert restored.keys() == saved.keys()
    for path, value in saved.items():
        np.testing.assert_array_equal(restored[path], value, err_msg=path)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """A run folder with the checkpoints of steps 1, 2 and 3, of seeds 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder, keep=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(make_state(step, step=step), {"note": f"of step {step}"})
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy that a test may corrupt."""
    return Path(shutil.copytree(saved_once, tmp_path / "run"))


def array_files(checkpoint: Path) -> list[Path]:
    """Files with the arrays' bytes, largest first."""
    return sorted((path for path in checkpoint.rglob("d/*") if path.is_file()), key=lambda path: -path.stat().st_size)


def damage_cut(checkpoint):
    largest = array_files(checkpoint)[0]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def damage_missing(checkpoint):
    shutil.rmtree(checkpoint / "rest")


def damage_metadata(checkpoint):
    for path in (checkpoint / "metadata").rglob("metadata"):
        path.write_text("{", encoding="utf-8")


def damage_values(checkpoint):
    """Replace arrays by valid but different ones, which only their checksums reveal."""
    shutil.rmtree(checkpoint / "weights")
    shutil.copytree(checkpoint.parent / "1" / "weights", checkpoint / "weights")


def test_restore_is_bit_identical_to_saved_state(saved):
    with Checkpointer(saved, keep=3) as checkpointer:
        restored, metadata = checkpointer.restore(make_state(0))
    assert_equal(restored, make_state(3, step=3))
    assert metadata["note"] == "of step 3"


@pytest.mark.parametrize("sizes", [None, {"fsdp": 4, "tensor": 2}])
def test_restore_needs_only_shapes(sizes, saved):
    """No state has to be created before restoring; each array gets the sharding of its abstract shape."""
    mesh = sizes and make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    like = (
        state_on(mesh)
        if mesh
        else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), make_state(0))
    )
    with Checkpointer(saved, keep=3) as checkpointer:
        restored, _ = checkpointer.restore(like)
    assert_equal(restored, make_state(3, step=3))
    if mesh:
        shardings = {path: leaf.sharding for path, leaf in flatten(restored).items()}
        assert shardings == {path: leaf.sharding for path, leaf in flatten(like).items()}


def test_restore_without_checkpoint_returns_none(tmp_path):
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        assert checkpointer.restore(make_state(0)) is None


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_checkpoint_restores_on_another_mesh(sizes, saved, tmp_path):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    with Checkpointer(saved, keep=3) as checkpointer:
        restored, _ = checkpointer.restore(state_on(mesh))
    assert_equal(restored, make_state(3, step=3))
    assert len(restored.trainable.layers[0][0].mlp.gate.sharding.device_set) == 8
    # And back: saved on eight devices, restored on one.
    with jax.set_mesh(mesh), Checkpointer(tmp_path / "back", keep=1) as checkpointer:
        checkpointer.save(restored, {})
    assert_equal(restore_weights(find_checkpoint(tmp_path / "back"), abstract(PLAN)), make_state(3, step=3).trainable)


@pytest.mark.parametrize("damage", [damage_cut, damage_missing, damage_metadata, damage_values])
def test_corrupt_checkpoint_is_set_aside_and_reported(damage, saved, capfd):
    damage(saved / "checkpoints" / "3")
    with Checkpointer(saved, keep=3) as checkpointer:
        restored, _ = checkpointer.restore(make_state(0))
        assert_equal(restored, make_state(2, step=2))
        assert "checkpoint 3 is corrupt" in capfd.readouterr().err
        assert (saved / "broken-checkpoint-3-1").is_dir()
        # Training resumes from step 2, and step 3 is saved again.
        checkpointer.save(make_state(5, step=3), {"note": "anew"})
    assert_equal(restore_weights(find_checkpoint(saved), abstract(PLAN)), make_state(5).trainable)
    # It may be corrupted again: nothing that was set aside is lost.
    damage(saved / "checkpoints" / "3")
    with Checkpointer(saved, keep=3) as checkpointer:
        assert int(checkpointer.restore(make_state(0))[0].step) == 2
    assert (saved / "broken-checkpoint-3-1").is_dir()
    assert (saved / "broken-checkpoint-3-2").is_dir()


def test_changed_array_bytes_are_detected(saved):
    """At any position in the largest file of the arrays."""
    [largest, *_] = array_files(saved / "checkpoints" / "3")
    content = bytearray(largest.read_bytes())
    for place in range(0, len(content), max(1, len(content) // 7)):
        content[place] ^= 0x10
    largest.write_bytes(content)
    with Checkpointer(saved, keep=3) as checkpointer:
        restored, _ = checkpointer.restore(make_state(0))
    assert_equal(restored, make_state(2, step=2))


def test_partially_written_checkpoint_is_ignored(saved):
    """Such as one left by a process killed while saving."""
    folder = saved / "checkpoints"
    (folder / "3").rename(folder / "3.orbax-checkpoint-tmp-7")
    shutil.rmtree(folder / "3.orbax-checkpoint-tmp-7" / "metadata")
    assert find_checkpoint(saved).name == "2"
    with Checkpointer(saved, keep=3) as checkpointer:
        restored, _ = checkpointer.restore(make_state(0))
        assert_equal(restored, make_state(2, step=2))
        checkpointer.save(make_state(3, step=3), {})
    assert find_checkpoint(saved).name == "3"


def test_all_checkpoints_corrupt_is_an_error(saved):
    for step in (1, 2, 3):
        damage_cut(saved / "checkpoints" / str(step))
    with Checkpointer(saved, keep=3) as checkpointer, pytest.raises(CheckpointError, match=r"all checkpoints \(3\)"):
        checkpointer.restore(make_state(0))


def test_inference_rejects_corrupt_weights(saved):
    damage_values(saved / "checkpoints" / "3")
    with pytest.raises(CheckpointError, match="weights differ from the saved ones"):
        restore_weights(find_checkpoint(saved), abstract(PLAN))
    damage_cut(saved / "checkpoints" / "2")
    with pytest.raises(CheckpointError, match="is corrupt"):
        restore_weights(find_checkpoint(saved / "checkpoints" / "2"), abstract(PLAN))
    damage_metadata(saved / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match="is corrupt"):
        read_metadata(find_checkpoint(saved / "checkpoints" / "1"))


def test_checkpoint_of_another_model_is_rejected_with_one_sentence(saved):
    wider = Decoder(ModelConfig(**tiny_model(vocab_size=64, mlp_dim=56)))
    with Checkpointer(saved, keep=3) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore(make_state(0, plan=wider))
    assert "another model" in str(error.value)
    assert "layers/0/0/mlp/down is [2, 48, 32, 'float32'] and must be [2, 56, 32, 'float32']" in str(error.value)
    assert (saved / "checkpoints" / "3").is_dir(), "a checkpoint of another model is not broken"
    with pytest.raises(CheckpointError, match="another model"):
        restore_weights(find_checkpoint(saved), abstract(wider))


@pytest.mark.parametrize("changed", [{"kind": "lion"}, {"ema_decay": 0.9}])
def test_checkpoint_of_another_optimizer_is_rejected_with_one_sentence(changed, tmp_path):
    """The needed state is missing, but the checkpoint is not corrupt."""
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(make_small_state(3), {}, wait=True)
        config = OptimConfig(**changed)
        keep_ema = config.ema_decay is not None
        weights = make_small_state(0).trainable
        like = create_state(weights, make_optimizer(config, declared(weights)), keep_ema=keep_ema)
        with pytest.raises(CheckpointError, match="was trained with another optimizer, or with or without ema_decay"):
            checkpointer.restore(like)
        assert int(checkpointer.restore(make_small_state(0))[0].step) == 3


def test_checkpoint_of_an_earlier_format_loads_for_inference_but_cannot_be_resumed(saved, capfd):
    """Its checksums may be computed differently, so they are not verified, which is reported."""
    metadata = saved / "checkpoints" / "3" / "metadata" / "metadata"
    tree = json.loads(metadata.read_text())
    del tree["format"], tree["rest_shapes"]
    tree["checksums"] = {path: value + 1 for path, value in tree["checksums"].items()}
    metadata.write_text(json.dumps(tree))
    assert_equal(restore_weights(find_checkpoint(saved), abstract(PLAN)), make_state(3).trainable)
    assert "its weights are not verified" in " ".join(capfd.readouterr().err.split())
    with Checkpointer(saved, keep=3) as checkpointer:
        with pytest.raises(CheckpointError, match="was saved by another version of maxlm"):
            checkpointer.restore(make_state(0))
        assert checkpointer.steps() == [3, 2, 1]
    metadata.write_text(json.dumps({**tree, "format": 99}))
    with pytest.raises(CheckpointError, match="was saved by a later version of maxlm"):
        restore_weights(find_checkpoint(saved), abstract(PLAN))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(make_state(step, step=step), {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_error_names_the_folder_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_too_little_disk_space_is_reported_before_writing(saved, monkeypatch):
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with Checkpointer(saved, keep=3) as checkpointer:
        with pytest.raises(TrainingError, match="free some space") as error:
            checkpointer.save(make_state(4, step=4), {})
        assert "newest complete checkpoint is of step 3" in str(error.value)
    assert find_checkpoint(saved).name == "3"


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = {paths!r}
from test_checkpoint import Checkpointer, make_state
from maxlm.errors import TrainingError
state = make_state(4, step=4)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with Checkpointer({folder!r}, keep=3) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        checkpointer.save(state, {{}})
except TrainingError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error)
"""


@pytest.mark.slow
def test_failed_write_is_reported_and_keeps_the_last_checkpoint(saved):
    """The operating system refuses further writes in the middle of a save."""
    script = FULL_DISK.format(paths=[str(path) for path in Path(__file__).parents[:2]], folder=str(saved))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a checkpoint could not be saved" in done.stdout
    assert "newest complete checkpoint is of step 3; run the same command to resume from there" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    with Checkpointer(saved, keep=3) as checkpointer:
        restored, _ = checkpointer.restore(make_state(0))
    assert_equal(restored, make_state(3, step=3))
