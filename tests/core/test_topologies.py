"""Meshes on the physical topologies of TPUs, described by the TPU compiler on this CPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

CASES = [
    ("v5:4x4x4", "megacore", 1, {"fsdp": 64}),
    ("v5:4x4x4", "megacore", 1, {"tensor": 2}),
    ("v5:4x4x4", "megacore", 1, {"tensor": 8}),
    ("v5:4x4x4", "megacore", 1, {"data": 2, "expert": 8, "tensor": 2}),
    ("v5:2x4x4", "megacore", 1, {"context": 8}),
    ("v5:4x4x4", "megacore", 2, {"slices": 2, "tensor": 2}),
    ("v5e:4x4", "default", 1, {"tensor": 2}),
    ("v6e:4x4", "default", 1, {"tensor": 8}),
]


def describe(topology, chip, slices, sizes):
    """Print the mesh, and for its innermost axis the most links between neighbors, and whether it is within a slice."""
    import numpy as np
    from jax.experimental import topologies

    from maxlm.config.mesh import MeshConfig
    from maxlm.core.sharding import make_mesh

    devices = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        chip_config_name=chip,
        chips_per_host_bounds=(2, 2, 1),
        num_slices=slices,
    ).devices
    mesh = make_mesh(MeshConfig(**sizes), devices)
    assert len(set(mesh.devices.flat)) == len(devices)
    innermost = [name for name, size in mesh.shape.items() if size > 1][-1]
    lines = np.moveaxis(mesh.devices, mesh.axis_names.index(innermost), -1).reshape(-1, mesh.shape[innermost])
    coordinates = np.array([[device.coords for device in line] for line in lines])
    links = np.abs(np.diff(coordinates, axis=1)).sum(-1).max()
    same_slice = all(len({getattr(device, "slice_index", 0) for device in line}) == 1 for line in lines)
    print({name: size for name, size in mesh.shape.items() if size > 1}, int(links), same_slice, sep=" | ")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_axes_of_any_size_that_divides_the_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split(" | ") for line in result.stdout.splitlines() if " | " in line]
    assert len(lines) == len(CASES)
    # A mesh axis of 2 devices is one link; slices are on the data axis only.
    assert {links for sizes, links, _ in lines if "'tensor': 2" in sizes} == {"1"}
    assert {same_slice for _, _, same_slice in lines} == {"True"}


if __name__ == "__main__":
    for case in CASES:
        describe(*case)
