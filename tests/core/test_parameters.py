"""Parameter declarations give values, shardings and shapes."""

import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny_decoder import tiny_config

from maxlm.config.mesh import MeshConfig
from maxlm.core import batch
from maxlm.core.parameters import Normal, Parameter, abstract, initialize, ones, shardings, stack, zeros
from maxlm.core.sharding import (
    LOGICAL_AXES,
    MESH_AXES,
    RowShard,
    gather_weight,
    logical_to_spec,
    make_mesh,
    mesh_sizes,
    row_shard,
    shard,
    spec_of,
)
from maxlm.core.tree import flatten, path_of, unflatten
from maxlm.errors import ConfigError
from maxlm.models.decoder import Decoder

CONFIG = tiny_config(qk_norm=True)
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}]


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))


def arrays(tree) -> dict[str, np.ndarray]:
    return flatten(jax.device_get(tree))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_initial_values_are_the_same_on_every_mesh(sizes):
    plan, key = Decoder(CONFIG), jax.random.key(3)
    alone, cut = arrays(initialize(plan, key)), arrays(initialize(plan, key, mesh_of(**sizes)))
    for path, value in alone.items():
        # The same random bits; derived values may differ in the last digit, as compilers tile loops by shape.
        np.testing.assert_allclose(cut[path], value, rtol=1e-6, err_msg=path)


def test_initial_value_depends_only_on_key_and_path():
    def declare(*names):
        return {name: Parameter((4, 5), ("embed", "mlp"), Normal(1.0), role="matrix") for name in names}

    few, many = (arrays(initialize(declare(*names), jax.random.key(0))) for names in (("b",), ("a", "b", "c")))
    np.testing.assert_array_equal(few["b"], many["b"])
    assert not np.array_equal(many["a"], many["b"])
    other_key = arrays(initialize(declare("b"), jax.random.key(1)))
    assert not np.array_equal(few["b"], other_key["b"])


def test_initial_scales_match_the_declaration():
    config = tiny_config(embed_dim=128, mlp_dim=256, vocab_size=512)
    values = arrays(initialize(Decoder(config), jax.random.key(0)))
    assert values["embedding"].std() == pytest.approx(0.02, rel=0.05)
    assert values["layers/0/0/mlp/gate"].std() == pytest.approx(128**-0.5, rel=0.05)
    # Projections into the residual stream are scaled down by their number.
    assert values["layers/0/0/mlp/down"].std() == pytest.approx(256**-0.5 / 2, rel=0.05)
    np.testing.assert_array_equal(values["layers/0/0/mixer_norm/scale"], np.ones((2, 128)))


LAYER = {
    "w": Parameter((3, 4), ("embed", "mlp"), Normal(1.0), role="matrix"),
    "b": Parameter((4,), ("norm",), ones, role="norm"),
}


def test_stacked_layers_are_drawn_independently():
    stacked = stack(LAYER, np.arange(5), axes=("layers",), name="layers")
    assert stacked["w"].shape == (5, 3, 4)
    assert stacked["w"].axes == ("layers", "embed", "mlp")
    values = arrays(initialize(stacked, jax.random.key(0)))
    assert len(np.unique(values["w"])) == 60
    np.testing.assert_array_equal(values["b"], np.ones((5, 4)))


def test_initial_values_of_a_layer_depend_on_its_number_and_not_on_how_layers_are_stacked():
    def draw(numbers, axes):
        return arrays(initialize({"any": stack(LAYER, numbers, axes=axes, name="layers")}, jax.random.key(0)))["any/w"]

    together = draw(np.arange(6), ("layers",))
    pairs = draw(np.arange(6).reshape(3, 2), ("layers", "times"))
    np.testing.assert_array_equal(pairs, together.reshape(3, 2, 3, 4))
    np.testing.assert_array_equal(draw(np.array([1, 4]), ("layers",)), together[[1, 4]])


def test_shardings_and_shapes_follow_from_the_declaration():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    plan = Decoder(CONFIG)
    layouts = {path: layout.spec for path, layout in flatten(shardings(plan, mesh)).items()}
    cut = ("fsdp", "expert", "context")
    assert layouts["embedding"] == P("tensor", cut)
    assert layouts["layers/0/0/mixer/query"] == P("stage", cut, "tensor")
    assert layouts["layers/0/0/mixer/out"] == P("stage", "tensor", cut)
    assert layouts["layers/0/0/mlp/down"] == P("stage", "tensor", cut)
    assert layouts["layers/0/0/mixer/query_norm/scale"] == P("stage", None)
    shapes = flatten(abstract(plan, mesh))
    made = flatten(initialize(plan, jax.random.key(0), mesh))
    assert shapes.keys() == made.keys()
    for path, shape in shapes.items():
        assert (shape.shape, shape.dtype, shape.sharding) == (made[path].shape, made[path].dtype, made[path].sharding)


