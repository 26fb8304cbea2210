"""Restored state is sharded over the mesh: no device, and so no machine, ever holds the whole model."""

from functools import partial

import jax
import numpy as np
import pytest
import tensorstore
from tiny_run import tiny_model

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.checksums import checksum, checksums
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.parameters import abstract, initialize, shardings
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer
from maxlm.train.state import abstract_state, create_state

PLAN = Decoder(ModelConfig(**tiny_model(embed_dim=64, vocab_size=512)))


@pytest.fixture(scope="module")
def weights():
    """Drawn once, on one device."""
    return initialize(PLAN, jax.random.key(0))


def state_of(optimizer):
    return partial(create_state, optimizer=optimizer, keep_ema=True)


def bytes_per_device(tree) -> int:
    return sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_restored_state_is_sharded_over_all_devices(kind, weights):
    """Weights, moments and EMA are sharded; only norms and counters are replicated."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        create = state_of(make_optimizer(OptimConfig(kind=kind), PLAN))
        like = abstract_state(create, abstract(PLAN, mesh), mesh)
        real = jax.jit(create)(jax.device_put(weights, shardings(PLAN, mesh)))
    for path, leaf in flatten(like).items():
        made = flatten(real)[path]
        assert (leaf.shape, leaf.dtype) == (made.shape, made.dtype), path
        assert leaf.sharding.is_equivalent_to(made.sharding, leaf.ndim), path
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    assert bytes_per_device(like) < 1.1 * whole / 8


def test_checkpoint_restores_into_the_shards_of_another_mesh(weights, tmp_path):
    """Saved in eight shards of rows, restored in shards of rows and heads: the same values without an all-gather."""
    create = state_of(make_optimizer(OptimConfig(), PLAN))
    wide, other = make_mesh(MeshConfig(fsdp=8)), make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        with jax.set_mesh(wide):
            saved = jax.jit(create)(jax.device_put(weights, shardings(PLAN, wide)))
            checkpointer.save(saved, {})
            checkpointer.wait()
        with jax.set_mesh(other):
            restored, _ = checkpointer.restore(abstract_state(create, abstract(PLAN, other), other))
    assert bytes_per_device(restored) < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
    for path, leaf in flatten(restored).items():
        np.testing.assert_array_equal(leaf, flatten(saved)[path], err_msg=path)
    assert checksums(restored) == checksums(saved)


def test_unsharded_arrays_are_stored_in_chunks(weights, tmp_path, monkeypatch):
    """Chunked along both axes, so that a process that needs a part along either axis need not read the rest."""
    monkeypatch.setattr("maxlm.checkpoint.checkpointer.PIECE_BYTES", 1 << 12)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(
            create_state(weights, optimizer=make_optimizer(OptimConfig(), PLAN), keep_ema=False), {}, wait=True
        )
    folder = tmp_path / "checkpoints" / "0" / "weights"
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": "embedding/"}
    table = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    np.testing.assert_array_equal(table.read().result(), weights.embedding)
    piece = table.chunk_layout.read_chunk.shape
    assert np.prod(piece) * weights.embedding.dtype.itemsize <= 1 << 12
    assert all(part <= size // 2 for part, size in zip(piece, weights.embedding.shape))


def test_checksums_need_no_all_gather():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        for path, leaf in flatten(abstract(PLAN, mesh)).items():
            program = checksum.lower(leaf).compile().as_text()
            assert ("all-reduce" in program) != leaf.sharding.is_fully_replicated, path
            assert "all-gather" not in program, path
            assert "all-to-all" not in program, path
