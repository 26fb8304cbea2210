"""The flash kernels compile for real TPUs: the TPU compiler runs on a CPU without a TPU."""

import os
import subprocess
import sys

import pytest

TARGETS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]

# name: length, query heads, key-value heads, head_dim, dtype, arguments of `attention`
CASES = {
    "grouped heads": (1024, 4, 1, 128, "bfloat16", {}),
    "segments, window": (1024, 2, 2, 128, "bfloat16", {"segments": True, "window": 300}),
    "uneven length, soft cap": (600, 2, 2, 64, "bfloat16", {"segments": True, "soft_cap": 30.0}),
    "long rows in large blocks": (4096, 1, 1, 256, "bfloat16", {"segments": True, "soft_cap": 30.0}),
    "float32, bidirectional": (256, 2, 2, 64, "float32", {"causal": False}),
}


def compile_all(target: str) -> None:
    """Compile every case, forward and backward, on a mesh of the target's chips, and print its kernels and FLOPs."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from maxlm.ops.attention import attention

    chips = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[:4]
    mesh = Mesh(np.array(chips).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    heads, rows = P("data", None, "tensor", None), P("data", None)
    for name, (length, num_heads, num_kv_heads, head_dim, dtype, arguments) in CASES.items():
        use_segments = arguments.get("segments", False)
        options = {option: value for option, value in arguments.items() if option != "segments"}

        def loss(query, key, value, segments, use_segments=use_segments, options=options):
            def local(query, key, value, segments):
                return attention(query, key, value, segment_ids=segments if use_segments else None, **options)

            specs = {"in_specs": (heads, heads, heads, rows), "out_specs": heads, "check_vma": False}
            return jnp.sum(jax.shard_map(local, **specs)(query, key, value, segments).astype(jnp.float32) ** 2)

        def shape(dimensions, dtype, spec):
            return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh, spec))

        query = shape((2, length, 2 * num_heads, head_dim), dtype, heads)
        key = shape((2, length, 2 * num_kv_heads, head_dim), dtype, heads)
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
            compiled = gradient.lower(query, key, key, shape((2, length), "int32", rows)).compile()
        text = compiled.as_text()
        kernels, flops = text.count('custom_call_target="tpu_custom_call"'), int(compiled.cost_analysis()["flops"])
        print(target, name, kernels, flops, sep=" | ")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, tuple[int, int]]]:
    """Number of kernels and FLOPs of each case on each target; all from one process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, *TARGETS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {target: {} for target in TARGETS}
    for line in result.stdout.splitlines():
        if " | " in line:
            target, name, kernels, flops = line.split(" | ")
            found[target][name] = int(kernels), int(flops)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_forward_and_backward_compile_to_mosaic_kernels(target, compiled):
    # The forward pass, the query gradient, and the key and value gradients.
    assert {name: kernels for name, (kernels, _) in compiled[target].items()} == dict.fromkeys(CASES, 3)
    # Cost estimates for the compiler: 9 products of 2 x length^2 x head_dim per head. With two blocks per side, causal
    # attention skips a quarter.
    _, flops = compiled[target]["grouped heads"]
    assert flops == pytest.approx(9 * 4 * 2 * 1024**2 * 128 * 3 / 4, rel=0.02)


if __name__ == "__main__":
    for target in sys.argv[1:]:
        compile_all(target)