def test_shape_and_axes_must_agree():
    with pytest.raises(ValueError, match="differ in length"):
        Parameter((3, 4), ("embed",), zeros, role="matrix")


def test_colliding_axes_are_an_error():
    with pytest.raises(ValueError, match="use mesh axis 'tensor' twice"):
        logical_to_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="use mesh axis 'fsdp' twice"):
        logical_to_spec(("batch", "embed"))
    with pytest.raises(ValueError, match="'hats' is not in the table"):
        logical_to_spec(("hats",))


def test_the_table_names_axes_of_the_mesh():
    for axes in LOGICAL_AXES.values():
        assert set(axes or ()) <= set(MESH_AXES)
    assert logical_to_spec(("batch", "length", None)) == P(("data", "stage", "fsdp", "expert"), "context", None)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": -1}, (1, 1, 8, 1, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 1, 2, 1, 1, 2)),
        ({"data": 2, "fsdp": 1, "tensor": 1}, (2, 1, 1, 1, 1, 1)),
        ({"fsdp": 1, "tensor": 8}, (1, 1, 1, 1, 1, 8)),
        ({"stage": 2, "fsdp": 1, "expert": 2, "context": 2}, (1, 2, 1, 2, 2, 1)),
        ({"slices": 2, "data": 2, "fsdp": 2}, (4, 1, 2, 1, 1, 1)),
    ],
)
def test_mesh_has_the_requested_sizes(sizes, shape):
    mesh = make_mesh(MeshConfig(**sizes))
    assert (mesh.axis_names, mesh.devices.shape) == (MESH_AXES, shape)
    assert mesh.axis_types == (AxisType.Explicit,) * 6


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ({"fsdp": 16}, "fsdp=8"),
        ({"data": 3, "fsdp": 3}, "data=2"),
        ({"data": 9, "fsdp": -1}, "data=8"),
        ({"slices": 4, "fsdp": 1, "tensor": 4}, "tensor=2"),
        # With data=3, no tensor size would leave an integer for the free axis.
        ({"data": 3, "fsdp": -1, "tensor": 4}, "data=2"),
        # Changing one axis is not enough: inner axes keep their sizes as far as possible.
        ({"data": 4, "fsdp": 4, "tensor": 4}, "data=1 mesh.fsdp=2 mesh.tensor=4"),
        ({"data": 16, "fsdp": 1, "tensor": 16}, "data=1 mesh.tensor=8"),
        ({"slices": 2, "data": 4, "fsdp": 4, "tensor": 4}, "data=1 mesh.fsdp=1 mesh.tensor=4 mesh.slices=2"),
    ],
)
def test_too_large_mesh_is_reported_with_the_closest_that_fits(sizes, nearest):
    with pytest.raises(
        ConfigError, match=rf"needs \d+ devices, but there are 8; the closest mesh that fits is mesh.{nearest}$"
    ):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize("num_devices", [1, 6, 8, 12])
def test_suggested_mesh_is_accepted(num_devices):
    refused = 0
    for data, fsdp, tensor, slices in itertools.product((1, 2, 5, 16), (-1, 1, 3, 4), (1, 2, 3, 8), (1, 2, 3)):
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "slices": slices}
        try:
            mesh_sizes(MeshConfig(**sizes), num_devices)
        except ConfigError as error:
            advised = re.findall(r"mesh\.(\w+)=(\d+)", error.problems[0])
            mesh_sizes(MeshConfig(**sizes | {axis: int(size) for axis, size in advised}), num_devices)
            refused += 1
    assert refused > 50


def test_slices_are_the_outermost_part_of_the_data_axis():
    """Devices without a slice index are split into consecutive groups: all axes but data stay within one."""
    mesh = make_mesh(MeshConfig(slices=2, data=1, fsdp=2, tensor=2))
    assert sorted(device.id for device in mesh.devices[0].flat) == [0, 1, 2, 3]
    assert sorted(device.id for device in mesh.devices[1].flat) == [4, 5, 6, 7]


class SliceDevice:
    """A device with a slice index."""

    platform = device_kind = "cpu"

    def __init__(self, number: int, slice_index: int):
        self.id, self.process_index, self.slice_index = number, slice_index, slice_index


def test_devices_are_grouped_by_their_slice_index():
    """Slices have indices 7 and 3, with interleaved devices: consecutive groups would mix them."""
    devices = [SliceDevice(number, (7, 3)[number % 2]) for number in range(8)]
    mesh = make_mesh(MeshConfig(slices=2, fsdp=2, tensor=2), devices)
    assert mesh.devices.shape == (2, 1, 2, 1, 1, 2)
    assert [[device.id for device in part.flat] for part in mesh.devices] == [[1, 3, 5, 7], [0, 2, 4, 6]]


@pytest.mark.parametrize(
    ("slice_of_each", "found"),
    [([0, 0, 0, 0, 0, 1, 1, 1], "5, 3"), ([0] * 8, "8")],
    ids=["slices of five and three", "one slice"],
)
def test_too_few_or_too_small_slices_are_reported(slice_of_each, found):
    devices = [SliceDevice(number, slice_index) for number, slice_index in enumerate(slice_of_each)]
    with pytest.raises(
        ConfigError, match=rf"mesh.slices: 2 slices of 4 devices are requested, but there are slices of {found}$"
    ):
        make_mesh(MeshConfig(slices=2, fsdp=4), devices)


def test_one_process_reads_all_rows():
    assert row_shard(mesh_of(data=2, fsdp=2, tensor=2)) == RowShard(0, 1)


class FakeDevice:
    """A device of another process."""

    def __init__(self, process_index: int):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("sizes", "processes", "shards"),
    [
        # Adjacent devices; two processes within a row; and non-adjacent devices of a process, as of a TPU host.
        ({"fsdp": 4}, [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        ({"data": 2, "tensor": 2}, [0, 1, 2, 3], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ({"tensor": 4}, [0, 0, 1, 1], {0: (0, 1), 1: (0, 1)}),
        ({"fsdp": 8}, [0, 0, 1, 1, 0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, [1, 1, 0, 0, 1, 1, 0, 0], {0: (1, 2), 1: (0, 2)}),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_hold(sizes, processes, shards, monkeypatch):
    shape = [{"fsdp": 1, **sizes}.get(axis, 1) for axis in MESH_AXES]
    devices = np.array([FakeDevice(process) for process in processes]).reshape(shape)
    mesh = SimpleNamespace(devices=devices)
    for process, (index, count) in shards.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert row_shard(mesh) == RowShard(index, count)


def test_rows_go_to_the_devices_of_their_groups(monkeypatch):
    """Process 0 holds the first and third of four groups: its rows go there, in order."""
    mesh = mesh_of(fsdp=4, tensor=2)
    monkeypatch.setattr(batch, "row_shard", lambda mesh: RowShard(0, 2))
    monkeypatch.setattr(batch, "row_groups", lambda mesh: (0, 2))

    def held(shape, sharding, part):
        return {index[0].start: part(index) for index in sharding.devices_indices_map(shape).values()
                if index[0].start in (0, 4)}  # fmt: skip

    monkeypatch.setattr(jax, "make_array_from_callback", held)
    placed = batch.put_batch(np.arange(12).reshape(4, 3), mesh)
    assert {start: part.tolist() for start, part in placed.items()} == {
        0: [[0, 1, 2], [3, 4, 5]],
        4: [[6, 7, 8], [9, 10, 11]],
    }


def test_partly_overlapping_rows_of_processes_are_rejected(monkeypatch):
    mesh = SimpleNamespace(devices=np.array([FakeDevice(n) for n in (0, 0, 1, 1, 2, 2)]).reshape(3, 1, 1, 1, 1, 2))
    assert row_shard(mesh) == RowShard(0, 3)
    mesh = SimpleNamespace(devices=np.array([FakeDevice(n) for n in (0, 0, 0, 1, 1, 1)]).reshape(3, 1, 1, 1, 1, 2))
    with pytest.raises(ConfigError, match="process 0 would hold 2 of 3 groups of rows, which overlap partly"):
        row_shard(mesh)


def test_mesh_that_leaves_devices_idle_is_reported():
    with pytest.raises(ConfigError, match="leaves 2 of 8 devices idle"):
        make_mesh(MeshConfig(data=3, fsdp=-1))


def test_without_a_mesh_nothing_is_sharded():
    x = jnp.ones((4, 4))
    assert shard(x, "batch", None) is x
    assert gather_weight(x) is x


def test_gathered_weight_is_replicated_over_fsdp_and_sharded_over_tensor():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    parameter = {"w": Parameter((8, 8), ("embed", "mlp"), Normal(1.0), role="matrix")}
    with jax.set_mesh(mesh):
        weight = initialize(parameter, jax.random.key(0), mesh)["w"]
        assert spec_of(weight) == P(("fsdp", "expert", "context"), "tensor")
        assert spec_of(gather_weight(weight)) == P(None, "tensor")


def test_flatten_and_unflatten_round_trip():
    tree = {"a": [jnp.ones(1), jnp.zeros(2)], "b": {"c": jnp.ones(3)}}
    flat = flatten(tree)
    assert list(flat) == ["a/0", "a/1", "b/c"]
    assert jax.tree.structure(unflatten(flat, tree)) == jax.tree.structure(tree)
    [(path, _), *_] = jax.tree_util.tree_leaves_with_path(Decoder(CONFIG), is_leaf=lambda x: isinstance(x, Parameter))
    assert path_of(path) == "embedding"
    with pytest.raises(KeyError, match=r"missing \['b/c'\], unexpected \['d'\]"):
        unflatten({"a/0": 1, "a/1": 2, "d": 3}, tree)
